"""Stored values of one frame, decompressed and checked against the header."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    JPEG2000TransferSyntaxes,
    RLELossless,
    UID_dictionary,
)

from data_shards.decode.dicom.codestream import check_jpeg, check_jpeg2000, complete
from data_shards.decode.dicom.header import UNDEFINED_LENGTH, Opened, num_frames_there, number
from data_shards.decode.image import MAX_PIXELS
from data_shards.decode.undecodable import UndecodableImage


@dataclass(frozen=True)
class Layout:
    """Layout of a file's pixels. The values are consistent with each other, but not yet checked against the bytes."""

    rows: int
    columns: int
    samples: int
    planar: int
    interpretation: str
    allocated: int  # bits
    stored: int  # bits
    signed: int
    frames: int
    native: bool  # not compressed
    little_endian: bool


def layout_of(opened: Opened) -> Layout:
    """The layout of a file's pixels. UndecodableImage if it has none or of an unsupported kind."""
    data = opened.data
    if not opened.element:
        kind = str(data.get("SOPClassUID") or "")
        if "Rows" in data:
            raise UndecodableImage("the file ends before its pixels")
        raise UndecodableImage(f"no pixels: {UID(kind).name if kind in UID_dictionary else 'no image'}")
    try:
        native = get_decoder(opened.syntax).is_native
    except NotImplementedError:
        known = opened.syntax in UID_dictionary
        name = UID(opened.syntax).name if known else "of no known name"
        raise UndecodableImage(f"transfer syntax {name}: not supported") from None
    floats = opened.element != "PixelData"
    allocated = number(data, "BitsAllocated", 32 if opened.element == "FloatPixelData" else 64 if floats else None)
    layout = Layout(
        rows=number(data, "Rows"),
        columns=number(data, "Columns"),
        samples=number(data, "SamplesPerPixel"),
        planar=number(data, "PlanarConfiguration", 0),
        interpretation=str(data.get("PhotometricInterpretation") or "").strip().upper(),
        allocated=allocated,
        stored=allocated if floats else number(data, "BitsStored"),
        signed=0 if floats else number(data, "PixelRepresentation"),
        frames=number(data, "NumberOfFrames", 1) or 1,
        native=native,
        little_endian=opened.syntax != ExplicitVRBigEndian,
    )
    _check(layout, floats, high_bit=number(data, "HighBit", layout.stored - 1))
    return layout


def _check(layout: Layout, floats: bool, high_bit: int) -> None:
    samples = {
        "MONOCHROME1": 1, "MONOCHROME2": 1, "PALETTE COLOR": 1,
        "RGB": 3, "YBR_FULL": 3, "YBR_FULL_422": 3, "YBR_ICT": 3, "YBR_RCT": 3,
    }.get(layout.interpretation)  # fmt: skip
    if samples is None:
        # Not quoted: in a damaged header the text may be anything.
        raise UndecodableImage("PhotometricInterpretation is missing, or none that is supported")
    if samples != layout.samples:
        raise UndecodableImage(f"SamplesPerPixel is {layout.samples}, but {layout.interpretation} has {samples}")
    if not (0 < layout.rows < 1 << 16 and 0 < layout.columns < 1 << 16 and layout.frames > 0):
        raise UndecodableImage(f"{layout.frames} frames of {layout.columns} x {layout.rows} pixels")
    if layout.rows * layout.columns > MAX_PIXELS:
        raise UndecodableImage(f"{layout.columns} x {layout.rows} pixels are more than {MAX_PIXELS:,}")
    widths = (32, 64) if floats else (1, 8, 16, 32) if layout.native else (8, 16, 32)
    if layout.allocated not in widths or not 1 <= layout.stored <= layout.allocated or layout.signed not in (0, 1):
        raise UndecodableImage(f"{layout.stored} bits stored in {layout.allocated} allocated: not supported")
    if layout.native and not floats and high_bit != layout.stored - 1:
        raise UndecodableImage(f"HighBit is {high_bit}, not {layout.stored - 1} as {layout.stored} bits stored need")
    if layout.samples == 3 and (layout.signed or layout.planar not in (0, 1) or layout.allocated not in (8, 16)):
        raise UndecodableImage(f"colours of {layout.allocated} bits, planar {layout.planar}, signed {layout.signed}")
    if layout.interpretation.startswith("YBR_FULL") and layout.allocated != 8:
        raise UndecodableImage(f"{layout.interpretation} of {layout.allocated} bits")
    if layout.native and layout.interpretation in ("YBR_ICT", "YBR_RCT"):
        raise UndecodableImage(f"{layout.interpretation}, which only JPEG 2000 has, in uncompressed pixels")


def stored_values(opened: Opened, layout: Layout, index: int) -> np.ndarray:
    """Stored values (rows, columns) of a frame, or (rows, columns, 3) RGB; UndecodableImage if incomplete.

    Reads only the bytes of this frame.
    """
    stored = (_native if layout.native else _compressed)(opened, layout, index)
    shape = (layout.rows, layout.columns, *((3,) if layout.samples == 3 else ()))
    if stored.shape != shape:
        raise UndecodableImage(f"pixels of shape {stored.shape}, but the header says {shape}")
    return np.ascontiguousarray(stored, stored.dtype.newbyteorder("="))


def _native(opened: Opened, layout: Layout, index: int) -> np.ndarray:
    if opened.length == UNDEFINED_LENGTH:
        raise UndecodableImage("compressed pixels, but the file says that they are not, or not how")
    bits = layout.rows * layout.columns * layout.samples * layout.allocated
    if layout.interpretation == "YBR_FULL_422":
        bits = bits * 2 // 3
    expected = -(-bits * layout.frames // 8)
    if opened.length not in (expected, expected + expected % 2):
        raise UndecodableImage(f"{opened.length} bytes of pixels, but the header says {expected}")
    first, last = bits * index // 8, -(-bits * (index + 1) // 8)
    if not layout.little_endian and layout.allocated == 8 and opened.vr == "OW":
        coded = _swapped(opened, first, last)
    else:
        coded = _read(opened, first, last)
    if layout.allocated > 1:
        return _decoded(opened, layout, coded, layout.interpretation)
    unpacked = np.unpackbits(np.frombuffer(coded, np.uint8), bitorder="little")
    shift = bits * index % 8
    return unpacked[shift : shift + bits].reshape(layout.rows, layout.columns)


def _read(opened: Opened, first: int, last: int) -> bytes:
    opened.file.seek(opened.at + first)
    return _CompleteReads(opened.file).read(last - first)


class _CompleteReads:
    """A file whose short reads raise UndecodableImage: pydicom would accept half a fragment."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int = -1, /) -> bytes:
        data = self._read(size)
        if len(data) < size:
            raise UndecodableImage(f"the file ends {size - len(data)} bytes before the end of the frame")
        return data


def _swapped(opened: Opened, first: int, last: int) -> bytes:
    """Bytes that were written as big-endian words, so pairs are swapped, even across frames."""
    begin, end = first - first % 2, last + last % 2
    pairs = np.frombuffer(_read(opened, begin, end), np.uint16).byteswap()
    return pairs.tobytes()[first - begin : last - begin]


def _compressed(opened: Opened, layout: Layout, index: int) -> np.ndarray:

    if opened.length != UNDEFINED_LENGTH:
        raise UndecodableImage("uncompressed pixels, but the file says that they are compressed")
    codestream = complete(_codestream(opened, layout, index), opened.syntax)
    interpretation, shape = layout.interpretation, (layout.rows, layout.columns, layout.samples)
    if opened.syntax in JPEG2000TransferSyntaxes:
        interpretation = check_jpeg2000(codestream, shape, interpretation)
    elif opened.syntax != RLELossless:
        interpretation = check_jpeg(codestream, shape, interpretation)
    coded = encapsulate([codestream])
    # RLE does not store its number of rows, and the decoder drops extra ones silently.
    taller = replace(layout, rows=layout.rows + 1)
    if opened.syntax == RLELossless and _decompressed(opened, taller, coded, interpretation) is not None:
        raise UndecodableImage(f"more pixels in the frame than the {layout.rows} rows of the header")
    stored = _decompressed(opened, layout, coded, interpretation)
    if stored is None:
        raise UndecodableImage(f"{UID(opened.syntax).name} pixels that cannot be decoded")
    return stored


def _decompressed(opened: Opened, layout: Layout, coded: bytes, interpretation: str) -> np.ndarray | None:
    try:
        return _decoded(opened, layout, coded, interpretation)
    except UndecodableImage:
        raise
    except BaseException as error:  # a panic of pylibjpeg-rle, in Rust, is not an Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            return None
        raise


def _codestream(opened: Opened, layout: Layout, index: int) -> bytes:
    """The bytes of one compressed frame, with fragments joined."""

    if num_frames_there(opened) != layout.frames:
        raise UndecodableImage(f"{layout.frames} frames do not fit into the file")
    file, data = opened.file, opened.data
    file.seek(opened.at)
    head = file.read(8)
    # The offset table has one 4-byte entry per frame, or none.
    table = struct.unpack("<4xL", head)[0] // 4 if len(head) == 8 else 0
    extended = None
    if "ExtendedOffsetTable" in data:
        extended = (data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths)
        table = len(extended[0]) // 8
    if table not in (0, layout.frames):
        raise UndecodableImage(f"{table} frames in the pixels, but the header says {layout.frames}")
    file.seek(opened.at)
    try:
        codestream = get_frame(_CompleteReads(file), index, number_of_frames=layout.frames, extended_offsets=extended)
    except UndecodableImage:
        raise
    except (ValueError, struct.error) as error:
        raise UndecodableImage("the fragments of compressed pixels are damaged or too few") from error
    if not codestream:
        raise UndecodableImage("the frame is empty")
    return codestream


def _decoded(opened: Opened, layout: Layout, pixels: bytes, interpretation: str) -> np.ndarray:
    """One frame decoded by pydicom, with YBR converted to RGB."""
    decoder = get_decoder(opened.syntax)
    if not layout.native and "pylibjpeg" not in decoder.available_plugins:
        raise UndecodableImage(f"{decoder.UID.name} pixels, which need all of the extra dicom")
    options: dict[str, Any] = {
        "rows": layout.rows,
        "columns": layout.columns,
        "samples_per_pixel": layout.samples,
        "planar_configuration": layout.planar,
        "photometric_interpretation": interpretation,
        "bits_allocated": layout.allocated,
        "bits_stored": layout.stored,
        "pixel_representation": layout.signed,
        "number_of_frames": 1,
        "pixel_keyword": opened.element,
        "pixel_vr": "OB" if layout.allocated == 8 else opened.vr,
    }
    # Always the same decoder, so that bytes do not depend on which packages are installed.
    plugin = "" if layout.native else "pylibjpeg"
    return decoder.as_array(pixels, index=0, decoding_plugin=plugin, **options)[0]
