"""Detects files with lost pixels that a decoder fills in silently, as far as each format allows.

PNG has checksums, which Pillow does not verify for pixels. TIFF may lack strips, and its deflated, run-length and JPEG
parts can be checked. WebP and JPEG 2000 have no checksum: only a long run of zero bytes, left by a disk or a download,
is certainly not their code. Uncompressed pixels, LZW and fax codes cannot be checked.
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_shards.decode import jpeg
from data_shards.decode.undecodable import UndecodableImage

_CHUNK_BYTES = 1 << 20
# TIFF tags.
_WIDTH, _HEIGHT = 256, 257
_COMPRESSION, _STRIPS, _STRIP_BYTES, _ROWS_PER_STRIP, _SAMPLES, _PLANAR = 259, 273, 279, 278, 277, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _BITS, _JPEG_TABLES = 322, 323, 324, 325, 258, 347
_PLAIN, _JPEG, _DEFLATE, _PACKBITS = 1, 7, (8, 32946), 32773
_CODED = (4, 5)  # fax without fill bits, and LZW, which codes runs of equal values with growing codes
# Measured on images of one color, with borders and of noise: JPEG 2000 and lossless WebP had at most 10 zero bytes in a
# row, lossy WebP one per 10,000 black pixels.
_ZEROS = re.compile(rb"\0{65,}")
_PIXELS_PER_ZERO = 4096
# First column and row of each pass of an interlaced PNG, and the step between columns and rows.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def examine(data: bytes, image: Image.Image) -> tuple[bytes, str]:
    """The file as its decoder accepts it, and any damage that lost no pixels ("" if undamaged).

    `image` is the opened file. Raises UndecodableImage if pixels are lost.
    """
    if image.format in ("JPEG", "MPO"):
        return jpeg.examine(data)
    if image.format == "PNG":
        _require_all_rows(data, image)
        return data, _examine_png(data)
    if image.format == "TIFF":
        _examine_tiff(data, image)
    elif image.format == "WEBP":
        for coded, lossy in _webp_pixels(data):
            _refuse_zeros("WebP", coded, image.width * image.height // _PIXELS_PER_ZERO if lossy else 0)
    elif image.format == "JPEG2000":
        return examine_jpeg2000(data)
    return data, ""


def examine_jpeg2000(data: bytes) -> tuple[bytes, str]:
    """Like `examine`, for a JPEG 2000 file or codestream. Adds a missing end mark, which OpenJPEG needs."""
    end = data.rfind(b"\xff\xd9")
    _refuse_zeros("JPEG 2000", data[max(0, data.find(b"\xff\x93")) : end if end >= 0 else len(data)], 0)
    if end >= 0:
        return data, ""
    return data + b"\xff\xd9", "no end marker"


def refuse_zeros(what: str, coded: bytes) -> None:
    """UndecodableImage if encoded pixels have a long run of zero bytes, which no image gives."""
    _refuse_zeros(what, coded, 0)


def _refuse_zeros(what: str, coded: bytes, more: int) -> None:
    for found in _ZEROS.finditer(coded):
        num = found.end() - found.start()
        if num > 64 + more:
            raise UndecodableImage(f"damaged {what}, pixels are lost: {num:,} zero bytes in its coded pixels")


def _require_all_rows(data: bytes, image: Image.Image) -> None:
    """UndecodableImage if the pixels end early: Pillow leaves missing ones at 0, so the last row is 0."""
    image.load()
    width, height, bits, colors = struct.unpack_from(">IIBB", data, 16)
    interlaced = data[28] == 1
    if not interlaced and np.asarray(image.crop((0, image.height - 1, image.width, image.height))).any():
        return
    bits_of_pixel = bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colors]
    expected = 0
    for left, top, across, down in _ADAM7 if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        expected += max(rows, 0) * (1 + -(-columns * bits_of_pixel // 8)) if columns > 0 else 0
    if _inflated_bytes(b"".join(part for _, part in _png_pixels(data))) < expected:
        raise UndecodableImage("truncated PNG, pixels are lost: it has fewer rows than it says")


def _png_pixels(data: bytes) -> Iterator[tuple[int, memoryview]]:
    """Position and data of each chunk of pixels."""
    position = 8
    while position + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        if data[position + 4 : position + 8] == b"IDAT":
            yield position, memoryview(data)[position + 8 : position + 8 + length]
        position += 12 + length


def _examine_png(data: bytes) -> str:
    parts, wrong = [], False
    for position, part in _png_pixels(data):
        end = position + 12 + struct.unpack_from(">I", data, position)[0]
        if end > len(data):  # missing rows have been refused already
            return "no end marker"
        parts.append(part)
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        wrong |= zlib.crc32(memoryview(data)[position + 4 : end - 4]) != checksum
    if wrong:
        return _examine_inflated(parts)
    return "" if data.rfind(b"IEND") >= 0 else "no end marker"


def _examine_inflated(parts: Sequence[memoryview]) -> str:
    """For a chunk with a wrong checksum: the pixels are intact if the zlib checksum after them is right."""
    if not _inflates(b"".join(parts)):
        raise UndecodableImage("damaged PNG, pixels are lost: the checksum of its pixels is wrong")
    return "a wrong checksum of a chunk"


def _inflates(coded: bytes) -> bool:
    """Whether zlib data are complete and have the right checksum."""
    inflate = zlib.decompressobj()
    try:
        while coded and not inflate.eof:
            inflate.decompress(coded, _CHUNK_BYTES)
            coded = inflate.unconsumed_tail
    except zlib.error:
        return False
    return inflate.eof


def _inflated_bytes(coded: bytes) -> int:
    """Inflated size of zlib data in bytes, up to the first damage."""
    inflate, num = zlib.decompressobj(), 0
    with contextlib.suppress(zlib.error):
        while coded and not inflate.eof:
            num += len(inflate.decompress(coded, _CHUNK_BYTES))
            coded = inflate.unconsumed_tail
    return num


def _examine_tiff(data: bytes, image: Any) -> None:
    tags = image.tag_v2
    places, sizes = (_TILES, _TILE_BYTES) if _TILES in tags else (_STRIPS, _STRIP_BYTES)
    offsets, lengths = tags.get(places, ()), tags.get(sizes, ())
    expected = _num_parts(tags)
    if len(offsets) < expected or 0 in offsets[:expected]:
        there = sum(offset > 0 for offset in offsets)
        raise UndecodableImage(f"damaged TIFF, pixels are lost: {there} of {expected} parts of the image are there")
    compression = tags.get(_COMPRESSION, _PLAIN)
    for i, (offset, length) in enumerate(zip(offsets, lengths, strict=False)):
        part = data[offset : offset + length]
        if compression in _DEFLATE and not _inflates(part):
            raise UndecodableImage("damaged TIFF, pixels are lost: a part of the image does not inflate")
        if compression == _PACKBITS and _unpacked_bytes(part) != _part_bytes(tags, i):
            raise UndecodableImage("damaged TIFF, pixels are lost: a part of the image does not unpack")
        if compression in _CODED:
            _refuse_zeros("TIFF", part, 0)
        if compression == _JPEG:
            jpeg.examine(bytes(tags[_JPEG_TABLES])[:-2] + part[2:] if _JPEG_TABLES in tags else part)


def _num_parts(tags: Any) -> int:
    # Not the image's own size, which Pillow swaps for rotated images.
    width: int = tags[_WIDTH]
    height: int = tags[_HEIGHT]
    planes: int = tags.get(_SAMPLES, 1) if tags.get(_PLANAR, 1) == 2 else 1
    if _TILES in tags:
        tile_width: int = tags[_TILE_WIDTH]
        tile_height: int = tags[_TILE_HEIGHT]
        return planes * -(-width // tile_width) * -(-height // tile_height)
    rows: int = tags.get(_ROWS_PER_STRIP, height)
    return planes * -(-height // max(1, min(rows, height)))


def _part_bytes(tags: Any, index: int) -> int:
    """Uncompressed bytes of a strip or tile."""
    bits: tuple[int, ...] = tags.get(_BITS, (1,))
    bits_of_pixel: int = (
        bits[0] if tags.get(_PLANAR, 1) == 2 else sum(bits) if len(bits) > 1 else bits[0] * tags.get(_SAMPLES, 1)
    )
    if _TILES in tags:
        tile_width: int = tags[_TILE_WIDTH]
        tile_height: int = tags[_TILE_HEIGHT]
        return -(-tile_width * bits_of_pixel // 8) * tile_height
    width: int = tags[_WIDTH]
    height: int = tags[_HEIGHT]
    rows: int = max(1, min(tags.get(_ROWS_PER_STRIP, height), height))
    first = index % -(-height // rows) * rows
    return -(-width * bits_of_pixel // 8) * min(rows, height - first)


def _unpacked_bytes(packed: bytes) -> int:
    """Unpacked size of run-length data (PackBits) in bytes; -1 if they end in the middle of a run."""
    position = unpacked = 0
    while position < len(packed):
        count = packed[position]
        position += 1 + (count + 1 if count < 128 else count > 128)
        unpacked += count + 1 if count < 128 else 257 - count if count > 128 else 0
    return unpacked if position == len(packed) else -1


def _webp_pixels(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """The encoded pixels of a WebP file without alpha, and whether they are lossy."""
    position = 12
    while position + 8 <= len(data):
        kind, (length,) = data[position : position + 4], struct.unpack_from("<I", data, position + 4)
        if kind in (b"VP8 ", b"VP8L"):
            yield data[position + 8 : position + 8 + length], kind == b"VP8 "
        position += 8 + length + length % 2
