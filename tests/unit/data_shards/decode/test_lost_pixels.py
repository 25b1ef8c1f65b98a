"""Damaged files: what lost pixels is refused, what lost none is kept and named, in every format."""

import io
import itertools
import logging
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile
from tiny_sets import InMemorySet

from data_shards.config import DataConfig
from data_shards.convert import convert
from data_shards.decode import UndecodableImage, decode, stored
from data_shards.decode.jpeg import Segment, examine, segments_of
from data_shards.duplicates.fingerprint import fingerprint
from data_shards.source import Row
from data_shards.store import open_store

RNG = np.random.default_rng(0)
SMALL = Image.fromarray(RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8))
NOISY = np.asarray(SMALL.resize((160, 120), Image.Resampling.BICUBIC)).astype(int) + RNG.normal(0, 4, (120, 160, 3))
IMAGE = Image.fromarray(np.clip(NOISY, 0, 255).astype(np.uint8))
END = b"\xff\xd9"


def saved(format, mode="RGB", **options):
    buffer = io.BytesIO()
    IMAGE.convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def joined(segments, end=END):
    return b"\xff\xd8" + b"".join(each.coded() for each in segments) + end


JPEG = saved("JPEG")
PROGRESSIVE = saved("JPEG", progressive=True)
RESTARTS = saved("JPEG", restart_marker_blocks=4)
SCANS = [match.start() for match in re.finditer(b"\xff\xda", PROGRESSIVE)]
SCAN = JPEG.index(b"\xff\xda")
HALF = (SCAN + len(JPEG)) // 2
GREY_JPEG = saved("JPEG", "L")


def flat(factors=((1, 1),) * 3, *, frame=0xC0, before=b""):
    """A JPEG of 64 x 64 grey pixels whose colours are coded at any size: each block is "as before, and flat"."""
    tables = [each for each in segments_of(JPEG).found if each.marker in (0xDB, 0xC4)]
    mcus = -(-64 // (8 * max(w for w, _ in factors))) * -(-64 // (8 * max(h for _, h in factors)))
    bits = "".join(("001010" if i == 0 else "0000") * (w * h) for i, (w, h) in enumerate(factors)) * mcus
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    ids = range(1, len(factors) + 1)
    kinds = b"".join(bytes([i, w << 4 | h, min(i - 1, 1)]) for i, (w, h) in zip(ids, factors, strict=True))
    header = struct.pack(">BHHB", 8, 64, 64, len(factors)) + kinds
    order = bytes([len(factors), *itertools.chain(*((i, 0x11 * min(i - 1, 1)) for i in ids)), 0, 63, 0])
    return joined([*tables, Segment(frame, header), Segment(0xDA, order, scan)]).replace(
        b"\xff\xd8", b"\xff\xd8" + before, 1
    )


def adobe(transform):
    return Segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform])).coded()


def arithmetic(seed):
    """A JPEG with random arithmetic codes."""
    codes = np.random.default_rng(seed).bytes(4000).replace(b"\xff", b"\xfe")
    return joined([s._replace(scan=codes) if s.marker == 0xDA else s for s in segments_of(flat(frame=0xC9)).found])


# libjpeg's warnings (jerror.h), by name; JWRN_TOO_MUCH_DATA is for programs that write more rows than there are.
KEPT = {
    "JWRN_JPEG_EOF, only the end marker": (JPEG[:-2], JPEG, "no end marker"),
    "JWRN_JPEG_EOF, half of the end marker": (JPEG[:-1], JPEG, "no end marker"),
    "JWRN_JPEG_EOF, progressive": (PROGRESSIVE[:-2], PROGRESSIVE, "no end marker"),
    "JWRN_JPEG_EOF, restarts": (RESTARTS[:-2], RESTARTS, "no end marker"),
    "JWRN_JPEG_EOF, zeros instead of the end marker": (JPEG[:-2] + bytes(2), JPEG, "no end marker"),
    "JWRN_EXTRANEOUS_DATA, before a table": (JPEG[:20] + b"\0\1\2" + JPEG[20:], JPEG, "stray bytes"),
    "JWRN_EXTRANEOUS_DATA, before the scan": (JPEG[:SCAN] + b"junk" * 9 + JPEG[SCAN:], JPEG, "stray bytes"),
    "JWRN_EXTRANEOUS_DATA, zeros before the end": (JPEG[:-2] + bytes(50) + END, JPEG, "stray bytes"),
    "JWRN_EXTRANEOUS_DATA, text before the end": (JPEG[:-2] + b"filled by a camera" + END, JPEG, "stray bytes"),
    "JWRN_EXTRANEOUS_DATA, zeros between scans": (
        PROGRESSIVE[: SCANS[3]] + bytes(30) + PROGRESSIVE[SCANS[3] :], PROGRESSIVE, "stray bytes"
    ),
    "JWRN_JFIF_MAJOR": (
        JPEG.replace(b"JFIF\0\1\1", b"JFIF\0\7\1"), JPEG, "unknown JFIF revision number 7.01"
    ),
    "JWRN_NOT_SEQUENTIAL": (
        JPEG[: SCAN + 11] + b"\0\0\0" + JPEG[SCAN + 14 :], JPEG, "Invalid SOS parameters for sequential JPEG"
    ),
    "JWRN_ADOBE_XFORM": (flat(before=adobe(5)), flat(), "Unknown Adobe color transform code 5"),
    "JWRN_BOGUS_ICC": (JPEG[:20] + Segment(0xE2, b"ICC_PROFILE\0\7\1junk").coded() + JPEG[20:], JPEG, "bad ICC marker"),
    "several at once": (
        (JPEG[:20] + b"\0\1" + JPEG[20:-2]).replace(b"JFIF\0\1\1", b"JFIF\0\7\1"), JPEG, "no end marker"
    ),
    "bytes behind the end": (JPEG + b"more" * 9, JPEG, ""),
    "colours of an unusual size": (
        flat([(4, 2), (1, 1), (1, 1)]), flat([(4, 2), (1, 1), (1, 1)]),
        "unusual colour subsampling, for which it cannot be checked whether pixels are lost",
    ),
}  # fmt: skip
LOST = {
    "JWRN_JPEG_EOF, cut in the middle": (JPEG[:HALF], "truncated JPEG, pixels are lost"),
    "JWRN_JPEG_EOF, cut before its last byte": (JPEG[:-3], "truncated JPEG, pixels are lost"),
    "JWRN_HIT_MARKER, half and an end marker": (JPEG[:HALF] + END, "premature end of data segment"),
    "JWRN_HIT_MARKER, zeros inside": (JPEG[:HALF] + bytes(500) + JPEG[HALF + 500 :], "premature end of data segment"),
    "JWRN_HIT_MARKER, grey": (GREY_JPEG[: len(GREY_JPEG) * 2 // 3] + END, "premature end of data segment"),
    "JWRN_HIT_MARKER, behind a harmless one": (
        JPEG.replace(b"JFIF\0\1\1", b"JFIF\0\7\1")[:HALF] + END, "premature end of data segment"
    ),
    "half of it zeros": (JPEG[:HALF] + bytes(len(JPEG) - HALF), "zero bytes are in place of its end"),
    "the end marker and some bytes zeros": (JPEG[:-6] + bytes(6), "zero bytes are in place of its end"),
    "zeros that give as many blocks": (JPEG[:HALF] + bytes(64) + JPEG[HALF + 64 :], "zero bytes|extraneous|premature"),
    "zeros in a quantization table": (JPEG[:40] + bytes(8) + JPEG[48:], "zeros in a quantization table"),
    "zeros in a Huffman table": (JPEG[: SCAN - 70] + bytes(50) + JPEG[SCAN - 20 :], "zero bytes in a Huffman table"),
    "JWRN_HUFF_BAD_CODE": (
        RESTARTS.replace(RESTARTS[HALF : HALF + 40], b"\xff\0" * 20), "bad Huffman code|extraneous|found marker"
    ),
    "JWRN_ARITH_BAD_CODE": (arithmetic(4), "bad arithmetic code|extraneous"),
    "JWRN_MUST_RESYNC": (RESTARTS.replace(b"\xff\xd3", b"\xff\xd5", 1), "found marker 0xd5 instead of RST3"),
    "JWRN_EXTRANEOUS_DATA, blocks left over": (
        JPEG[:-2] + JPEG[SCAN + 100 : SCAN + 200].replace(b"\xff", b"\xfe") + END, "extraneous bytes before marker 0xd9"
    ),
    "JWRN_BOGUS_PROGRESSION": (
        joined([each for i, each in enumerate(segments_of(PROGRESSIVE).found) if i != 8]),
        "Inconsistent progression sequence for component 0"
    ),
    "progressive, the last scans gone": (PROGRESSIVE[: SCANS[4]] + END, "not all of its scans are there"),
    "progressive, half and an end marker": (
        PROGRESSIVE[: len(PROGRESSIVE) // 2] + END, "not all of its scans are there|premature"
    ),
    "progressive, cut in the middle": (PROGRESSIVE[: len(PROGRESSIVE) // 2], "truncated JPEG"),
    "a restart interval gone": (
        re.sub(rb"\xff\xd3.*?(?=\xff\xd4)", b"", RESTARTS, count=1, flags=re.DOTALL), "pixels are lost"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "good", "flaw"), KEPT.values(), ids=KEPT)
def test_a_jpeg_that_lost_no_pixel_is_kept_with_a_note(data, good, flaw):
    found = stored(data)
    assert found.flaw == flaw
    assert np.array_equal(found.pixels, decode(good))
    assert np.array_equal(decode(found.data), decode(good))


@pytest.mark.parametrize(("data", "reason"), LOST.values(), ids=LOST)
def test_a_jpeg_that_lost_pixels_is_refused(data, reason):
    assert Image.open(io.BytesIO(data)).size  # it is known as a JPEG
    for function in (decode, stored):
        with pytest.raises(UndecodableImage, match=reason) as caught:
            function(data)
        assert len(caught.value.reason) <= 120


def test_every_good_jpeg_is_taken_as_it_is():
    for options in (
        {}, {"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": "4:1:1"}, {"subsampling": "4:2:2"},
        {"subsampling": 0, "optimize": True}, {"quality": 5}, {"keep_rgb": True}, {"exif": b"Exif\0\0" + JPEG},
    ):  # fmt: skip
        for mode in ("RGB", "L", "CMYK"):
            if mode == "RGB" or not options.keys() & {"keep_rgb", "subsampling"}:
                data = saved("JPEG", mode, **options)
                assert examine(data) == (data, "")
    preview = saved("MPO", save_all=True, append_images=[IMAGE])
    assert examine(preview) == (preview, "")


def pixels_of(size):
    slope = np.add.outer(np.arange(size), np.arange(size)) % 256
    return np.clip(slope + np.random.default_rng(0).integers(0, 9, (size, size)), 0, 255).astype(np.uint8)


def encoded(pixels, mode, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_a_jpeg_check_ends_at_more_stray_bytes_than_a_scan_has():
    data = encoded(pixels_of(224), "RGB", progressive=True)
    assert _is_refused(data[:607] + bytes(64) + data[671:])


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_check_with_zeros_ends_and_refuses_zeros_in_scans(mode, progressive):
    data = encoded(pixels_of(224), mode, progressive=progressive)
    rng = np.random.default_rng(1)
    for num in (8, 64, 256, 1024) * 40:
        start = int(rng.integers(2, len(data) - num))
        refused = _is_refused(data[:start] + bytes(num) + data[start + num :])
        if num >= 256 and start > data.index(b"\xff\xda") + 14:
            assert refused, (num, start)


def _is_refused(data):
    try:
        examine(data)
    except UndecodableImage:
        return True
    return False


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_good_jpeg_of_flat_areas_is_not_mistaken_for_zeros(mode):
    """Their code is full of zero bytes, or nearly so."""
    y, x = np.mgrid[:256, :256]
    noise = np.random.default_rng(2).integers(0, 256, (256, 256))
    grating = 128 + 100 * np.cos(2 * np.pi * (x + 0.5) / 8)
    images = [
        0 * x, 0 * x + 127, 0 * x + 255, x, y, 255 - x, 255 - (x + y) // 2, noise,
        np.where(abs(x - 128) < 60, noise, 0), grating, 255 - grating, np.tile(noise[:8, :8], (32, 32)),
        (x // 8 + y // 8) % 2 * 255, (x + y) % 2 * 255,
    ]  # fmt: skip
    # Its progressive code has a run of zero bytes that are further bits of many blocks, without codes.
    images.append(128 + 9 * np.cos(2 * np.pi * np.mgrid[:512, :512][0] / 5))
    num_zero_runs = 0
    for pixels in images:
        for quality in (10, 50, 95):
            for options in ({}, {"optimize": True}, {"progressive": True}):
                data = encoded(pixels, mode, quality=quality, **options)
                assert examine(data) == (data, "")
                num_zero_runs += bytes(48) in data
    assert num_zero_runs > 10


def test_an_old_shards_image_with_lost_pixels_is_still_shown():
    with pytest.raises(UndecodableImage):
        decode(LOST["JWRN_HIT_MARKER, zeros inside"][0])
    assert decode(LOST["JWRN_HIT_MARKER, zeros inside"][0], examined=True).shape == (120, 160, 3)


# --- the other formats

FORMATS = {
    "png": saved("PNG"), "png, not deflated": saved("PNG", compress_level=0), "png grey": saved("PNG", "L"),
    "png palette": saved("PNG", "P"), "tiff": saved("TIFF"), "tiff lzw": saved("TIFF", compression="tiff_lzw"),
    "tiff deflate": saved("TIFF", compression="tiff_adobe_deflate"),
    "tiff packbits": saved("TIFF", compression="packbits"), "tiff jpeg": saved("TIFF", compression="jpeg"),
    "tiff fax": saved("TIFF", "1", compression="group4"), "bmp": saved("BMP"), "gif": saved("GIF", "P"),
    "webp": saved("WEBP"), "webp lossless": saved("WEBP", lossless=True), "ppm": saved("PPM"),
    "jpeg 2000": saved("JPEG2000"), "jpeg 2000 codestream": saved("JPEG2000", no_jp2=True),
    "jpeg 2000 lossy": saved("JPEG2000", irreversible=True, quality_mode="rates", quality_layers=[20]),
}  # fmt: skip
PLAIN = ("tiff", "bmp", "ppm")


def same_or_refused(data, good):
    try:
        assert np.array_equal(decode(data), good)
    except UndecodableImage:
        return False
    return True


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_file_has_all_its_pixels_or_is_refused(name):
    data = FORMATS[name]
    good, ends = decode(data), [len(data) * i // 10 for i in range(1, 10)]
    assert not any(same_or_refused(data[:end], good) for end in ends)
    for missing in (1, 2, 4, 12, 13, 20):
        same_or_refused(data[: len(data) - missing], good)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in PLAIN])
def test_zeros_in_coded_pixels_of_any_format_are_refused(name):
    data = FORMATS[name]
    good = decode(data)
    for share in (0.3, 0.5, 0.8):
        at = int(len(data) * share)
        for num in (512, len(data) - at):
            assert not same_or_refused(data[:at] + bytes(min(num, len(data) - at)) + data[at + num :], good)


def test_single_color_images_have_no_zeros_that_look_like_damage():
    for colour in ("black", "white"):
        for mode in ("RGB", "L", "1"):
            image = Image.new("RGB", (900, 700), colour).convert(mode)
            for format, options in (
                ("WEBP", {}), ("WEBP", {"lossless": True}), ("JPEG2000", {}), ("JPEG2000", {"tile_size": (128, 128)}),
                ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "packbits"}), ("JPEG", {}),
                ("TIFF", {"compression": "group4" if mode == "1" else "tiff_adobe_deflate"}), ("PNG", {}),
            ):  # fmt: skip
                if not (mode == "1" and format in ("JPEG2000", "WEBP")):
                    buffer = io.BytesIO()
                    image.save(buffer, format, **options)
                    assert decode(buffer.getvalue()).shape[:2] == (700, 900)


def chunks(data, change):
    """A PNG with `change` made to the bytes, checksum included, of its first chunk of pixels."""
    at = data.index(b"IDAT") - 4
    end = at + 12 + struct.unpack_from(">I", data, at)[0]
    return data[:at] + change(data[at:end]) + data[end:]


def test_a_png_with_a_bad_checksum_is_kept_if_its_pixels_hold():
    good = saved("PNG", compress_level=0)
    found = stored(chunks(good, lambda chunk: chunk[:-1] + bytes([chunk[-1] ^ 1])))
    assert found.flaw == "a wrong checksum of a chunk"
    assert np.array_equal(found.pixels, np.asarray(IMAGE))
    assert stored(found.data).flaw == ""
    with pytest.raises(UndecodableImage, match=r"pixels are lost|data stream"):
        stored(chunks(good, lambda chunk: chunk[:5000] + bytes([chunk[5000] ^ 1]) + chunk[5001:]))
    assert stored(good[:-12]).flaw == "no end marker"


def with_pixels(data, inflated):
    """A PNG with other pixel data and right checksums."""
    at, coded = data.index(b"IDAT") - 4, zlib.compress(inflated)
    chunk = struct.pack(">I", len(coded)) + b"IDAT" + coded + struct.pack(">I", zlib.crc32(b"IDAT" + coded))
    return data[:at] + chunk + data[-12:]


def test_a_png_with_missing_rows_is_refused_a_black_end_is_not():
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(IMAGE))
    assert np.array_equal(decode(with_pixels(saved("PNG"), rows)), np.asarray(IMAGE))
    for share in (2, 3, 100):
        with pytest.raises(UndecodableImage, match=r"fewer rows than it says|is truncated"):
            decode(with_pixels(saved("PNG"), rows[: len(rows) - len(rows) // share]))
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16"):
        buffer = io.BytesIO()
        Image.new(mode, (33, 17)).save(buffer, "PNG")
        assert not decode(buffer.getvalue()).any()


def test_an_interlaced_png_needs_all_of_its_passes():
    data = bytearray(saved("PNG", "L"))
    data[28] = 1
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    size = sum(
        -(-(120 - top) // down) * (1 + -(-(160 - left) // across))
        for left, top, across, down in (
            (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)
        )
    )  # fmt: skip
    assert decode(with_pixels(bytes(data), bytes(size))).shape == (120, 160, 1)
    for missing in (1, 161, size // 2):
        with pytest.raises(UndecodableImage, match=r"fewer rows than it says|is truncated"):
            decode(with_pixels(bytes(data), bytes(size - missing)))


@pytest.mark.parametrize("change", ["one strip of two", "a strip at 0"])
def test_a_tiff_without_some_of_its_strips_is_refused(change):
    data = saved("TIFF", "L")
    image = Image.open(io.BytesIO(data))
    offset = image.tag_v2[273][0]
    tag, value = (278, 60) if change == "one strip of two" else (273, 0)
    there = struct.pack("<I", 120 if tag == 278 else offset)
    place = next(
        found.start()
        for found in re.finditer(re.escape(struct.pack("<H", tag)), data)
        if data[found.start() + 8 : found.start() + 12] == there
    )
    data = data[: place + 8] + struct.pack("<I", value) + data[place + 12 :]
    with pytest.raises(UndecodableImage, match=r"damaged TIFF, pixels are lost: [01] of [12] parts"):
        decode(data)


def test_a_jpeg_2000_without_its_end_marker_is_kept():
    data = FORMATS["jpeg 2000 codestream"]
    found = stored(data[:-2])
    assert found.flaw == "no end marker"
    assert np.array_equal(found.pixels, decode(data))


def test_pillow_does_not_fill_up_truncated_files():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


# --- conversion


def image_set(images):
    rows = [Row(f"{i:03d}", 0, (i % 2,), None, None) for i in range(len(images))]
    return InMemorySet(rows, {row.where: data for row, data in zip(rows, images, strict=True)})


def test_the_scan_and_the_shards_refuse_the_same_images():
    damaged = [data for data, _ in LOST.values()] + [data for data, _, _ in KEPT.values()]
    images = image_set(damaged)
    state = fingerprint(images, images.rows).state
    assert (state == 0).tolist() == [True] * len(LOST) + [False] * len(KEPT)


def test_a_conversion_quarantines_only_images_with_lost_pixels(tmp_path, caplog):
    for i in range(40):
        (folder := tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        pixels.save(buffer, "JPEG")
        data = buffer.getvalue()
        data = {3: data[:-2], 5: data[:-2], 8: data[:20] + b"\0" + data[20:], 11: data[:700] + END}.get(i, data)
        (folder / f"{i}.jpg").write_bytes(data)
    config = DataConfig(dataset="x", layout="folders", source=str(tmp_path / "set"), max_quarantine=0.1)
    with caplog.at_level(logging.WARNING):
        facts = convert(config, open_store(str(tmp_path / "store")))
    assert (facts["num_images"], facts["quarantine"]) == (39, 1)
    assert "3 images are damaged but lost no pixels and are kept: no end marker (2); stray bytes (1)" in caplog.text
    assert "b/11.jpg (damaged JPEG, pixels are lost: premature end of data segment)" in caplog.text
