"""What two images are compared by: a digest of the decoded pixels, and 168 bits that survive small changes.

The bits are the signs of the lowest frequencies of the image's gray 32 x 32 thumbnail: coefficient (v, u) of
its cosine transform, 0 <= v, u <= 12, without the mean. NOTES.md explains the number of bits and the distances.
All intermediate numbers are integers, so that each machine finds the same bits.
Legend: N images, H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_shards.decode import UndecodableImage, decode
from data_shards.source.row import Reader, Row

NUM_BITS = 168
_WORDS = 3
_SIDE, _FREQUENCIES = 32, 13
# In 1/4096ths: sums of 32 x 32 products with 8-bit gray stay below 2^53, so float64 holds them exactly, and the order
# in which a BLAS adds them does not matter.
_COSINES = np.rint(
    4096 * np.cos(np.pi * np.arange(_FREQUENCIES)[:, None] * (2 * np.arange(_SIDE) + 1) / (2 * _SIDE))
).astype(np.float64)
# A blank image's frequencies are noise. Of 8,731 real thumbnails none varies by less than 5.9 gray levels.
_LEAST_DEVIATION = 2

UNDECODABLE, BLANK, SHARP = 0, 1, 2


@dataclass(frozen=True)
class Fingerprints:
    """Of N images, in the order of their rows."""

    state: np.ndarray  # (N,) uint8: UNDECODABLE; BLANK, known by its pixels only; SHARP, known by both
    pixels: np.ndarray  # (N, 2) uint64, digest of shape and pixels; 0 where undecodable
    bits: np.ndarray  # (N, 3) uint64, 168 bits; 0 unless SHARP
    size: np.ndarray  # (N,) int64, bytes of the source, or of its pixels where it gives pixels
    thumbnails: np.ndarray | None = None  # (N, 32, 32) uint8, gray; None where shifted duplicates are not searched for

    def __len__(self) -> int:
        return len(self.state)


def fingerprint(
    reader: Reader, rows: Sequence[Row], *, max_side: int | None = None, thumbnails: bool = False
) -> Fingerprints:
    """The fingerprints of these rows' images, as a shard would hold them; with `thumbnails` on request."""
    state = np.zeros(len(rows), np.uint8)
    pixels = np.zeros((len(rows), 2), np.uint64)
    size = np.zeros(len(rows), np.int64)
    small = np.zeros((len(rows), _SIDE, _SIDE), np.uint8)
    for i, row in enumerate(rows):
        try:
            source = reader.read(row)
            image = decode(source, max_side=max_side)
        except UndecodableImage:
            continue  # it is quarantined when its shard is made
        size[i] = len(source) if isinstance(source, bytes) else source.nbytes
        state[i], pixels[i], small[i] = SHARP, pixel_digest(image), _thumbnail(image)
    state[(state == SHARP) & _blank(small)] = BLANK
    bits = _bits(small)
    bits[state != SHARP] = 0
    return Fingerprints(state, pixels, bits, size, small if thumbnails else None)


def joined(parts: Iterable[Fingerprints]) -> Fingerprints:
    """Several runs of rows as one, without thumbnails."""
    found = list(parts)
    columns = ("state", "pixels", "bits", "size")
    return Fingerprints(*(np.concatenate([getattr(part, name) for part in found]) for name in columns))


def pixel_digest(image_HWC: np.ndarray) -> np.ndarray:
    """(2,) uint64 that only images of the same shape and pixels share."""
    hashed = hashlib.sha256(np.array(image_HWC.shape, "<i8").tobytes())
    hashed.update(np.ascontiguousarray(image_HWC).data)
    return np.frombuffer(hashed.digest()[:16], "<u8")


def _thumbnail(image_HWC: np.ndarray) -> np.ndarray:
    image = Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC)
    if image.mode != "L":
        image = image.convert("L")
    # PIL filters 8-bit images in whole numbers; antialiased, so that a larger copy gives the same thumbnail.
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))


def _blank(thumbnails_NHW: np.ndarray) -> np.ndarray:
    values = thumbnails_NHW.reshape(len(thumbnails_NHW), -1).astype(np.int64)
    num = values.shape[1]
    blank: np.ndarray = num * (values**2).sum(1) - values.sum(1) ** 2 < (num * _LEAST_DEVIATION) ** 2
    return blank


def _bits(thumbnails_NHW: np.ndarray) -> np.ndarray:
    frequencies = _COSINES @ thumbnails_NHW.astype(np.float64) @ _COSINES.T
    signs = frequencies.reshape(len(frequencies), -1)[:, 1:] > 0
    return _packed(signs)


def _packed(signs: np.ndarray) -> np.ndarray:
    padded = np.zeros((len(signs), 64 * _WORDS), np.uint8)
    padded[:, :NUM_BITS] = signs
    return np.packbits(padded, axis=1, bitorder="little").view("<u8")


def symmetric(bits: np.ndarray) -> np.ndarray:
    """The fingerprints (N, 3) of the eight turned and mirrored images: (8, N, 3), the images' own first.

    No image is needed: mirrored, an image has the same frequencies with every second sign inverted; transposed, it has
    them in the other order.
    """
    signs = np.unpackbits(np.ascontiguousarray(bits).view(np.uint8), axis=1, bitorder="little")[:, :NUM_BITS]
    places = np.arange(1, NUM_BITS + 1)
    down, right = places // _FREQUENCIES, places % _FREQUENCIES
    transposed = signs[:, right * _FREQUENCIES + down - 1]
    mirrors = (0 * places, right % 2, down % 2, (right + down) % 2)
    return np.stack([_packed(each ^ mirror) for each in (signs, transposed) for mirror in mirrors])
