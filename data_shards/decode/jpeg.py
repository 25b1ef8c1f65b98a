"""Markers and scans of a JPEG (ITU T.81): detects lost pixels, and removes everything but the pixels.

Decoders fill in missing pixels and only warn, so a scan that was cut in half decodes without an error. This module
reads libjpeg's warnings: files that lost pixels are refused, other damage is named and accepted. A flipped bit that
still gives valid codes for all blocks cannot be detected, because a JPEG has no checksum. Zero bytes left by a disk or
a download are detected where no encoder writes them, which follows from the Huffman tables.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import simplejpeg

from data_shards.decode.undecodable import UndecodableImage

_END = b"\xff\xd9"
# In a scan, FF is followed by 00 (a stuffed FF), a restart marker, or a marker that ends the scan.
_END_OF_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_MARKER = re.compile(rb"\xff+[\x01-\xfe]")
_FRAMES = {marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC)}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_ARITHMETIC = {0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
_SCAN, _HUFFMAN_TABLES, _QUANTIZATION_TABLES = 0xDA, 0xC4, 0xDB
_BASELINE = {0xC0, 0xC1}
_AC = 0x10  # in the number of a Huffman table
_STRAY = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
# 48 bytes contain a block of 63 coefficients. Zeros after a scan may be padding, of which libjpeg counts up to 8 bytes
# as part of the scan.
_ZEROS = re.compile(rb"\0{48,}|\0{16,}\Z")
# Without an end marker. Senders may pad a file to a multiple of four bytes.
_ZEROS_AT_END = re.compile(rb"\0{4,}\Z")
# Gratings and tiles repeat blocks of a few equal coefficients, so only more than that are suspicious.
_EQUAL_COEFFICIENTS = 5
# Raised by simplejpeg, which supports only common subsamplings.
_UNUSUAL = "Could not determine subsampling level of JPEG image"


class Segment(NamedTuple):
    """A marker, its parameters and, for a scan, the entropy-coded data that follows."""

    marker: int
    parameters: bytes
    scan: bytes = b""

    def coded(self) -> bytes:
        """The segment's bytes in a file."""
        head = struct.pack(">BBH", 0xFF, self.marker, len(self.parameters) + 2)
        return head + self.parameters + self.scan


class Segments(NamedTuple):
    """A JPEG from its start to its end marker."""

    found: list[Segment]
    num_stray: int
    """Number of bytes between segments."""
    ended: bool
    """Whether there is an end marker."""


def segments_of(data: bytes) -> Segments:
    """The segments of the first JPEG in `data`, without a truncated last one."""
    found: list[Segment] = []
    position, num_stray = 2, 0
    while match := _MARKER.search(data, position):
        num_stray += match.start() - position
        marker, position = data[match.end() - 1], match.end()
        if marker == _END[1]:
            return Segments(found, num_stray, True)
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # they have no parameters
            continue
        end = position + int.from_bytes(data[position : position + 2], "big")
        if end > len(data) or end < position + 2:
            break
        parameters, position = data[position + 2 : end], end
        scan = b""
        if marker == _SCAN:
            over = _END_OF_SCAN.search(data, position)
            end = over.start() if over else len(data)
            scan, position = data[position:end], end
        found.append(Segment(marker, parameters, scan))
    return Segments(found, num_stray, False)


def examine(data: bytes) -> tuple[bytes, str]:
    """The JPEG with an end marker, and any damage that lost no pixels ("" if undamaged).

    Raises UndecodableImage if pixels are lost.
    """
    warning, segments = _warning(data), segments_of(data)
    _require_all_scans(segments)
    if not segments.ended and _ZEROS_AT_END.search(data):
        raise UndecodableImage("truncated JPEG, pixels are lost: zero bytes are in place of its end")
    if not warning:
        _refuse_zeros(segments.found)
        return data, ""
    ended = data if segments.ended else data + _END
    if warning.endswith(_UNUSUAL):
        return ended, "unusual colour subsampling, for which it cannot be checked whether pixels are lost"
    kept = _pixels_only(segments)
    for _ in range(len(kept) + 1):  # each scan is shortened at most once
        rest = _warning(_joined(kept))
        if not rest:
            _refuse_zeros(kept)
            return ended, _harmless(warning, segments)
        without = _without_filling(kept, rest)
        if without is None:
            break
        kept = without
    raise UndecodableImage(_reason(rest, segments))


def _warning(data: bytes) -> str:
    """libjpeg's first warning when decoding, or "". At an eighth of the size this takes a tenth of the time."""
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        return str(error)
    return ""


def _require_all_scans(segments: Segments) -> None:
    """UndecodableImage if a scan with colors or details is missing: libjpeg does not warn about that."""
    frame = next((each for each in segments.found if each.marker in _FRAMES), None)
    if frame is None:
        raise UndecodableImage("damaged JPEG: no pixels")
    components = set(frame.parameters[6::3])
    progressive = frame.marker in _PROGRESSIVE
    missing = {(component, k) for component in components for k in (range(64) if progressive else range(1))}
    for parameters in (each.parameters for each in segments.found if each.marker == _SCAN):
        named = parameters[1 : 1 + 2 * parameters[0] : 2] if parameters else b""
        first, last, bits = parameters[-3:] if progressive and len(parameters) >= 4 else (0, 0, 0)
        if bits & 15 == 0:  # coefficients to their last bit
            missing -= {(component, k) for component in named for k in range(first, last + 1)}
    if missing:
        cut = "" if segments.ended else "truncated "
        raise UndecodableImage(f"damaged {cut}JPEG, pixels are lost: not all of its scans are there")


def _refuse_zeros(segments: Sequence[Segment]) -> None:
    """UndecodableImage if zero bytes have replaced encoded pixels or tables."""
    frame = 0
    first_symbols: dict[int, int] = {}  # by class and number of the Huffman table
    for marker, parameters, scan in segments:
        if marker in _FRAMES:
            frame = marker
        elif marker == _HUFFMAN_TABLES:
            for table, symbols in _huffman_tables(parameters):
                if symbols.count(0) > 1:
                    raise UndecodableImage("damaged JPEG, pixels are lost: zero bytes in a Huffman table")
                first_symbols[table] = symbols[0] if symbols else 0
        elif marker == _QUANTIZATION_TABLES and _divides_by_zero(parameters):
            raise UndecodableImage("damaged JPEG, pixels are lost: zeros in a quantization table")
        elif marker == _SCAN and (zeros := _ZEROS.search(scan)) and _never_zeros(frame, parameters, first_symbols):
            num = zeros.end() - zeros.start()
            raise UndecodableImage(f"damaged JPEG, pixels are lost: {num:,} zero bytes in its coded pixels")


def _huffman_tables(parameters: bytes) -> Iterator[tuple[int, bytes]]:
    """Class and number of each Huffman table, and its symbols, shortest codes first."""
    position = 0
    while position + 17 <= len(parameters):
        end = position + 17 + sum(parameters[position + 1 : position + 17])
        yield parameters[position], parameters[position + 17 : end]
        position = end


def _divides_by_zero(parameters: bytes) -> bool:
    """Whether a quantization table has a value of 0, which the standard forbids."""
    position = 0
    while position < len(parameters):
        size = 2 if parameters[position] >> 4 else 1
        values = parameters[position + 1 : position + 1 + 64 * size]
        if len(values) == 64 * size and any(not any(values[i : i + size]) for i in range(0, 64 * size, size)):
            return True
        position += 1 + 64 * size
    return False


def _never_zeros(frame: int, parameters: bytes, first_symbols: Mapping[int, int]) -> bool:
    """Whether an encoder would never write a long run of zero bits in this scan.

    The first code of a Huffman table is all zeros, so such a run repeats its first symbol: r zero coefficients, then
    one of s zero bits, which is negative. If the symbol ends the block (s = 0), the run is a flat area.
    """
    if frame not in _BASELINE | _PROGRESSIVE or frame in _ARITHMETIC or len(parameters) < 6:
        return False
    first, last, bits = parameters[-3:] if frame in _PROGRESSIVE else (1, 63, 0)
    if first == 0 or bits >> 4:  # means of blocks are equal in flat areas; refinement bits have no codes
        return False
    tables = {_AC | table & 15 for table in parameters[2 : 1 + 2 * parameters[0] : 2]}
    return any(_never_repeats(first_symbols[table], last - first + 1) for table in tables if table in first_symbols)


def _never_repeats(symbol: int, num_coefficients: int) -> bool:
    """Whether no block consists only of this symbol followed by zero bits."""
    num_zeros, size = symbol >> 4, symbol & 15
    if size == 0:
        return num_zeros == 15  # 16 zeros always precede another coefficient
    num, beyond = divmod(num_coefficients, num_zeros + 1)
    return beyond > 0 or num >= _EQUAL_COEFFICIENTS


def _pixels_only(segments: Segments) -> list[Segment]:
    """Tables and scans; parameters of sequential scans are set to their required values."""
    kept = [each for each in segments.found if not (0xE0 <= each.marker <= 0xEF or each.marker == 0xFE)]
    frames = {each.marker for each in kept if each.marker in _FRAMES}
    if frames & (_PROGRESSIVE | _LOSSLESS):
        return kept
    return [
        each._replace(parameters=each.parameters[:-3] + b"\0\x3f\0") if each.marker == _SCAN else each for each in kept
    ]


def _joined(segments: Sequence[Segment]) -> bytes:
    return b"".join([b"\xff\xd8", *(each.coded() for each in segments), _END])


def _without_filling(segments: list[Segment], warning: str) -> list[Segment] | None:
    """The segments without the stray bytes that libjpeg reports after a scan, unless they remain from lost blocks."""
    found = _STRAY.search(warning)
    if found is None:
        return None
    num, before = int(found[1]), int(found[2], 16)
    following = [each.marker for each in segments[1:]] + [_END[1]]
    for i, (segment, marker) in enumerate(zip(segments, following, strict=True)):
        is_there = segment.marker == _SCAN and marker == before and 0 < num < len(segment.scan)
        if not is_there:
            continue
        scan, filling = segment.scan[:-num], segment.scan[-num:]
        if _is_filling(filling):
            return [*segments[:i], segment._replace(scan=scan), *segments[i + 1 :]]
    return None


def _is_filling(tail: bytes) -> bool:
    """Whether bytes repeat one value or are text; remains of lost blocks look random."""
    return len(set(tail)) == 1 or (tail.isascii() and tail.decode().isprintable())


def _reason(warning: str, segments: Segments) -> str:
    if not segments.ended:
        return "truncated JPEG, pixels are lost"
    return f"damaged JPEG, pixels are lost: {_short(warning)}"[:120]


def _harmless(warning: str, segments: Segments) -> str:
    if not segments.ended:
        return "no end marker"
    return "stray bytes" if segments.num_stray or _STRAY.search(warning) else _short(warning)


def _short(warning: str) -> str:
    return warning.removeprefix("Warning: ").removeprefix("Corrupt JPEG data: ")
