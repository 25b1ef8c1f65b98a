"""Coded images of a shard -> uint8 pixels of one size: the whole image stretched, or a random part of it.

A whole image is stretched with PIL's antialiased bilinear filter, as in evaluation and prediction. A part of a JPEG is
decoded only as far down and as finely as it is needed, and brought to size by the same filter in SIMD, which differs
from PIL's by at most 1 of 255.
"""

from __future__ import annotations

import functools
import io
import math
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
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

# Of the scales M/8 that JPEG knows, libjpeg-turbo has SIMD for these; 3/4 takes longer than the whole (NOTES.md).
_REDUCED = (8, 4, 2)
_TRIES = 10  # of a random part that lies within the image, as torchvision's RandomResizedCrop has them
_CROP_DRAWS = 0xC0
_PNG = b"\x89PNG"


@dataclass(frozen=True)
class Crop:
    """Random parts of images: at least `min_area` of the area, width / height between 1 / `aspect` and `aspect`."""

    min_area: float
    aspect: float = 4 / 3


@dataclass(frozen=True)
class Coded:
    """Images of a batch that have still to be decoded: where they lie, and which part of each is wanted."""

    row: np.ndarray  # (n,) int64, where in the batch
    shard: np.ndarray  # (n,) int64, position among the shards
    offset: np.ndarray  # (n,) int64, bytes
    size: np.ndarray  # (n,) int64, bytes
    boxes: np.ndarray | None  # (n, 4) int64: left, top, right, bottom in pixels; None: the whole image
    kept: Kept | None = None  # where whole images are kept on this machine once one process has decoded them


def decode_into(images: np.ndarray, coded: Coded, read: Callable[..., list[bytes]]) -> None:
    """Fills the rows of `images` (B, H, W, C) that `coded` names; `read(shard, offset, size)` gives their bytes."""
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
    """A coded image as (height, width, channels) uint8 pixels; grey is repeated where RGB is asked for."""
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
    """The part `box` (left, top, right, bottom, in pixels) of a coded image as (height, width, channels) pixels."""
    scale = 1
    if data.startswith(_PNG):
        pixels = _png(data)
    else:
        pixels, scale = _jpeg_part(data, box, height, width, channels)
    left, top, right, bottom = (side / scale for side in box)
    # Whole pixels around the part; within them the part may begin and end between two pixels.
    x0, y0 = int(left), int(top)
    around = pixels[y0 : -int(-bottom // 1), x0 : -int(-right // 1)]
    return _with_channels(
        _resampled(around, (left - x0, top - y0, right - left, bottom - top), height, width), channels
    )


def crop_boxes(
    crop: Crop, heights: np.ndarray, widths: np.ndarray, *, seed: int, epoch: int, sample: np.ndarray
) -> np.ndarray:
    """For each sample the part (left, top, right, bottom) int64 (n, 4) that chance gives it in this epoch.

    Area and shape are drawn ten times, and the first part that fits is taken; where none fits, as in a very long
    image, the largest part of allowed shape in the middle.
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
    """Pixels (H, W) or (H, W, 3) of a PNG, which has the same in every decoder."""
    _check_size(*struct.unpack_from(">II", data, 16))
    if pyspng is not None:
        return pyspng.load(data)
    return np.asarray(PngImageFile(io.BytesIO(data)))


def _check_size(width: int, height: int) -> None:
    """ValueError before memory is taken for pixels that no conversion would have put into a shard."""
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(
            f"an image of the shard says that it has {width} x {height} pixels, but {MAX_PIXELS:,} at most can be "
            "stored: the dataset was not made by a conversion; make it again from its images"
        )


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    return pixels if pixels.shape[2] == channels else np.broadcast_to(pixels, (*pixels.shape[:2], channels))


def _jpeg_part(
    data: bytes, box: tuple[int, int, int, int], height: int, width: int, channels: int
) -> tuple[np.ndarray, int]:
    """Pixels of a JPEG that hold the part `box`, and by how much they are shrunk."""
    import simplejpeg

    left, top, right, bottom = box
    scale = next((s for s in _REDUCED if bottom - top >= s * height and right - left >= s * width), 1)
    data, full_height, full_width, colours = _cut_below(data, bottom)
    _check_size(full_width, full_height)
    # Asked for at least this many pixels, libjpeg takes the smallest scale that gives them: 1 / scale.
    shape = (-(-full_height // scale), -(-full_width // scale), 1 if colours == 1 or channels == 1 else 3)
    # Not strict: after a cut the file goes on where the decoder has what it wants. Its sha256 was verified.
    pixels = simplejpeg.decode_jpeg(
        data,
        "GRAY" if shape[2] == 1 else "RGB",
        min_height=shape[0],
        min_width=shape[1],
        min_factor=scale,
        buffer=_scratch(math.prod(shape)),
        strict=False,
    )
    assert pixels.shape == shape, f"asked for {shape} pixels, got {pixels.shape}"
    return (pixels[:, :, 0] if shape[2] == 1 else pixels), scale


def _cut_below(data: bytes, bottom: int) -> tuple[bytes, int, int, int]:
    """A JPEG whose header promises no more rows than are needed, so that decoding ends there; its (H, W, C).

    Only where all colours come in one scan from top to bottom; a progressive image needs every scan.
    """
    height = width = colours = block = frame = 0
    position = 2
    while True:
        marker, length = struct.unpack_from(">HH", data, position)
        if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):  # the frame (ITU T.81, B.2.2)
            frame = position if marker <= 0xFFC1 else 0
            height, width, colours = struct.unpack_from(">HHB", data, position + 5)
            block = 8 * max(data[position + 11 + 3 * n] & 15 for n in range(colours))
        elif marker == 0xFFDA:  # the first scan
            # Colour is smoothed across the border of two rows of blocks: with one row more than is needed, the wanted
            # pixels are those of the whole image.
            rows = (bottom // block + 2) * block
            if not frame or data[position + 4] != colours or rows >= height:
                return data, height, width, colours
            return b"".join([data[: frame + 5], struct.pack(">H", rows), data[frame + 7 :]]), rows, width, colours
        position += 2 + length


_of_this_thread = threading.local()


def _resampled(pixels: np.ndarray, box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
    """The part (left, top, width, height) of the pixels (H, W) or (H, W, 3), brought to (height, width)."""
    if pixels.shape[:2] == (height, width) and box == (0, 0, width, height):
        return pixels
    resizer, images = _resizer()
    kind = images.PixelType.U8 if pixels.ndim == 2 else images.PixelType.U8x3
    options = images.ResizeOptions(resize_alg=_bilinear(), crop_box=images.CropBox(*box))
    target = _target(width, height, kind)
    resizer.resize(images.ImageData(pixels.shape[1], pixels.shape[0], kind, pixels.tobytes()), target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(height, width, *pixels.shape[2:])


def _target(width: int, height: int, kind: Any) -> Any:
    """What is resized into, the same each time as long as the size is."""
    from cykooz_resizer import ImageData

    if getattr(_of_this_thread, "target_is", None) != (width, height, kind):
        _of_this_thread.target_is = (width, height, kind)
        _of_this_thread.target = ImageData(width, height, kind)
    return _of_this_thread.target


def _scratch(size: int) -> np.ndarray:
    """Memory of this thread that is used again: the page faults of new memory would cost a fifth of decoding."""
    if getattr(_of_this_thread, "scratch", None) is None or _of_this_thread.scratch.nbytes < size:
        _of_this_thread.scratch = np.empty(size, np.uint8)
    return _of_this_thread.scratch


def _resizer() -> tuple[Any, Any]:
    import cykooz_resizer

    if not hasattr(_of_this_thread, "resizer"):  # it keeps buffers that no two threads may share
        _of_this_thread.resizer = cykooz_resizer.Resizer()
    return _of_this_thread.resizer, cykooz_resizer


@functools.lru_cache(maxsize=1)
def _bilinear() -> Any:
    from cykooz_resizer import FilterType, ResizeAlg

    return ResizeAlg.convolution(FilterType.bilinear)
