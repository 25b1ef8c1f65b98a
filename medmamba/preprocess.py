"""uint8 BHWC -> normalized BCHW: the one preprocessing of training, evaluation and prediction.

Shapes: B batch, H W space, C channels as stored (1 grey or 3 RGB); the network always sees 3.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

# The paper normalizes every channel of every dataset with mean 0.5 and standard deviation 0.5 (arXiv 2403.03849).
MEAN, STD = 0.5, 0.5


def to_float(images_BHWC: torch.Tensor) -> torch.Tensor:
    """Float32 (B, C, H, W) in [0, 1], with as many channels as are stored: what augmentation works on.

    Raises ValueError where the input is not uint8 (B, H, W, 1 or 3).
    """
    if images_BHWC.dtype != torch.uint8 or images_BHWC.ndim != 4 or images_BHWC.shape[-1] not in (1, 3):
        raise ValueError(
            f"images of shape {tuple(images_BHWC.shape)} and type {images_BHWC.dtype}: the network reads uint8 "
            "(batch, height, width, 1 or 3); scale to 0..255 and put the channels last"
        )
    return images_BHWC.permute(0, 3, 1, 2).float() / 255


def normalize(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1] moved to [-1, 1], where the published weights expect them.

    Returns (B, 3, H, W), channels-last in memory; grey is repeated on three channels.
    """
    moved = (x_BCHW - MEAN) / STD
    return moved.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def preprocess(images_BHWC: torch.Tensor) -> torch.Tensor:
    """What the network eats: `normalize(to_float(images))`; training augments between the two."""
    return normalize(to_float(images_BHWC))


def resize_uint8(image_HWC: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """One uint8 image (H, W, 1 or 3) at `size` (a side, or height and width); the aspect ratio is not kept.

    PIL's antialiased bilinear, the arithmetic of the shard loader, so that an image that is predicted
    alone meets the network exactly as it did in training and evaluation.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if image_HWC.shape[:2] == (height, width):
        return image_HWC
    grey = image_HWC.shape[-1] == 1
    pixels = Image.fromarray(image_HWC[..., 0] if grey else image_HWC)
    resized = np.asarray(pixels.resize((width, height), Image.Resampling.BILINEAR))
    return resized[..., None] if grey else resized
