"""Checks a JPEG, JPEG-LS or JPEG 2000 codestream in a DICOM file against the file's header.

Decoders trust the codestream: without this check, one of 60,000 x 60,000 pixels would be allocated although the header
says 64 x 64, one of 1 x 1 would fill the image, and a truncated one would be filled with gray.
"""

from __future__ import annotations

import struct

from pydicom.uid import JPEG2000TransferSyntaxes, JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSTransferSyntaxes

from data_shards.decode import jpeg
from data_shards.decode.lost_pixels import examine_jpeg2000, refuse_zeros
from data_shards.decode.undecodable import UndecodableImage

Shape = tuple[int, int, int]
"""Rows, columns and samples per pixel."""
_END = b"\xff\xd9"
_NO_SIZE = {0xC4, 0xC8, 0xCC}  # the markers between C0 and CF that do not begin a frame


def complete(codestream: bytes, syntax: str) -> bytes:
    """The codestream with an end mark; UndecodableImage if pixels are lost, which decoders fill in silently.

    Lossless and 12-bit JPEG cannot be checked.
    """

    if syntax in JPEG2000TransferSyntaxes:
        return examine_jpeg2000(codestream)[0]
    if syntax in JPEGLSTransferSyntaxes:
        refuse_zeros("JPEG-LS", codestream)
    if syntax in (JPEGBaseline8Bit, JPEGExtended12Bit) and _bits_of(codestream) == 8:
        return jpeg.examine(codestream)[0]
    return codestream


def _bits_of(codestream: bytes) -> int:
    frames = (each for each in jpeg.segments_of(codestream).found if _begins_frame(each.marker))
    return next((each.parameters[0] for each in frames if each.parameters), 0)


def check_jpeg(codestream: bytes, shape: Shape, interpretation: str) -> str:
    """The color space of a JPEG or JPEG-LS codestream; UndecodableImage unless it is one complete image.

    Only a marker is certain (component ids R, G, B; Adobe; JFIF); without one the header decides.
    """
    if not codestream.startswith(b"\xff\xd8"):
        raise UndecodableImage("no JPEG in the frame")
    position, certain = 2, ""
    try:
        while not _begins_frame(marker := _marker(codestream, position)):
            if marker == 0xFF:  # fill byte
                position += 1
                continue
            (length,) = struct.unpack_from(">H", codestream, position + 2)
            segment = codestream[position + 4 : position + 2 + length]
            if marker == 0xEE and segment.startswith(b"Adobe") and len(segment) >= 12:
                certain = ("RGB", "YBR_FULL")[min(segment[11], 1)]
            elif marker == 0xE0 and segment.startswith(b"JFIF\0") and not certain:
                certain = "YBR_FULL"
            position += 2 + length
        rows, columns, samples = struct.unpack_from(">HHB", codestream, position + 5)
        ids = codestream[position + 10 : position + 10 + 3 * samples : 3]
    except (struct.error, IndexError):
        raise UndecodableImage("the JPEG in the frame is damaged") from None
    _check_shape("JPEG", (rows, columns, samples), shape)
    end = codestream.find(_END, position)
    if end < 0:
        raise UndecodableImage("the JPEG in the frame is cut short")
    if codestream.find(b"\xff\xd8\xff", end) >= 0:
        raise UndecodableImage("more than one JPEG in the frame")
    if samples == 1:
        return interpretation
    if ids.upper() == b"RGB":
        certain = "RGB"
    return certain or interpretation


def check_jpeg2000(codestream: bytes, shape: Shape, interpretation: str) -> str:
    """The color space of a decoded JPEG 2000 codestream; UndecodableImage unless it is one complete image."""
    begin = codestream.find(b"\xff\x4f\xff\x51")
    if begin < 0:
        raise UndecodableImage("no JPEG 2000 in the frame")
    try:
        width, height, left, top = struct.unpack_from(">4L", codestream, begin + 8)
        (samples,) = struct.unpack_from(">H", codestream, begin + 40)
        color_transform = _color_transform(codestream, begin + 2)
    except struct.error:
        raise UndecodableImage("the JPEG 2000 in the frame is damaged") from None
    _check_shape("JPEG 2000", (height - top, width - left, samples), shape)
    if codestream.find(_END, begin) < 0:
        raise UndecodableImage("the JPEG 2000 in the frame is cut short")
    if color_transform and interpretation.startswith("YBR_FULL"):
        raise UndecodableImage(f"JPEG 2000 with a colour transform of its own, but the header says {interpretation}")
    return "RGB" if interpretation in ("YBR_ICT", "YBR_RCT") else interpretation


def _marker(codestream: bytes, position: int) -> int:
    if codestream[position] != 0xFF:
        raise UndecodableImage("the JPEG in the frame is damaged")
    return codestream[position + 1]


def _begins_frame(marker: int) -> bool:
    return marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in _NO_SIZE)


def _color_transform(codestream: bytes, position: int) -> bool:
    """Whether the COD segment of the main header, whose segments start at `position`, has a color transform."""
    while (marker := codestream[position : position + 2]) != b"\xff\x52":
        if marker[:1] != b"\xff" or marker == b"\xff\x90":
            raise UndecodableImage("the JPEG 2000 in the frame is damaged")
        position += 2 + struct.unpack_from(">H", codestream, position + 2)[0]
    return bool(struct.unpack_from("B", codestream, position + 8)[0])


def _check_shape(kind: str, found: Shape, wanted: Shape) -> None:
    if found != wanted:
        says = " x ".join(map(str, found))
        raise UndecodableImage(f"{kind} of {says}, but the header says {' x '.join(map(str, wanted))}")
