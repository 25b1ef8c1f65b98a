"""Reads a DICOM file up to its pixels: the requested elements, and the location of the pixels."""

from __future__ import annotations

import io
import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from data_shards.decode.undecodable import UndecodableImage

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

UNDEFINED_LENGTH = 0xFFFFFFFF
# Files without preamble begin with their first element. One extracted by hand from a complete file may begin with the
# padding byte of the element before it, like pydicom's no_meta.dcm.
_FIRST_ELEMENT = re.compile(
    rb"\x02\0[\0-\x18]\0(?:UL|OB|UI)|[\0 ]?(?=\x08\0[\0-\xff]\0(?:AE|CS|DA|DT|LO|PN|SH|TM|UI|UL))"
    rb"|\0\x08\0[\0-\xff](?:AE|CS|DA|DT|LO|PN|SH|TM|UI|UL)|\x08\0[\0-\xff]\0[\0-\xff][\0-\3]\0\0",
    re.DOTALL,
)
# Limit for inflating a deflated file.
_MAX_INFLATED = 1 << 30
_PIXELS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}


@dataclass(frozen=True)
class Opened:
    """The requested elements, and the location of the pixels in `file`: `length` bytes from `at`."""

    file: BinaryIO
    data: Dataset
    syntax: str
    element: str  # PixelData, FloatPixelData or DoubleFloatPixelData; "" without pixels
    vr: str
    at: int
    length: int


def first_element(file: BinaryIO) -> int | None:
    """Offset of the first element; None if `file` is not DICOM. Rewinds `file`."""
    file.seek(0)
    head = file.read(132)
    file.seek(0)
    if head[128:] == b"DICM":
        return 132
    match = _FIRST_ELEMENT.match(head)
    # A match of one byte is a padding byte: elements match by lookahead or are longer.
    return None if match is None else match.end() if match.end() < 2 else 0


def opened(file: BinaryIO, elements: tuple[str, ...]) -> Opened:
    """Reads the listed elements from the header of a DICOM file.

    Raises UndecodableImage or, on damage, any error of pydicom.
    """
    from pydicom.filereader import read_dataset
    from pydicom.tag import Tag
    from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

    file.seek(first_element(file) or 0)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    syntax = str(meta.get("TransferSyntaxUID") or "") or _guessed_syntax(file)
    if syntax == DeflatedExplicitVRLittleEndian:
        file = io.BytesIO(_inflated(file.read()))
    pixels: list[tuple[str, str, int, int]] = []

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        if tag in _PIXELS:
            pixels.append((_PIXELS[tag], vr or "OW", file.tell(), length))
        return tag in _PIXELS

    data = read_dataset(
        file,
        syntax == ImplicitVRLittleEndian,
        syntax != ExplicitVRBigEndian,
        stop_when=at_pixels,
        specific_tags=[Tag(element) for element in elements],
    )
    return Opened(file, data, syntax, *(pixels[-1] if pixels else ("", "", 0, 0)))


def number(data: Dataset, element: str, default: int | None = None) -> int:
    """The integer value of an element; UndecodableImage if it is not an integer, or missing without a default."""
    value = data.get(element)
    if value is None and default is not None:
        return default
    if not isinstance(value, int):
        raise UndecodableImage(f"{element} is {'missing' if value is None else 'no whole number'}")
    return int(value)


def num_frames_there(opened: Opened) -> int:
    """The number of frames; 1 if the file is too small for the claimed number (reading it refuses it)."""
    claimed = number(opened.data, "NumberOfFrames", 1)
    if claimed <= 1 or not opened.element:
        return 1
    size = opened.file.seek(0, io.SEEK_END) - opened.at
    # A compressed frame needs an 8-byte item header and at least one byte, a bit mask at least one bit.
    least = claimed * 9 if opened.length == UNDEFINED_LENGTH else claimed / 8
    return claimed if least <= min(size, opened.length) else 1


def _guessed_syntax(file: BinaryIO) -> str:
    """The transfer syntax of the elements from here on, guessed from the first; never a compressed one."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    head = file.read(6)
    file.seek(-len(head), io.SEEK_CUR)
    if not head[4:].isalpha():
        return ImplicitVRLittleEndian
    return ExplicitVRBigEndian if head[0] == 0 else ExplicitVRLittleEndian


def _inflated(data: bytes) -> bytes:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflate.decompress(data, _MAX_INFLATED)
    if inflate.unconsumed_tail:
        raise UndecodableImage(f"deflated to more than {_MAX_INFLATED >> 20} MiB")
    if not inflate.eof:
        raise UndecodableImage("the deflated elements are cut short")
    return inflated
