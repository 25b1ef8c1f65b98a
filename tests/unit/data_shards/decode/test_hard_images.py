"""Images as cameras, scanners and image editors really write them: each has the right pixels, or a true reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_shards.decode import UndecodableImage, decode, stored_bytes

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
SMOOTH = np.asarray(Image.fromarray(RGB[:4, :6]).resize((60, 40), Image.Resampling.BICUBIC))
ALPHA = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
GREY16, RGB16 = GREY.astype(np.uint16) * 257, RGB.astype(np.uint16) * 257
BITS = GREY > 127


def saved(pixels, format, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tiff(strips, bits, *, photometric=1, samples=1, order="<", **tags):
    """A 30 x 20 TIFF of uncompressed strips, of kinds that Pillow does not write. Tags: `t339=2`."""
    entries = {
        256: [30], 257: [20], 258: [bits] * samples, 259: [1], 262: [photometric], 273: [0] * len(strips),
        277: [samples], 278: [20], 279: [len(strip) for strip in strips],
        **{int(tag[1:]): value if isinstance(value, list) else [value] for tag, value in tags.items()},
    }  # fmt: skip
    apart = 8 + 2 + 12 * len(entries) + 4
    sizes = {tag: 4 * len(values) if len(values) > 1 else 0 for tag, values in entries.items()}
    at = apart + sum(sizes.values())
    entries[273] = [at + sum(map(len, strips[:i])) for i in range(len(strips))]
    directory, values_apart = struct.pack(f"{order}H", len(entries)), b""
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        place = packed if len(values) == 1 else struct.pack(f"{order}I", apart + len(values_apart))
        values_apart += packed if len(values) > 1 else b""
        directory += struct.pack(f"{order}HHI", tag, 4, len(values)) + place
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}I", 8) + directory + bytes(4) + values_apart + b"".join(strips)


def png(rows, depth, colour_type, *chunks, width=30, height=20):
    """A PNG of kinds that Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    middle = b"".join(chunk(kind, data) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + middle + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def rows(pixels):
    return [row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels]


def over_black(pixels, alpha):
    alpha = alpha if pixels.ndim == 2 else alpha[..., None]
    return np.rint(pixels.astype(float) * alpha / 255).astype(np.uint8)


def without(pixels):
    """The pixels with black where they are as in the first corner."""
    corner = pixels[0, 0]
    same = pixels == corner if pixels.ndim == 2 else (pixels == corner).all(axis=2, keepdims=True)
    return np.where(same, 0, pixels)


def packed_12(values):
    pairs = values.reshape(-1, 2).astype(int)
    return np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)


PALETTE = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
PALETTE_ALPHA = np.concatenate([[0, 128, 77], np.full(253, 255)])
EXACT = {
    "16-bit tiff": (saved(GREY16, "TIFF"), GREY),
    "16-bit tiff of the other byte order": (tiff([GREY16.astype(">u2").tobytes()], 16, order=">"), GREY),
    "16-bit tiff, 0 is white": (tiff([GREY16.tobytes()], 16, photometric=0), 255 - GREY),
    "8-bit tiff, 0 is white": (tiff([GREY.tobytes()], 8, photometric=0), 255 - GREY),
    "12-bit tiff": (tiff([packed_12(GREY16 >> 4).astype(np.uint8).tobytes()], 12), GREY),
    "16-bit rgb tiff": (tiff([RGB16.tobytes()], 16, photometric=2, samples=3), RGB),
    "rgb tiff in planes": (
        tiff([RGB[..., i].tobytes() for i in range(3)], 8, photometric=2, samples=3, t284=2), RGB
    ),
    "rgb tiff with a spare sample": (
        tiff([np.dstack([RGB, ALPHA]).tobytes()], 8, photometric=2, samples=4, t338=0), RGB
    ),
    "grey tiff with alpha": (
        tiff([np.dstack([GREY, ALPHA]).tobytes()], 8, samples=2, t338=2), over_black(GREY, ALPHA)
    ),
    "cmyk tiff": (saved(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB),
    "1-bit tiff, 0 is white": (tiff([np.packbits(BITS, axis=1).tobytes()], 1, photometric=0), ~BITS * np.uint8(255)),
    "fax tiff": (saved(BITS, "TIFF", compression="group4"), BITS * np.uint8(255)),
    "16-bit png": (png(rows(GREY16), 16, 0), GREY),
    "16-bit rgb png": (png(rows(RGB16), 16, 2), RGB),
    "16-bit png with alpha": (
        png(rows(np.dstack([GREY16, ALPHA.astype(np.uint16) * 257])), 16, 4), over_black(GREY, ALPHA)
    ),
    "16-bit rgb png with alpha": (
        png(rows(np.dstack([RGB16, ALPHA.astype(np.uint16) * 257])), 16, 6), over_black(RGB, ALPHA)
    ),
    "16-bit png with a clear grey": (
        png(rows(GREY16), 16, 0, (b"tRNS", struct.pack(">H", int(GREY16[0, 0])))), without(GREY)
    ),
    "png with a clear grey": (
        png(rows(GREY), 8, 0, (b"tRNS", struct.pack(">H", int(GREY[0, 0])))), without(GREY)
    ),
    "png with a clear colour": (
        png(rows(RGB), 8, 2, (b"tRNS", struct.pack(">3H", *RGB[0, 0].tolist()))),
        without(RGB),
    ),
    "png palette with transparency": (
        png(rows(GREY), 8, 3, (b"PLTE", PALETTE.tobytes()), (b"tRNS", bytes([0, 128, 77]))),
        over_black(PALETTE[GREY], PALETTE_ALPHA[GREY]),
    ),
    "1-bit png": (png([np.packbits(row).tobytes() for row in BITS], 1, 0), BITS * np.uint8(255)),
    "png without its end": (png(rows(GREY), 8, 0)[:-12], GREY),
    "pgm of 12 bits": (b"P5 30 20 4095\n" + (GREY16 >> 4).astype(">u2").tobytes(), GREY),
    "ppm of 16 bits": (b"P6 30 20 65535\n" + RGB16.astype(">u2").tobytes(), RGB),
    "16-bit jpeg 2000": (saved(GREY16, "JPEG2000"), GREY),
    "jpeg 2000 with alpha": (saved(np.dstack([RGB, np.full_like(GREY, 255)]), "JPEG2000"), RGB),
    "gif with a clear colour": (
        saved(Image.fromarray(GREY), "GIF", transparency=int(GREY[0, 0])), without(GREY)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "pixels"), EXACT.values(), ids=EXACT)
def test_every_lossless_format_keeps_its_pixels(data, pixels):
    found = decode(data)
    if found.shape[2] == 3 and pixels.ndim == 2:  # palettes of greys come as RGB
        pixels = np.dstack([pixels] * 3)
    assert np.array_equal(found, pixels if pixels.ndim == 3 else pixels[:, :, None])
    assert np.array_equal(decode(stored_bytes(data)[0]), found)


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_all_eight_orientations_come_out_upright_in_every_format(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = UPRIGHT[orientation](RGB)
    for data in (
        saved(RGB, "PNG", exif=exif),
        saved(RGB, "WEBP", lossless=True, exif=exif),
        saved(RGB, "TIFF", tiffinfo={0x0112: orientation}),
        saved(RGB, "TIFF", tiffinfo={0x0112: orientation}, compression="tiff_lzw"),
    ):
        assert np.array_equal(decode(data), upright)
        assert np.array_equal(decode(stored_bytes(data)[0]), upright)
    jpeg = decode(saved(RGB, "JPEG", quality=100, subsampling=0, exif=exif))
    assert np.abs(jpeg.astype(int) - upright).max() <= 5
    deep = saved(GREY16, "PNG", exif=exif)
    assert np.array_equal(decode(deep)[:, :, 0], UPRIGHT[orientation](GREY))


def cmyk(planes, transform):
    """A JPEG of four planes as they are, that says with Adobe's marker how they are meant."""
    data = saved(Image.frombytes("CMYK", (60, 40), (255 - planes).tobytes()), "JPEG", quality=100, subsampling=0)
    at = data.index(b"Adobe") + 11
    return data[:at] + bytes([transform]) + data[at + 1 :]


def test_the_inverted_inks_of_adobe_are_put_right():
    no_black = np.full(SMOOTH.shape[:2], 255, np.uint8)
    # Adobe writes inks inverted, so cyan as red; as YCCK, it takes that for the inverse of the red to be coded.
    as_cmyk = cmyk(np.dstack([SMOOTH, no_black]), 0)
    as_ycck = cmyk(np.dstack([np.asarray(Image.fromarray(255 - SMOOTH).convert("YCbCr")), no_black]), 2)
    for data in (as_cmyk, as_ycck):
        assert np.abs(decode(data).astype(int) - SMOOTH).max() <= 6
        kept, ending, _ = stored_bytes(data)
        assert ending == "png"
        assert np.array_equal(decode(kept), decode(data))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0junk", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_costs_no_image(exif):
    data = saved(SMOOTH, "JPEG", exif=exif)
    assert np.array_equal(decode(data), decode(saved(SMOOTH, "JPEG")))


@pytest.mark.parametrize("junk", [b"x", b"\0" * 1000, b"\xff\xd8\xff\xe0" * 9, b"\xff\xd9"])
def test_bytes_behind_the_end_of_a_jpeg_are_cut_off(junk):
    data = saved(SMOOTH, "JPEG")
    kept, ending, _ = stored_bytes(data + junk)
    assert ending == "jpg"
    assert kept.count(b"\xff\xd9") == 1
    assert kept.endswith(b"\xff\xd9")
    assert np.array_equal(decode(kept), decode(data))


BOMB = zlib.compress(bytes(80 << 20), 9)
REFUSED = {
    "signed 8-bit tiff": (tiff([GREY.tobytes()], 8, t339=2), "signed pixels"),
    "signed 16-bit tiff": (tiff([(GREY16 >> 1).tobytes()], 16, t339=2), "signed pixels"),
    "32-bit tiff": (tiff([GREY16.astype("<u4").tobytes()], 32), "32-bit pixels"),
    "float tiff": (saved(GREY.astype(np.float32), "TIFF"), "floating-point pixels"),
    "float map": (b"Pf\n30 20\n-1.0\n" + GREY.astype("<f4").tobytes(), "floating-point pixels"),
    "16-bit tiff of the other byte order, 0 is white": (
        tiff([GREY16.astype(">u2").tobytes()], 16, photometric=0, order=">"), "a damaged TIFF, or of a kind"
    ),
    "two pages": (saved(GREY, "TIFF", save_all=True, append_images=[Image.fromarray(GREY)]), "2 frames in one file"),
    "animated png": (saved(RGB, "PNG", save_all=True, append_images=[Image.fromarray(RGB[::-1])]), "2 frames"),
    "animated webp": (saved(RGB, "WEBP", save_all=True, append_images=[Image.fromarray(RGB[::-1])]), "2 frames"),
    "animated gif": (saved(GREY, "GIF", save_all=True, append_images=[Image.fromarray(GREY[::-1])]), "2 frames"),
    "text that inflates": (png(rows(GREY), 8, 0, (b"zTXt", b"a\0\0" + BOMB)), "too large"),
    "profile that inflates": (png(rows(GREY), 8, 0, (b"iCCP", b"a\0\0" + BOMB)), "too large"),
    "pixels that inflate": (png([], 1, 0, width=100_000, height=100_000), "10000000000 pixels|100000 x 100000 pixels"),
    "a side that is too long": (png([bytes(1)] * 70_000, 1, 0, width=1, height=70_000), "1 x 70000 pixels: a side"),
    "one byte of a png changed": (png(rows(GREY), 8, 0).replace(b"IDAT", b"IDAU"), "."),
    "no width": (png([b""] * 20, 8, 0, width=0), "a damaged PNG"),
    "empty": (b"", "empty file"),
    "one byte": (b"\x89", "not an image of a known format"),
    "signature only": (b"\x89PNG\r\n\x1a\n", "a damaged PNG"),
    "dicom": (bytes(128) + b"DICM" + bytes(99), "a DICOM file, which is read in image sets only"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(99), "HEIC, which is not read: save it as PNG"),
    "unknown": (bytes(range(7, 99)) * 9, "not an image of a known format"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_shown_right_is_refused_with_true_reason(data, reason):
    for function in (decode, stored_bytes):
        with pytest.raises(UndecodableImage, match=reason) as caught:
            function(data)
        assert len(caught.value.reason) <= 120
