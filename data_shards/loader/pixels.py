"""Encoded images of a shard -> uint8 pixels of one size, from the complete image or a random crop.

A complete image is resized with PIL's antialiased bilinear filter, as in evaluation and prediction. A crop of a JPEG is
decoded only down to its lower edge and at the needed scale, and resized by the same filter in SIMD, which differs from
PIL's by at most 1 of 255.
"""

from __future__ import annotations

import io
import math
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from data_shards.decode import MAX_PIXELS
from data_shards.loader.draws import uniforms
from data_shards.loader.pixel_file import Kept

try:
    import pyspng  # has wheels for Linux and Windows
except ImportError:
    pyspng = None

# Of JPEG's scales M/8, libjpeg-turbo has SIMD for these; 3/4 takes longer than full scale (NOTES.md).
_REDUCED = (8, 4, 2)
_TRIES = 10  # to draw a crop within the image, like torchvision's RandomResizedCrop
_CROP_DRAWS = 0xC0
_PNG = b"\x89PNG"
_BILINEAR = ResizeAlg.convolution(FilterType.bilinear)


@dataclass(frozen=True)
class Crop:
    """Random crops: at least `min_area` of the area, width / height between 1 / `aspect` and `aspect`."""

    min_area: float
    aspect: float = 4 / 3


@dataclass(frozen=True)
class Coded:
    """Images of a batch that must be decoded: their location and crop."""

    row: np.ndarray  # (n,) int64, where in the batch
    shard: np.ndarray  # (n,) int64, position among the shards
    offset: np.ndarray  # (n,) int64, bytes
    size: np.ndarray  # (n,) int64, bytes
    boxes: np.ndarray | None  # (n, 4) int64: left, top, right, bottom in pixels; None: the complete image
    kept: Kept | None = None  # rows of this machine's cache, for complete images


def decode_into(images: np.ndarray, coded: Coded, read: Callable[..., list[bytes]]) -> None:
    """Fills the rows of `images` (B, H, W, C) listed in `coded`; `read(shard, offset, size)` gives their bytes."""
    shape = images.shape[1:]
    left = np.arange(len(coded.row))
    if coded.kept is not None:
        left = left[~coded.kept.read_into(images, coded.row)]
    if not len(left):
        return
    found = read(coded.shard[left], coded.offset[left], coded.size[left])
    for n, row, data in zip(left.tolist(), coded.row[left].tolist(), found, strict=True):
        if coded.boxes is None:
            images[row] = stretched(data, *shape)
        else:
            images[row] = cropped(data, tuple(coded.boxes[n].tolist()), *shape)
        if coded.kept is not None:
            coded.kept.write(n, images[row])


def stretched(data: bytes, height: int, width: int, channels: int) -> np.ndarray:
    """An encoded image as uint8 pixels (height, width, channels); gray is repeated for RGB."""
    if data.startswith(_PNG):
        pixels = _png(data)
        if pixels.shape[:2] != (height, width):
            pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
        return _with_channels(pixels, channels)
    image: Image.Image = JpegImageFile(io.BytesIO(data))
    _check_size(*image.size)
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels)


def cropped(data: bytes, box: tuple[int, int, int, int], height: int, width: int, channels: int) -> np.ndarray:
    """The crop `box` (left, top, right, bottom, in pixels) of an encoded image as (height, width, channels) pixels."""
    scale = 1
    if data.startswith(_PNG):
        pixels = _png(data)
    else:
        pixels, scale = _jpeg_part(data, box, height, width, channels)
    left, top, right, bottom = (side / scale for side in box)
    # The pixels that contain the crop, whose edges may be between pixels.
    x0, y0 = int(left), int(top)
    around = pixels[y0 : -int(-bottom // 1), x0 : -int(-right // 1)]
    return _with_channels(
        _resampled(around, (left - x0, top - y0, right - left, bottom - top), height, width), channels
    )


def crop_boxes(
    crop: Crop, heights: np.ndarray, widths: np.ndarray, *, seed: int, epoch: int, sample: np.ndarray
) -> np.ndarray:
    """The random crop of each sample in this epoch: (left, top, right, bottom), int64 (n, 4).

    Area and aspect are drawn ten times, and the first crop that fits is used; if none fits, as in a very long image,
    the largest allowed crop in the center.
    """
    draws = uniforms(seed, epoch, sample, 2 * _TRIES + 2, purpose=_CROP_DRAWS)
    area = (crop.min_area + (1 - crop.min_area) * draws[:, :_TRIES]) * (heights * widths)[:, None]
    aspect = np.exp((2 * draws[:, _TRIES : 2 * _TRIES] - 1) * np.log(crop.aspect))
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w >= 1) & (h >= 1) & (w <= widths[:, None]) & (h <= heights[:, None])
    first = fits.argmax(1)[:, None]
    found = fits.any(1)
    largest_w = np.minimum(widths, np.rint(heights * crop.aspect)).astype(np.int64)
    largest_h = np.minimum(heights, np.rint(widths * crop.aspect)).astype(np.int64)
    w = np.where(found, np.take_along_axis(w, first, 1)[:, 0], np.maximum(1, largest_w))
    h = np.where(found, np.take_along_axis(h, first, 1)[:, 0], np.maximum(1, largest_h))
    place = np.where(found[:, None], draws[:, 2 * _TRIES :], 0.5)
    left = np.minimum((place[:, 0] * (widths - w + 1)).astype(np.int64), widths - w)
    top = np.minimum((place[:, 1] * (heights - h + 1)).astype(np.int64), heights - h)
    return np.stack([left, top, left + w, top + h], 1)


def _png(data: bytes) -> np.ndarray:
    """Pixels (H, W) or (H, W, 3) of a PNG, which are equal in all decoders."""
    _check_size(*struct.unpack_from(">II", data, 16))
    if pyspng is not None:
        pixels: np.ndarray = pyspng.load(data)
        return pixels
    return np.asarray(PngImageFile(io.BytesIO(data)))


def _check_size(width: int, height: int) -> None:
    """ValueError if the size is larger than any conversion writes; checked before memory is allocated."""
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(
            f"an image of the shard claims {width} x {height} pixels, but at most {MAX_PIXELS:,} are allowed: the "
            "dataset was not made by a conversion; rebuild it from its images"
        )


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    return pixels if pixels.shape[2] == channels else np.broadcast_to(pixels, (*pixels.shape[:2], channels))


def _jpeg_part(
    data: bytes, box: tuple[int, int, int, int], height: int, width: int, channels: int
) -> tuple[np.ndarray, int]:
    """Pixels of a JPEG that contain the crop `box`, and the factor by which they are reduced."""
    left, top, right, bottom = box
    scale = next((s for s in _REDUCED if bottom - top >= s * height and right - left >= s * width), 1)
    data, full_height, full_width, colors = _cut_below(data, bottom)
    _check_size(full_width, full_height)
    # Given these minimum sizes, libjpeg uses the smallest sufficient scale: 1 / scale.
    shape = (-(-full_height // scale), -(-full_width // scale), 1 if colors == 1 or channels == 1 else 3)
    # Not strict, because a cut file continues after the last needed row. Its sha256 was verified.
    pixels = simplejpeg.decode_jpeg(
        data,
        "GRAY" if shape[2] == 1 else "RGB",
        min_height=shape[0],
        min_width=shape[1],
        min_factor=scale,
        buffer=_scratch(math.prod(shape)),
        strict=False,
    )
    assert pixels.shape == shape, f"expected {shape} pixels, got {pixels.shape}"
    return (pixels[:, :, 0] if shape[2] == 1 else pixels), scale


def _cut_below(data: bytes, bottom: int) -> tuple[bytes, int, int, int]:
    """A JPEG whose header is changed to the needed number of rows, so that decoding ends there, and its (H, W, C).

    Only if all colors are in one scan from top to bottom; a progressive image needs every scan.
    """
    height = width = colors = block = frame = 0
    position = 2
    while True:
        marker, length = struct.unpack_from(">HH", data, position)
        if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):  # the frame (ITU T.81, B.2.2)
            frame = position if marker <= 0xFFC1 else 0
            height, width, colors = struct.unpack_from(">HHB", data, position + 5)
            block = 8 * max(data[position + 11 + 3 * n] & 15 for n in range(colors))
        elif marker == 0xFFDA:  # the first scan
            # Color is smoothed across rows of blocks: with one extra row of blocks, the needed pixels equal those of
            # the complete image.
            rows = (bottom // block + 2) * block
            if not frame or data[position + 4] != colors or rows >= height:
                return data, height, width, colors
            return b"".join([data[: frame + 5], struct.pack(">H", rows), data[frame + 7 :]]), rows, width, colors
        position += 2 + length


_of_this_thread = threading.local()


def _resampled(pixels: np.ndarray, box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
    """The box (left, top, width, height) of the pixels (H, W) or (H, W, 3), resized to (height, width)."""
    if pixels.shape[:2] == (height, width) and box == (0, 0, width, height):
        return pixels
    kind = PixelType.U8 if pixels.ndim == 2 else PixelType.U8x3
    options = ResizeOptions(resize_alg=_BILINEAR, crop_box=CropBox(*box))
    target = _target(width, height, kind)
    _resizer().resize(ImageData(pixels.shape[1], pixels.shape[0], kind, pixels.tobytes()), target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(height, width, *pixels.shape[2:])


def _target(width: int, height: int, kind: Any) -> Any:
    """The target of resizing, reused while the size stays the same."""
    if getattr(_of_this_thread, "target_is", None) != (width, height, kind):
        _of_this_thread.target_is = (width, height, kind)
        _of_this_thread.target = ImageData(width, height, kind)
    return _of_this_thread.target


def _scratch(size: int) -> np.ndarray:
    """Reused memory of this thread: page faults of new memory would take a fifth of the decoding time."""
    scratch: np.ndarray | None = getattr(_of_this_thread, "scratch", None)
    if scratch is None or scratch.nbytes < size:
        scratch = _of_this_thread.scratch = np.empty(size, np.uint8)
    return scratch


def _resizer() -> Resizer:
    if not hasattr(_of_this_thread, "resizer"):  # per thread, because it has internal buffers
        _of_this_thread.resizer = Resizer()
    resizer: Resizer = _of_this_thread.resizer
    return resizer
