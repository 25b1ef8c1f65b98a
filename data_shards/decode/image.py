"""Source image -> uint8 pixels, gray or RGB, or UndecodableImage; and the encoded bytes that a shard stores.

Transparent pixels are blended with black. 12- and 16-bit gray maps its full range to 8 bits, so images stay comparable;
signed, wider and floating-point pixels have no such range and are refused. EXIF orientation is applied; color profiles
are ignored.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_shards.decode.foreign import kind_of
from data_shards.decode.lost_pixels import examine
from data_shards.decode.undecodable import UndecodableImage

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
# Decoding takes at least 4 bytes per pixel; no single medical photograph has nearly this many.
MAX_PIXELS = 100_000_000
# The limit of JPEG and DICOM. A damaged JPEG 2000 of 219 bytes, 15 pixels wide and half a million high, took 350 MB.
MAX_SIDE = 65_535
_ORIENTATION = 0x0112
# Tags of a TIFF.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2
_SIGNATURES = {
    b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"BM": "BMP", b"GIF8": "GIF",
}  # fmt: skip
# What Pillow raises on damaged files. One bad image must not stop a conversion.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Stored(NamedTuple):
    """An image as stored in a shard."""

    data: bytes
    ending: str
    """png or jpg."""
    pixels: np.ndarray
    flaw: str
    """Damage of the source that lost no pixels; "" if undamaged."""


def decode(data: bytes | np.ndarray, *, max_side: int | None = None, examined: bool = False) -> np.ndarray:
    """The pixels, uint8 (H, W, 1) or (H, W, 3), shrunk so that no side exceeds `max_side`. Raises UndecodableImage.

    A damaged file that lost pixels is refused, even if its decoder fills them in. Images from shards were `examined`
    when written and are not checked again.
    """
    return _decoded(data, max_side, examined)[0]


def _decoded(data: bytes | np.ndarray, max_side: int | None, examined: bool) -> tuple[np.ndarray, str]:
    """The pixels, and any damage of the file that lost no pixels."""
    if isinstance(data, np.ndarray):
        plain = _plain(data)
        if max_side is None or max(plain.shape[:2]) <= max_side:
            return plain[:, :, None] if plain.ndim == 2 else plain, ""
        return _pixels(_shrunk(Image.fromarray(plain), max_side)), ""
    image, flaw = _opened(data), ""
    try:
        if not examined:
            complete, flaw = examine(data, image)
            image = image if complete is data else _opened(complete)
        pixels = _pixels(_shrunk(_gray_or_rgb(ImageOps.exif_transpose(image), image), max_side))
        # Pillow opens a PNG with 16-bit gray and alpha (byte 25 is 4) as RGBA.
        is_gray = image.format == "PNG" and data[25] == 4
        return np.ascontiguousarray(pixels[:, :, :1]) if is_gray else pixels, flaw
    except UndecodableImage:
        raise
    except _DAMAGE as error:
        raise UndecodableImage(_short(error)) from error


def stored_bytes(data: bytes | np.ndarray, *, max_side: int | None = None) -> tuple[bytes, str, np.ndarray]:
    """An image as stored in a shard: encoded bytes without metadata, their ending ("png" or "jpg"), and its pixels.

    Like `stored`, without the flaw.
    """
    return stored(data, max_side=max_side)[:3]


def stored(data: bytes | np.ndarray, *, max_side: int | None = None) -> Stored:
    """An image as stored in a shard. The same data gives the same bytes. Raises UndecodableImage.

    8-bit gray and RGB keep their encoded pixels as JPEG or PNG, with metadata removed; the result is decoded and
    compared with the source's pixels. All other images, including rotated and shrunk ones, become PNG.
    """
    pixels, flaw = _decoded(data, max_side, False)
    # A PNG with a flaw has wrong checksums, so other decoders would refuse it.
    if isinstance(data, bytes) and not (flaw and data.startswith(b"\x89PNG")):
        kept = _without_metadata(data, pixels.shape)
        if kept is not None and np.array_equal(decode(kept[0], examined=True), pixels):
            return Stored(*kept, pixels, flaw)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return Stored(buffer.getvalue(), "png", pixels, flaw)


def _plain(array: np.ndarray) -> np.ndarray:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or not array.size:
        raise UndecodableImage(f"array of {array.dtype} {array.shape}, not uint8 (H, W) or (H, W, 3)")
    return np.ascontiguousarray(array)


def _opened(data: bytes) -> Image.Image:
    """The opened image. UndecodableImage if it is too large or has several frames."""
    if not data:
        raise UndecodableImage("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        frames = getattr(image, "n_frames", 1)
    except UnidentifiedImageError as error:
        raise UndecodableImage(_unknown(data)) from error
    except _DAMAGE as error:
        # A text may begin like a BMP. PNM images (P...) are text too.
        raise UndecodableImage(("" if data[:1] == b"P" else kind_of(data)) or _short(error)) from error
    if image.width * image.height > MAX_PIXELS:
        raise UndecodableImage(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
    if max(image.size) > MAX_SIDE:
        raise UndecodableImage(f"{image.width} x {image.height} pixels: a side may have {MAX_SIDE:,}")
    # A camera's JPEG may contain a preview as second image (MPO); animations and stacks are refused.
    if frames > 1 and image.format != "MPO":
        raise UndecodableImage(f"{frames} frames in one file")
    return image


def _unknown(data: bytes) -> str:
    if data[128:132] == b"DICM":
        return "a DICOM file, which is read in image sets only"
    if kind := kind_of(data):
        return kind
    for signature, name in _SIGNATURES.items():
        if data.startswith(signature):
            return f"a damaged {name}, or of a kind that is not supported"
    return _headless_dicom(data) or "not an image of a known format"


def _headless_dicom(data: bytes) -> str:
    from data_shards.decode.dicom.header import first_element  # lazy: that package imports this module

    headless = first_element(io.BytesIO(data)) is not None
    return "a DICOM file without its preamble, which is read in image sets only" if headless else ""


def _gray_or_rgb(image: Image.Image, source: Image.Image) -> Image.Image:
    """The upright image in mode L or RGB; `source` is the opened file with its tags."""
    image.load()
    tags = getattr(source, "tag_v2", {})
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise UndecodableImage("signed pixels")
    if image.mode == "F":
        raise UndecodableImage("floating-point pixels")
    if image.mode.startswith("I"):
        bits = tags.get(_BITS, (16,))[0]
        if bits > 16:
            raise UndecodableImage(f"{bits}-bit pixels")
        gray = _from_16_bits(np.asarray(image), bits)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts only up to 8 bits
            gray = 255 - gray
        if isinstance(clear := image.info.get("transparency"), int):
            gray[np.asarray(image) == clear] = 0
        return Image.fromarray(gray)
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        black = Image.new(image.mode, image.size, (*(0,) * (len(image.mode) - 1), 255))
        image = Image.alpha_composite(black, image) if image.mode == "RGBA" else _over_black(image)
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")


def _over_black(image: Image.Image) -> Image.Image:
    gray, alpha = (np.asarray(band, np.float32) for band in image.split())
    return Image.fromarray(np.rint(gray * alpha / 255).astype(np.uint8))


def _from_16_bits(values: np.ndarray, bits: int) -> np.ndarray:
    most = (1 << bits) - 1
    if values.min() < 0 or values.max() > most:
        raise UndecodableImage(f"pixels from {values.min()} to {values.max()} are not {bits}-bit grey")
    # By table: dividing each pixel would take eight bytes of memory per pixel.
    table = np.rint(np.arange(most + 1) * (255 / most)).astype(np.uint8)
    pixels: np.ndarray = table[values]
    return pixels


def _shrunk(image: Image.Image, max_side: int | None) -> Image.Image:
    if max_side is None or max(image.size) <= max_side:
        return image
    scale = max_side / max(image.size)
    return image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _without_metadata(data: bytes, shape: tuple[int, ...]) -> tuple[bytes, str] | None:
    """The file without metadata; None if it must be encoded again (rotated, shrunk, or another format)."""
    image = _opened(data)
    same_size = (image.height, image.width) == shape[:2]
    if not same_size or image.mode not in ("L", "RGB") or image.getexif().get(_ORIENTATION, 1) != 1:
        return None
    if image.format in ("JPEG", "MPO"):
        return (cut, "jpg") if (cut := _bare_jpeg(data)) else None
    # Byte 24 of a PNG is its bit depth: 16-bit RGB also opens as RGB.
    if image.format == "PNG" and data[24] == 8 and "transparency" not in image.info:
        return (cut, "png") if (cut := _bare_png(data)) else None
    return None


def _bare_png(data: bytes) -> bytes | None:
    """Signature, IHDR, IDAT and IEND of a PNG, without trailing bytes."""
    kept, position = [data[:8]], 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, end = data[position + 4 : position + 8], position + 12 + length
        if kind in (b"IHDR", b"IDAT", b"IEND"):
            kept.append(data[position:end])
        if kind == b"IEND":
            return b"".join(kept)
        position = end
    return None


def _bare_jpeg(data: bytes) -> bytes | None:
    """A JPEG's tables and scans (ITU T.81, annex B), plus the two markers that give the color encoding."""
    kept, position = [data[:2]], 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0xD9:
            return b"".join([*kept, data[position : position + 2]])
        end = position + 2 + struct.unpack_from(">H", data, position + 2)[0]
        if marker == 0xDA:
            end = _end_of_scan(data, end)
        if marker == 0xE0 and data[position + 4 : position + 9] == b"JFIF\0":
            kept.append(b"\xff\xe0\x00\x10JFIF\0\x01\x01\x00\x00\x01\x00\x01\x00\x00")  # square pixels, no thumbnail
        else:
            adobe = marker == 0xEE and data[position + 4 : position + 9] == b"Adobe"
            if adobe or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
                kept.append(data[position:end])
        position = end
    # Pillow also reads files without an end marker.
    return b"".join([*kept, b"\xff\xd9"]) if data[position : position + 2] in (b"", b"\xff\xd9") else None


def _end_of_scan(data: bytes, position: int) -> int:
    """End of the entropy-coded data from `position`: the next marker except stuffing and restarts."""
    while (position := data.find(b"\xff", position)) >= 0:
        following = data[position + 1 : position + 2]
        if following and following != b"\0" and not b"\xd0" <= following <= b"\xd7" and following != b"\xff":
            return position
        position += 1
    return len(data)
