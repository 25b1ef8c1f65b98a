"""Lookup tables in DICOM headers: values to values, and values to colors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.decode.undecodable import UndecodableImage

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def pointwise(shown: Callable[[np.ndarray, np.ndarray], np.ndarray], stored: np.ndarray) -> np.ndarray:
    """Applies `shown(values, present)` to every pixel; `present` marks the values that occur.

    For up to 16 bits it is computed once per possible value, which is much cheaper than per pixel.
    """
    if stored.dtype.itemsize > 2:
        return shown(stored, np.ones(stored.shape, bool))
    index = stored.view(f"u{stored.dtype.itemsize}")
    values = np.arange(1 << 8 * stored.dtype.itemsize).astype(index.dtype).view(stored.dtype)
    present = np.zeros(len(values), bool)
    present[index] = True
    table = shown(values, present)
    pixels: np.ndarray = table[index]
    return pixels


def palette(stored: np.ndarray, data: Dataset, *, little_endian: bool) -> np.ndarray:
    """RGB uint8 (H, W, 3) from palette indices (H, W)."""

    def colored(values: np.ndarray, present: np.ndarray) -> np.ndarray:
        return _colored(values, data, little_endian)

    if stored.dtype.itemsize > 2:
        raise UndecodableImage(f"palette indices of {stored.dtype.itemsize * 8} bits")
    return pointwise(colored, stored)


def lookup_table(item: Dataset, little_endian: bool, *, signed: bool) -> tuple[int, np.ndarray, int]:
    """(first mapped value, entries, bits per entry) of a modality or VOI LUT."""
    size, first, bits = _descriptor(item, "LUTDescriptor", signed)
    table = _entries(item.LUTData, size, little_endian)
    if not 8 <= bits <= 16:
        raise UndecodableImage(f"a lookup table with entries of {bits} bits")
    return first, table, bits


def _descriptor(item: Dataset, element: str, signed: bool) -> tuple[int, int, int]:
    """(number of entries, first mapped value, bits per entry); the first value is signed if stored values are."""
    size, first, bits = (int(value) for value in item[element].value)
    if signed and first >= 1 << 15:
        first -= 1 << 16
    return size % (1 << 16) or 1 << 16, first, bits


def _entries(data: Any, size: int, little_endian: bool) -> np.ndarray:
    """A table's entries, stored as numbers, as words, or (8 bits) as bytes with padding."""
    if not isinstance(data, bytes):
        entries = np.array(data, np.int64, ndmin=1)
    elif len(data) == 2 * size:
        entries = np.frombuffer(data, "<u2" if little_endian else ">u2")
    elif len(data) in (size, size + size % 2) and little_endian:
        entries = np.frombuffer(data[:size], np.uint8)
    else:
        entries = np.empty(0, np.int64)
    if len(entries) != size or entries.min() < 0:
        raise UndecodableImage(f"a lookup table that does not hold the {size} entries it claims")
    return entries


def places(values: np.ndarray, first: int, size: int) -> np.ndarray:
    """Positions in a table; values outside it get its first or last entry."""
    return np.clip(np.rint(values - np.float64(first)), 0, size - 1).astype(np.int64)


def _colored(values: np.ndarray, data: Dataset, little_endian: bool) -> np.ndarray:
    bands = [_band(values, data, name, little_endian) for name in ("Red", "Green", "Blue")]
    return np.stack(bands, axis=-1)


def _band(values: np.ndarray, data: Dataset, name: str, little_endian: bool) -> np.ndarray:
    signed = bool(data.get("PixelRepresentation"))
    size, first, bits = _descriptor(data, f"{name}PaletteColorLookupTableDescriptor", signed)
    if bits not in (8, 16):
        raise UndecodableImage(f"a palette with entries of {bits} bits")
    segmented = data.get(f"Segmented{name}PaletteColorLookupTableData")
    if segmented is not None:
        entries = _unfolded(segmented, size, bits, little_endian)
    else:
        entries = _entries(data[f"{name}PaletteColorLookupTableData"].value, size, little_endian)
    if bits == 16:
        if 0 < entries.max() < 1 << 8:
            raise UndecodableImage("a palette of 16 bits that holds 8-bit colours")
        # Writers scale 8-bit colors as v << 8 or as v * 257; the shift inverts both.
        entries = entries >> 8
    if entries.max() >= 1 << 8:
        raise UndecodableImage("a palette of 8 bits that holds larger ones")
    band: np.ndarray = entries.astype(np.uint8)[places(values, first, size)]
    return band


def _unfolded(data: bytes, size: int, bits: int, little_endian: bool) -> np.ndarray:
    """The entries of a segmented table (PS3.3 C.7.9.2) with discrete and linear segments."""
    words = np.frombuffer(data, np.uint8 if bits == 8 else "<u2" if little_endian else ">u2").tolist()
    entries: list[int] = []
    at = 0
    while at + 2 < len(words) and len(entries) < size:
        kind, length, value = words[at : at + 3]
        if kind == 0:
            entries += words[at + 2 : at + 2 + length]
            at += 2 + length
        elif kind == 1 and entries:
            entries += np.rint(np.linspace(entries[-1], value, length + 1))[1:].astype(int).tolist()
            at += 3
        else:
            raise UndecodableImage("a segmented palette with other than discrete and linear segments: not supported")
    if len(entries) != size:
        raise UndecodableImage(f"a segmented palette that does not hold the {size} entries it claims")
    return np.array(entries, np.uint8 if bits == 8 else np.uint16)
