from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from tiny_sets import coded, pixels

from data_shards.loader.pixels import Crop, crop_boxes, cropped, stretched

JPEGS = {
    "4:2:0": {},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "restarts": {"restart_marker_rows": 1},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True},
}


def photograph(height: int = 301, width: int = 233, grey: bool = False, **options) -> bytes:
    """A smooth image with a little noise as JPEG, of sides that are no multiple of its blocks."""
    rough = Image.fromarray(pixels(3, 9, 8, channels=3)).resize((width, height), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(1).integers(-3, 4, (height, width, 3))
    image = Image.fromarray(np.clip(np.asarray(rough).astype(int) + noise, 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    (image.convert("L") if grey else image).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def by_pil(data: bytes, box: tuple[int, int, int, int], height: int, width: int) -> np.ndarray:
    part = Image.open(io.BytesIO(data)).crop(box).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(part).astype(int)


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_part_that_needs_no_resizing_has_pils_pixels(options):
    data = photograph(**options)
    for box in ((0, 0, 64, 64), (9, 17, 73, 81), (169, 237, 233, 301), (40, 100, 104, 164)):
        assert np.array_equal(cropped(data, box, 64, 64, 3), by_pil(data, box, 64, 64)), box


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_crop_below_twice_the_size_matches_pil_to_rounding(options):
    data = photograph(**options)
    for box in ((0, 0, 127, 90), (31, 5, 120, 111), (150, 200, 233, 301), (10, 10, 30, 40)):
        assert np.abs(cropped(data, box, 64, 64, 3) - by_pil(data, box, 64, 64)).max() <= 1, box


@pytest.mark.parametrize("size", [96, 48, 24], ids=["half", "quarter", "eighth"])
def test_a_part_decoded_at_reduced_scale_is_the_same_picture(size):
    data = photograph(height=403, width=405)
    box = (3, 7, 3 + 4 * 96 + 5, 7 + 4 * 96 + 3)
    found = cropped(data, box, size, size, 3)
    expected = by_pil(data, box, size, size)
    assert np.abs(found - expected).mean() < 2
    # A shift by half a pixel would be seen: a neighbour's pixels are further away.
    assert np.abs(found - expected).mean() < np.abs(np.roll(found, 1, 1) - expected).mean() / 2


def test_a_part_of_a_png_is_that_of_pil():
    data = coded(pixels(5, 60, 70, channels=3))
    found = cropped(data, (3, 4, 63, 50), 32, 32, 3)
    assert np.abs(found - by_pil(data, (3, 4, 63, 50), 32, 32)).max() <= 1


@pytest.mark.parametrize("data", [photograph(grey=True), coded(pixels(1, 301, 233))], ids=["jpeg", "png"])
def test_gray_stays_gray_and_is_repeated_where_the_set_is_rgb(data):
    box = (10, 20, 200, 220)
    grey, rgb = cropped(data, box, 32, 40, 1), cropped(data, box, 32, 40, 3)
    assert grey.shape == (32, 40, 1)
    assert rgb.shape == (32, 40, 3)
    assert (rgb == grey).all()


def test_a_whole_image_is_stretched_by_pils_filter():
    for data in (photograph(), photograph(grey=True), coded(pixels(1, 60, 50, channels=3))):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        assert np.array_equal(stretched(data, 32, 48, 3), image.resize((48, 32), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("library", ["pyspng", "pillow"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_has_the_same_pixels_whichever_library_decodes_it(library, channels, monkeypatch):
    if library == "pyspng":
        pytest.importorskip("pyspng")
    else:
        monkeypatch.setattr("data_shards.loader.pixels.pyspng", None)
    image = pixels(7, 23, 31, channels)
    for options in ({}, {"compress_level": 0}, {"optimize": True}):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", **options)
        assert np.array_equal(
            stretched(buffer.getvalue(), 23, 31, 3), np.broadcast_to(image.reshape(23, 31, -1), (23, 31, 3))
        )
        assert np.array_equal(
            stretched(buffer.getvalue(), 16, 16, 3),
            Image.open(buffer).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR),
        )


def boxes_of(heights, widths, min_area: float = 0.25, seed: int = 1, epoch: int = 2, first: int = 0) -> np.ndarray:
    sample = np.arange(first, first + len(heights))
    return crop_boxes(Crop(min_area), np.array(heights), np.array(widths), seed=seed, epoch=epoch, sample=sample)


def test_random_crops_are_inside_and_of_the_requested_shape():
    heights, widths = np.full(2000, 400), np.full(2000, 300)
    left, top, right, bottom = boxes_of(heights, widths).T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 300
    assert bottom.max() <= 400
    area, aspect = (right - left) * (bottom - top) / 120_000, (right - left) / (bottom - top)
    assert 0.24 < area.min() < 0.3
    assert 0.9 < area.max() <= 1
    assert 0.73 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.35
    assert left.min() == top.min() == 0
    assert right.max() == 300
    assert bottom.max() == 400


def test_a_random_crop_depends_only_on_seed_epoch_and_sample():
    heights, widths = np.full(50, 120), np.full(50, 90)
    together = boxes_of(heights, widths)
    for sample in (0, 7, 49):
        assert np.array_equal(boxes_of([120], [90], first=sample)[0], together[sample])
    for other in (boxes_of(heights, widths, seed=2), boxes_of(heights, widths, epoch=3)):
        assert (other != together).any(1).mean() > 0.9
    assert len(np.unique(together, axis=0)) > 45


def test_random_parts_are_the_same_for_ever():
    assert boxes_of([120, 512], [90, 512], seed=3, epoch=1).tolist() == [[7, 13, 82, 74], [120, 85, 474, 424]]


def test_of_an_image_in_which_no_part_fits_the_middle_is_taken():
    assert boxes_of([1000], [3], min_area=0.9).tolist() == [[0, 498, 3, 502]]
    assert boxes_of([1], [1]).tolist() == [[0, 0, 1, 1]]
