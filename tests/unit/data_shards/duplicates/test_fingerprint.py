"""What images are compared by: equal pixels give equal digests, small changes few bits, other images many."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from tiny_sets import InMemorySet, coded, pixels

from data_shards.duplicates.fingerprint import BLANK, NUM_BITS, SHARP, UNDECODABLE, Fingerprints, fingerprint, joined
from data_shards.source import Row

EXPECTED = ["6b55a556575544b6", "6ad6a92a96ab4ab5", "00000052ad2a92af"]


def prints_of(*images: np.ndarray | bytes, max_side: int | None = None) -> Fingerprints:
    rows = [Row(str(i), 0, (0,), None, None) for i in range(len(images))]
    return fingerprint(InMemorySet(rows, dict(zip("0123456789", images, strict=False))), rows, max_side=max_side)


def distance(prints: Fingerprints, one: int = 0, two: int = 1) -> int:
    return sum(int(a ^ b).bit_count() for a, b in zip(prints.bits[one], prints.bits[two], strict=True))


def smooth(number: int, side: int = 96) -> np.ndarray:
    """An image with structure at all scales, as photographs have."""
    small = np.random.default_rng(number).integers(0, 256, (3, 12, 12), dtype=np.uint8)
    layers = [np.asarray(Image.fromarray(layer).resize((side, side), Image.Resampling.BICUBIC)) for layer in small]
    return np.stack(layers, 2)


def test_the_same_pixels_have_one_digest_however_they_are_coded():
    grey = pixels(1)
    prints = prints_of(grey, coded(grey), coded(grey, "BMP"), grey[:, :, None], pixels(2))
    assert [(row == prints.pixels[0]).all() for row in prints.pixels] == [True, True, True, True, False]
    assert (prints.bits[:4] == prints.bits[0]).all()


def test_one_changed_pixel_or_another_shape_is_another_digest():
    image = pixels(1, 10, 12)
    changed = image.copy()
    changed[3, 3] ^= 1
    prints = prints_of(image, changed, image.reshape(12, 10))
    assert len(np.unique(prints.pixels, axis=0)) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda image: Image.open(io.BytesIO(coded(np.asarray(image), "JPEG"))),
        lambda image: image.resize((48, 48), Image.Resampling.BILINEAR),
        lambda image: image.resize((192, 192), Image.Resampling.BICUBIC),
        lambda image: image.point(lambda value: min(255, value + 10)),
        lambda image: image.convert("L"),
    ],
    ids=["coded again", "half as large", "twice as large", "brighter", "in grey"],
)
def test_a_small_change_differs_in_few_bits_another_in_many(change):
    image = smooth(1)
    prints = prints_of(image, np.asarray(change(Image.fromarray(image))), smooth(2))
    assert distance(prints) <= 12
    assert distance(prints, 0, 2) > 40
    assert NUM_BITS == 168


def test_a_blank_image_has_no_bits_an_undecodable_one_nothing():
    nearly_blank = np.full((20, 20), 200, np.uint8)
    nearly_blank[0, 0] = 190
    prints = prints_of(nearly_blank, b"no image", pixels(1))
    assert prints.state.tolist() == [BLANK, UNDECODABLE, SHARP]
    assert not prints.bits[:2].any()
    assert prints.pixels[0].any()
    assert not prints.pixels[1].any()


def test_the_size_is_that_of_the_code_or_of_the_pixels():
    data = coded(pixels(1))
    assert prints_of(data, pixels(1, 7, 9), b"").size.tolist() == [len(data), 63, 0]


def test_images_are_compared_as_the_shards_will_hold_them():
    image = smooth(3)
    assert (prints_of(image, max_side=40).pixels != prints_of(image).pixels).any()


def test_parts_make_up_the_whole():
    images = [pixels(i) for i in range(5)]
    whole, parts = prints_of(*images), joined([prints_of(*images[:2]), prints_of(*images[2:])])
    for name in ("state", "pixels", "bits", "size"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))


def test_the_bits_are_those_that_every_machine_finds():
    """Whole numbers all the way: other bits here would move the datasets whose copies were dropped or moved."""
    row, column = np.mgrid[:40, :50]
    image = ((row * row * 7 + column * column * 3 + row * column) // 64 % 256).astype(np.uint8)
    assert [f"{int(word):016x}" for word in prints_of(image).bits[0]] == EXPECTED
