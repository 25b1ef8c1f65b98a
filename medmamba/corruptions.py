"""Eight corruptions of an image in five grades each, to measure how robust a model is.

The families and the idea of five grades are those of Hendrycks and Dietterich (arXiv 1903.12261); rotation and
occlusion are not among theirs. Lengths are shares of the image's side, so that a grade looks alike at 64 and at 512 px.
Apply them at the size that the network reads: resizing afterwards averages noise away. numpy and Pillow only.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

GRADES = (1, 2, 3, 4, 5)
_CELLS = 8  # an occlusion covers cells of a grid of so many rows and columns

Draw = np.random.Generator


def corrupt(image_HWC: np.ndarray, name: str, grade: int, seed: int | str) -> np.ndarray:
    """One uint8 image (H, W, 1 or 3), corrupted: uint8 of the same shape, a function of the four arguments alone.

    `seed` tells images apart: a number, or the key of a sample. What is random (the noise, the direction of a turn,
    the covered cells) is drawn from name and seed, so that the grades of one image differ in strength and in nothing
    else. Raises ValueError for another image, an unknown corruption or grade.
    """
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] not in (1, 3) or not image_HWC.size:
        raise ValueError(
            f"image of shape {image_HWC.shape} and type {image_HWC.dtype}: a corruption takes uint8 (height, width, 1 "
            "or 3); scale to 0..255 and put the channels last"
        )
    if name not in _CORRUPTIONS:
        raise ValueError(f"corruption {name!r} does not exist; choose one of {', '.join(CORRUPTIONS)}")
    if grade not in GRADES:
        raise ValueError(f"grade {grade!r} does not exist; the grades are 1 (barely visible) to 5 (severe)")
    apply, strengths = _CORRUPTIONS[name]
    entropy = int.from_bytes(hashlib.sha256(f"{name} {seed}".encode()).digest()[:16], "big")
    return apply(image_HWC, strengths[grade - 1], np.random.default_rng(entropy))


def _noise(image_HWC: np.ndarray, deviation: float, draw: Draw) -> np.ndarray:
    """Gaussian, of each channel its own; the standard deviation as a share of the range of values."""
    return _as_uint8(image_HWC + 255 * deviation * draw.standard_normal(image_HWC.shape))


def _blur(image_HWC: np.ndarray, share: float, _: Draw) -> np.ndarray:
    """Gaussian; the standard deviation as a share of the shorter side."""
    return _array(_picture(image_HWC).filter(ImageFilter.GaussianBlur(share * min(image_HWC.shape[:2]))))


def _contrast(image_HWC: np.ndarray, factor: float, _: Draw) -> np.ndarray:
    """The distance of every value from the mean of its channel, times the factor."""
    mean_C = image_HWC.mean((0, 1))
    return _as_uint8((image_HWC - mean_C) * factor + mean_C)


def _brightness(image_HWC: np.ndarray, share: float, draw: Draw) -> np.ndarray:
    """All values up or all down, by a share of the range; what leaves the range is cut off."""
    return _as_uint8(image_HWC + 255 * share * draw.choice((-1, 1)))


def _jpeg(image_HWC: np.ndarray, quality: float, _: Draw) -> np.ndarray:
    buffer = io.BytesIO()
    _picture(image_HWC).save(buffer, "JPEG", quality=int(quality))
    with Image.open(buffer) as stored:
        return _array(stored)


def _rotation(image_HWC: np.ndarray, degrees: float, draw: Draw) -> np.ndarray:
    """Turned about the centre, one way or the other; beyond its edges the image is mirrored, so no corner is black."""
    height, width = image_HWC.shape[:2]
    far = int(np.ceil((np.hypot(height, width) - min(height, width)) / 2))
    around = np.pad(image_HWC, ((far, far), (far, far), (0, 0)), mode="symmetric")
    turned = _picture(around).rotate(float(degrees * draw.choice((-1, 1))), Image.Resampling.BILINEAR)
    return _array(turned.crop((far, far, far + width, far + height)))


def _pixelate(image_HWC: np.ndarray, share: float, _: Draw) -> np.ndarray:
    """Only so large a share of the pixels of each side is left, each of them a block."""
    height, width = image_HWC.shape[:2]
    small = _picture(image_HWC).resize(
        (max(1, round(share * width)), max(1, round(share * height))), Image.Resampling.BOX
    )
    return _array(small.resize((width, height), Image.Resampling.NEAREST))


def _occlusion(image_HWC: np.ndarray, share: float, draw: Draw) -> np.ndarray:
    """A share of the cells of a grid gets the image's mean color; a higher grade covers those of a lower one too."""
    height, width = image_HWC.shape[:2]
    rank_of_cell = draw.permutation(_CELLS**2).reshape(_CELLS, _CELLS)
    rank_HW = rank_of_cell[np.arange(height)[:, None] * _CELLS // height, np.arange(width) * _CELLS // width]
    covered_HW1 = (rank_HW < share * _CELLS**2)[..., None]
    return np.where(covered_HW1, _as_uint8(image_HWC.mean((0, 1))), image_HWC)


# Name -> what it does, and its strength in each grade. Grade 1 is milder than that of ImageNet-C, and near the paper's
# CIFAR-10-C. Grade 5 takes a small convolutional network on 64 px phantoms from accuracy 0.99 to 0.33 (chance) under
# noise and contrast, 0.39 brightness, 0.64 blur, 0.65 pixelate, 0.80 occlusion, 0.83 jpeg, 0.91 rotation. Round things
# have no upright: on blood cells (BCCD) no rotation changes the accuracy.
_CORRUPTIONS: dict[str, tuple[Callable[[np.ndarray, float, Draw], np.ndarray], tuple[float, ...]]] = {
    "noise": (_noise, (0.02, 0.05, 0.09, 0.15, 0.25)),
    "blur": (_blur, (0.006, 0.015, 0.025, 0.04, 0.06)),
    "contrast": (_contrast, (0.8, 0.55, 0.35, 0.2, 0.1)),
    "brightness": (_brightness, (0.05, 0.12, 0.2, 0.3, 0.4)),
    "jpeg": (_jpeg, (60, 25, 12, 6, 2)),
    "rotation": (_rotation, (3, 8, 15, 27, 45)),
    "pixelate": (_pixelate, (0.75, 0.5, 0.35, 0.22, 0.12)),
    "occlusion": (_occlusion, (0.03, 0.08, 0.18, 0.32, 0.5)),
}
CORRUPTIONS = tuple(_CORRUPTIONS)


def _as_uint8(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)


def _picture(image_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC))


def _array(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels
