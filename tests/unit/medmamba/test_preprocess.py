"""The one preprocessing of training, evaluation and prediction."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards.decode import decode
from data_shards.loader.pixels import stretched
from medmamba.preprocess import preprocess, resize_uint8, to_float


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_become_three_normalized_channels(channels):
    pixels = torch.arange(2 * 4 * 5 * channels, dtype=torch.uint8).reshape(2, 4, 5, channels)
    x = preprocess(pixels)
    assert x.shape == (2, 3, 4, 5)
    assert x.is_contiguous(memory_format=torch.channels_last)
    expected = (pixels.double().permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    torch.testing.assert_close(x.double(), expected.expand(-1, 3, -1, -1), atol=1e-7, rtol=0)


def test_black_and_white_reach_the_ends_of_the_range():
    ends = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 2, 1)
    assert preprocess(ends)[0, 0, 0].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(torch.zeros(2, 4, 4, 3), id="float"),
        pytest.param(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), id="channels first"),
        pytest.param(torch.zeros(4, 4, 3, dtype=torch.uint8), id="no batch"),
    ],
)
def test_other_input_is_refused_with_what_it_was(images):
    with pytest.raises(ValueError, match="channels last"):
        to_float(images)


@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_pils_antialiased_bilinear(channels):
    image = np.random.default_rng(0).integers(0, 256, (60, 45, channels), dtype=np.uint8)
    expected = Image.fromarray(image.squeeze()).resize((32, 48), Image.Resampling.BILINEAR)
    got = resize_uint8(image, (48, 32))
    assert got.shape == (48, 32, channels)
    np.testing.assert_array_equal(got.squeeze(), np.asarray(expected))
    np.testing.assert_array_equal(resize_uint8(image, 33), resize_uint8(image, (33, 33)))


@pytest.mark.parametrize(
    ("shape", "stored_channels"),
    [((60, 45), 1), ((60, 45), 3), ((60, 45, 3), 3), ((28, 28), 1)],
    ids=["grey", "grey among colour", "colour", "small"],
)
def test_an_image_is_resized_as_the_shard_loader_does_it(shape, stored_channels):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    coded = io.BytesIO()
    Image.fromarray(image).save(coded, "PNG")
    loaded = stretched(coded.getvalue(), 48, 32, stored_channels)
    alone = resize_uint8(decode(coded.getvalue()), (48, 32))
    np.testing.assert_array_equal(np.broadcast_to(loaded, (48, 32, 3)), np.broadcast_to(alone, (48, 32, 3)))


def test_an_image_of_the_right_size_is_left_alone():
    image = np.random.default_rng(0).integers(0, 256, (33, 33, 3), dtype=np.uint8)
    assert resize_uint8(image, 33) is image
