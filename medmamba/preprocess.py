"""uint8 BHWC -> normalized BCHW: the preprocessing shared by training, evaluation and prediction.

Shapes: B batch, H W space, C channels as stored (1 gray or 3 RGB); the network always gets 3.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

# The paper normalizes every channel of every dataset with mean 0.5 and standard deviation 0.5 (arXiv 2403.03849).
MEAN, STD = 0.5, 0.5


def to_float(images_BHWC: torch.Tensor) -> torch.Tensor:
    """Converts to float32 (B, C, H, W) in [0, 1], with the stored number of channels; the input of augmentation.

    Raises ValueError if the input is not uint8 (B, H, W, 1 or 3).
    """
    if images_BHWC.dtype != torch.uint8 or images_BHWC.ndim != 4 or images_BHWC.shape[-1] not in (1, 3):
        raise ValueError(
            f"images of shape {tuple(images_BHWC.shape)} and type {images_BHWC.dtype} must be uint8 of shape "
            "(batch, height, width, 1 or 3); scale them to 0..255 and put the channels last"
        )
    return images_BHWC.permute(0, 3, 1, 2).float() / 255


def normalize(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Scales pixels from [0, 1] to [-1, 1], as the published weights expect.

    Returns (B, 3, H, W), channels-last in memory; a gray channel is repeated.
    """
    scaled = (x_BCHW - MEAN) / STD
    return scaled.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def preprocess(images_BHWC: torch.Tensor) -> torch.Tensor:
    """The network's input: `normalize(to_float(images))`; training augments in between."""
    return normalize(to_float(images_BHWC))


def resize_uint8(image_HWC: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resizes a uint8 image (H, W, 1 or 3) to `size` (side, or height and width), ignoring the aspect ratio.

    Uses PIL's antialiased bilinear filter like the shard loader, so that prediction gives the network exactly the same
    pixels as training and evaluation.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if image_HWC.shape[:2] == (height, width):
        return image_HWC
    is_gray = image_HWC.shape[-1] == 1
    pixels = Image.fromarray(image_HWC[..., 0] if is_gray else image_HWC)
    resized = np.asarray(pixels.resize((width, height), Image.Resampling.BILINEAR))
    return resized[..., None] if is_gray else resized
