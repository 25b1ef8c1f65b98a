"""A small residual convolutional network: the baseline that MedMamba must beat at the same cost.

images -> 4x4 stem -> stages of pre-activation residual blocks (He et al., arXiv 1603.05027) -> mean -> head
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)
from torch import Tensor, nn

from medmamba.config import PATCH, ConvNetConfig


class ConvNet(nn.Module):
    """forward: images (B,3,H,W) float -> scores (B, num_classes)."""

    scan_backend = "none"

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(3, config.widths[0], PATCH, stride=PATCH)
        blocks: list[nn.Module] = []
        narrow = config.widths[0]
        for stage, width in enumerate(config.widths):
            for index in range(config.blocks):
                blocks.append(ResidualBlock(narrow, width, stride=2 if stage and not index else 1))
                narrow = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(narrow)
        self.head = nn.Linear(narrow, config.num_classes)
        self.apply(_initialize)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Scores before softmax or sigmoid."""
        x_BCHW = self.stem(images_B3HW.contiguous(memory_format=torch.channels_last))
        scores_BC: Tensor = self.head(F.relu(self.norm(self.blocks(x_BCHW))).mean((2, 3)))
        return scores_BC


class ResidualBlock(nn.Module):
    """x + two convolutions of x; a 1x1 convolution on the shortcut if the shape changes."""

    def __init__(self, narrow: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(narrow), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(narrow, width, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        same = narrow == width and stride == 1
        self.short = None if same else nn.Conv2d(narrow, width, 1, stride=stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,C',H/stride,W/stride)."""
        active = F.relu(self.norm1(x_BCHW))
        residual: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return residual + (x_BCHW if self.short is None else self.short(active))


def _initialize(module: nn.Module) -> None:
    if any(each.is_meta for each in module.parameters(recurse=False)):
        return  # nothing to draw; torch would import its compiler for it, which takes a second
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
