"""A JPEG's markers and scans (ITU T.81): whether pixels are lost in it, and the file without what is not pixels.

Decoders fill up what a damaged file lacks and only warn, so a scan that was cut in half decodes without an error. Here
libjpeg's warnings are read: what lost pixels is refused, what lost none is named and kept. A changed bit that gives
other codes of the same number of blocks is not seen by any decoder, as a JPEG has no checksum.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import NamedTuple

import simplejpeg

from data_shards.undecodable import UndecodableImage

_END = b"\xff\xd9"
# In a scan FF is followed by 00 (a stuffed FF), by a restart marker, or by a marker that ends it.
_END_OF_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_MARKER = re.compile(rb"\xff+[\x01-\xfe]")
_FRAMES = {marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC)}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
_SCAN = 0xDA
_STRAY = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
# Of the interface to libjpeg, which knows the common ones only.
_UNUSUAL = "Could not determine subsampling level of JPEG image"


class Segment(NamedTuple):
    """A marker, its parameters, and, of a scan, the coded data behind it."""

    marker: int
    parameters: bytes
    scan: bytes = b""

    def coded(self) -> bytes:
        """The segment as it is in a file."""
        head = struct.pack(">BBH", 0xFF, self.marker, len(self.parameters) + 2)
        return head + self.parameters + self.scan


class Segments(NamedTuple):
    """A JPEG from its start to its end marker."""

    found: list[Segment]
    num_stray: int
    """Bytes between two segments that belong to neither."""
    ended: bool
    """Whether there is an end marker."""


def segments_of(data: bytes) -> Segments:
    """The segments of the (first) JPEG in `data`; what is cut off in the middle of a segment is not one."""
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
    """The JPEG with an end marker, and what is wrong with it although no pixel is lost, "" if nothing is.

    Raises UndecodableImage where pixels are lost.
    """
    warning, segments = _warning(data), segments_of(data)
    _require_all_scans(segments)
    if not warning:
        return data, ""
    ended = data if segments.ended else data + _END
    if warning.endswith(_UNUSUAL):
        return ended, "unusual colour subsampling, for which it cannot be checked whether pixels are lost"
    kept = _pixels_only(segments)
    while rest := _warning(_joined(kept)):
        without = _without_filling(kept, rest)
        if without is None:
            raise UndecodableImage(_reason(rest, segments))
        kept = without
    return ended, _harmless(warning, segments)


def _warning(data: bytes) -> str:
    """What libjpeg first warns of when it decodes the file, "" if nothing. An eighth of the size costs a tenth."""
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        return str(error)
    return ""


def _require_all_scans(segments: Segments) -> None:
    """UndecodableImage where colours or details were to come in a scan that is not there: libjpeg is silent then."""
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


def _pixels_only(segments: Segments) -> list[Segment]:
    """Tables and scans, with the parameters that a sequential scan must have."""
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
    """The segments without the bytes behind a scan that libjpeg names, if they are not left over from lost blocks."""
    found = _STRAY.search(warning)
    if found is None:
        return None
    num, before = int(found[1]), int(found[2], 16)
    following = [each.marker for each in segments[1:]] + [_END[1]]
    for i, (segment, marker) in enumerate(zip(segments, following, strict=True)):
        if segment.marker == _SCAN and marker == before and _is_filling(segment.scan[-num:]):
            return [*segments[:i], segment._replace(scan=segment.scan[:-num]), *segments[i + 1 :]]
    return None


def _is_filling(tail: bytes) -> bool:
    """Whether bytes are one value again and again, or text: what is left over when blocks are lost looks random."""
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
