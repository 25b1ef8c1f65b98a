"""Decoding: every kind of image file becomes uint8 grey or RGB, or says why not; shards keep pixels, not metadata."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data_shards.decode import UndecodableImage, decode, stored_bytes

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def coded(pixels, format="PNG", mode=None, **options):
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112], tags[0x010E] = orientation, "Jane Doe"
    return tags.tobytes()


CASES = {
    "grey png": coded(GREY),
    "rgb png": coded(RGB),
    "rgba png": coded(RGB, mode="RGBA"),
    "palette png": coded(RGB, mode="P"),
    "grey and alpha": coded(GREY, mode="LA"),
    "bilevel": coded(GREY, mode="1"),
    "16-bit png": coded(GREY.astype(np.uint16) * 257),
    "16-bit tiff": coded(GREY.astype(np.uint16) * 257, "TIFF"),
    "grey jpeg": coded(GREY, "JPEG"),
    "rgb jpeg": coded(RGB, "JPEG"),
    "progressive jpeg": coded(RGB, "JPEG", progressive=True, exif=exif(1), comment="Jane Doe"),
    "rgb-coded jpeg": coded(RGB, "JPEG", keep_rgb=True),
    "cmyk jpeg": coded(RGB, "JPEG", mode="CMYK"),
    "turned jpeg": coded(RGB, "JPEG", exif=exif(6)),
    "bmp": coded(RGB, "BMP"),
    "gif": coded(GREY, "GIF"),
    "webp": coded(RGB, "WEBP"),
    "grey array": GREY,
    "grey array with an axis": GREY[:, :, None],
    "rgb array": RGB,
}


@pytest.mark.parametrize("data", CASES.values(), ids=CASES)
def test_what_a_shard_keeps_has_the_pixels_of_the_source(data):
    pixels = decode(data)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] in (1, 3)
    kept, ending, found = stored_bytes(data)
    assert np.array_equal(found, pixels)
    assert Image.open(io.BytesIO(kept)).format == {"png": "PNG", "jpg": "JPEG"}[ending]
    assert np.array_equal(decode(kept), pixels)
    assert stored_bytes(data)[0] == kept
    assert stored_bytes(kept)[0] == kept


@pytest.mark.parametrize("name", ["grey png", "rgb png", "16-bit png", "16-bit tiff", "bmp", "grey array", "rgb array"])
def test_lossless_sources_keep_every_pixel(name):
    expected = RGB if name in ("rgb png", "bmp", "rgb array") else GREY[:, :, None]
    assert np.array_equal(decode(CASES[name]), expected)


@pytest.mark.parametrize("name", ["grey jpeg", "rgb jpeg", "progressive jpeg", "rgb-coded jpeg"])
def test_jpegs_stay_jpegs(name):
    assert stored_bytes(CASES[name])[1] == "jpg"


def test_metadata_does_not_reach_a_shard():
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "Jane Doe")
    for data in (
        CASES["progressive jpeg"] + b"Jane Doe behind the end",
        coded(RGB, "JPEG", exif=exif(3)),
        coded(RGB, pnginfo=info, exif=exif(1)),
        coded(RGB, pnginfo=info) + b"Jane Doe",
    ):
        assert b"Jane Doe" in data
        assert b"Jane Doe" not in stored_bytes(data)[0]


def test_orientation_is_applied():
    upright = decode(coded(RGB, "JPEG"))
    assert np.array_equal(decode(CASES["turned jpeg"]), np.rot90(upright, -1))
    _, ending, turned = stored_bytes(CASES["turned jpeg"])
    assert (ending, turned.shape) == ("png", (30, 20, 3))


def test_transparent_pixels_lie_over_black():
    rgba = np.dstack([RGB, np.zeros_like(GREY)])
    rgba[:5, :, 3] = 255
    pixels = decode(coded(rgba))
    assert np.array_equal(pixels[:5], RGB[:5])
    assert not pixels[5:].any()


def test_large_images_are_shrunk_to_max_side():
    kept, _, shrunk = stored_bytes(coded(RGB), max_side=15)
    assert shrunk.shape == (10, 15, 3) == decode(kept).shape
    assert stored_bytes(coded(RGB), max_side=30)[0] == stored_bytes(coded(RGB))[0]


def bomb():
    data = bytearray(coded(GREY))
    data[16:24] = (30000).to_bytes(4, "big") * 2
    import struct
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


BAD = {
    "empty file": (b"", "empty"),
    "text": (b"file,label\n", "not an image"),
    "truncated png": (CASES["rgb png"][:-200], "."),
    "truncated jpeg": (CASES["rgb jpeg"][:-200], "truncated"),
    "bomb": (bomb(), "pixels"),
    "animation": (coded(RGB, "GIF", save_all=True, append_images=[Image.fromarray(RGB[::-1])]), "2 frames"),
    "float": (coded(GREY.astype(np.float32), "TIFF"), "floating"),
    "float array": (GREY.astype(np.float32), "float32"),
    "five channels": (np.zeros((4, 4, 5), np.uint8), "not uint8"),
}


@pytest.mark.parametrize(("data", "reason"), BAD.values(), ids=BAD)
def test_an_undecodable_image_says_why(data, reason):
    for function in (decode, stored_bytes):
        with pytest.raises(UndecodableImage, match=reason) as caught:
            function(data)
        assert len(caught.value.reason) <= 120


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_no_cut_through_an_image_does_worse_than_a_named_reason():
    for data in (CASES["rgb png"], CASES["progressive jpeg"], CASES["16-bit tiff"], CASES["gif"]):
        for end in range(1, len(data), 37):
            try:
                kept, _, pixels = stored_bytes(data[:end])
            except UndecodableImage:
                continue
            assert np.array_equal(decode(kept), pixels)


def test_real_blood_cells_keep_their_coded_pixels(shared_dir):
    with tarfile.open(shared_dir / "data" / "bccd_cells.tar") as tar:
        members = [m for m in tar if m.name.endswith(".jpg")][:100]
        for member in members:
            data = tar.extractfile(member).read()
            kept, ending, _ = stored_bytes(data)
            assert ending == "jpg"
            assert len(kept) <= len(data) + 18
            assert np.array_equal(decode(kept), decode(data))
