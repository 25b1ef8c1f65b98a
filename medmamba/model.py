"""MedMamba (Yue and Li, arXiv 2403.03849), with upstream's parameter names so that upstream's checkpoints load.

    images -> stem (4x4 patches) -> 4 stages of SS-Conv-SSM blocks, patch merging between them -> mean -> head

Shapes: B batch, H W space, L = H W positions, C block channels, D = C inner channels of the scan branch, K = 4
directions, N states, R rank of dt. Between blocks tensors are channels-last with three dimensions, BLC: torch's
compiler would treat a four-dimensional BHWC tensor as a BCHW input of a convolution and store it with H innermost.
The function equals upstream's; only its evaluation differs: the four directions share one product for dt, B and C and
one scan operator that works in pixel order.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)
from torch import Tensor, nn

from medmamba.config import PATCH, ConvNetConfig, MedMambaConfig
from medmamba.convnet import ConvNet
from medmamba.ops.ss2d_scan import backend_scan, resolve_backend

NUM_DIRECTIONS = 4
MIN_SIDE = 32  # smaller images leave nothing for the third patch merging
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 1e-1, 1e-4  # initial step sizes of the scan


def build_model(config: MedMambaConfig | ConvNetConfig, *, scan: str = "auto", device: str = "cpu") -> nn.Module:
    """Returns the newly initialized network on `device`: images (B,3,H,W) float -> scores (B, num_classes).

    `scan` names the backend of the selective scan; `model.scan_backend` is the resolved one ("none" for a network
    without a scan). Raises ValueError if config.num_classes is 0, or if the backend is unknown or cannot run on
    `device`.
    """
    if config.num_classes < 1:
        raise ValueError("num_classes is 0, but must be at least 1; set it to the number of classes of the dataset")
    if isinstance(config, ConvNetConfig):
        return ConvNet(config).to(device)
    return MedMamba(config, scan_backend=resolve_backend(scan, torch.device(device).type)).to(device)


class MedMamba(nn.Module):
    """The complete network; forward: images (B,3,H,W) float, H and W >= 32 -> scores (B, num_classes)."""

    def __init__(self, config: MedMambaConfig, *, scan_backend: str) -> None:
        super().__init__()
        self.config = config
        self.scan_backend = scan_backend
        dims, depths = config.resolved_dims, config.resolved_depths
        last = max(sum(depths) - 1, 1)
        drop_paths = iter([config.drop_path * block / last for block in range(sum(depths))])
        self.patch_embed = PatchEmbed(dims[0])
        self.layers = nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks = [SSConvSSM(dim, config, drop_path=next(drop_paths), backend=scan_backend) for _ in range(depth)]
            self.layers.append(Stage(dim, blocks, merge=stage < len(dims) - 1))
        self.head = nn.Linear(dims[-1], config.num_classes)
        self.apply(_initialize)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Scores before softmax or sigmoid. Raises ValueError unless there are three channels of at least 32x32."""
        if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3 or min(images_B3HW.shape[2:]) < MIN_SIDE:
            raise ValueError(
                f"images of shape {tuple(images_B3HW.shape)}: MedMamba takes (B, 3, H, W) with H and W >= {MIN_SIDE}; "
                "enlarge smaller images (image_size) and repeat the channel of gray ones"
            )
        x_BLC = self.patch_embed(images_B3HW)
        size = images_B3HW.shape[2] // PATCH, images_B3HW.shape[3] // PATCH
        for layer in self.layers:
            x_BLC = layer(x_BLC, size)
            size = size[0] // 2, size[1] // 2
        return self.scores(x_BLC)

    def scores(self, x_BLC: Tensor) -> Tensor:
        """(B,L,C) of the last stage -> (B, num_classes)."""
        scores_BC: Tensor = self.head(x_BLC.mean(1))
        return scores_BC


class PatchEmbed(nn.Module):
    """Stem: one vector per 4x4 patch; rows and columns beyond the last complete patch are dropped."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """(B,3,H,W) -> (B,L,C), L = H/4 W/4."""
        patches = self.proj(images_B3HW.contiguous(memory_format=torch.channels_last))
        x_BLC: Tensor = self.norm(_as_rows(patches))
        return x_BLC


class Stage(nn.Module):
    """Blocks of one resolution, followed by patch merging except in the last stage."""

    def __init__(self, dim: int, blocks: list[SSConvSSM], *, merge: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = PatchMerging(dim) if merge else None

    def forward(self, x_BLC: Tensor, size: tuple[int, int]) -> Tensor:
        """(B,HW,C) -> (B, H/2 W/2, 2C), or unchanged in shape in the last stage; `size` is (H, W)."""
        for block in self.blocks:
            x_BLC = block(x_BLC, size)
        return x_BLC if self.downsample is None else self.downsample(x_BLC, size)


class PatchMerging(nn.Module):
    """Merges each 2x2 cell into one position with twice the channels; drops an odd last row or column."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x_BLC: Tensor, size: tuple[int, int]) -> Tensor:
        """(B,HW,C) -> (B, H/2 W/2, 2C)."""
        height, width = size[0] // 2, size[1] // 2
        x_BHWC = torch.unflatten(x_BLC, 1, size)
        cells = torch.unflatten(torch.unflatten(x_BHWC[:, : 2 * height, : 2 * width], 2, (width, 2)), 1, (height, 2))
        # (B, h, row, w, column, C) -> (B, h, w, column, row, C): upstream's order (0,0), (1,0), (0,1), (1,1)
        merged: Tensor = self.reduction(self.norm(cells.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)))
        return merged


class SSConvSSM(nn.Module):
    """The block: convolutions on the left half of the channels, the scan on the right half, shuffled, plus x."""

    def __init__(self, dim: int, config: MedMambaConfig, *, drop_path: float, backend: str) -> None:
        super().__init__()
        half = dim // 2
        self.drop_path = drop_path
        self.conv33conv33conv11 = _conv_branch(half) if config.branches != "scan" else None
        self.ln_1 = nn.LayerNorm(half) if config.branches != "conv" else None
        self.self_attention = SS2D(half, config.d_state, backend) if config.branches != "conv" else None

    def forward(self, x_BLC: Tensor, size: tuple[int, int]) -> Tensor:
        """(B,HW,C) -> (B,HW,C)."""
        drops = self.training and self.drop_path > 0 and self.self_attention is not None
        return self.mixed(x_BLC, size, draw_kept(x_BLC, self.drop_path) if drops else None)

    def mixed(self, x_BLC: Tensor, size: tuple[int, int], kept_B11: Tensor | None) -> Tensor:
        """`forward` with given drop-path factors of the scan branch, (B,1,1) or None for 1."""
        left, right = x_BLC.chunk(2, dim=-1)
        if self.conv33conv33conv11 is not None:
            left = _as_rows(self.conv33conv33conv11(_as_maps(left, size)))
        if self.self_attention is not None and self.ln_1 is not None:
            right = self.self_attention(self.ln_1(right), size)
            right = right if kept_B11 is None else right * kept_B11.to(right.dtype)
        # Shuffle with two groups: channel j of left and right become channels 2j and 2j+1.
        return torch.stack((left, right), dim=-1).flatten(-2) + x_BLC


def _as_maps(x_BLC: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.unflatten(x_BLC, 1, size).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _as_rows(maps_BCHW: Tensor) -> Tensor:
    return maps_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def _conv_branch(half: int) -> nn.Sequential:
    """Left branch; upstream's parameter names contain the positions in the Sequential."""
    return nn.Sequential(
        nn.BatchNorm2d(half),
        nn.Conv2d(half, half, 3, padding=1),
        nn.BatchNorm2d(half),
        nn.ReLU(),
        nn.Conv2d(half, half, 3, padding=1),
        nn.BatchNorm2d(half),
        nn.ReLU(),
        nn.Conv2d(half, half, 1),
        nn.ReLU(),
    )


def draw_kept(x_BLC: Tensor, chance: float) -> Tensor:
    """Drop-path factor of each image, (B, 1, 1) float32: 0 with probability `chance`, otherwise 1/(1 - chance)."""
    kept_B11 = torch.empty((len(x_BLC), 1, 1), device=x_BLC.device).bernoulli_(1 - chance)
    return kept_B11.div_(1 - chance)


Part = tuple[nn.Module, str, Callable[..., Any]]


def compiled_parts(model: MedMamba, compiler: Callable[..., Any]) -> list[Part]:
    """Compiles stem, blocks, merging and head with `compiler`; returns (owner, method, compiled) for `exchanged`.

    Blocks of one stage are the same function with different weights, so torch compiles only one of them: T has ten
    blocks in four stages. Drop-path probabilities differ, so a block draws its factors outside of `mixed`.
    """
    parts: list[Part] = [(model, "scores", compiler(model.scores))]
    for module in model.modules():
        if isinstance(module, SSConvSSM):
            parts.append((module, "mixed", functools.partial(_always_kept, compiler(module.mixed))))
        elif isinstance(module, PatchEmbed | PatchMerging):
            parts.append((module, "forward", compiler(module.forward)))
    return parts


@contextlib.contextmanager
def exchanged(parts: list[Part]) -> Iterator[None]:
    """Replaces the owners' methods by the parts inside the block."""
    for owner, name, part in parts:
        setattr(owner, name, part)
    try:
        yield
    finally:
        for owner, name, _ in parts:
            delattr(owner, name)


def _always_kept(mixed: Callable[..., Tensor], x_BLC: Tensor, size: tuple[int, int], kept_B11: Tensor | None) -> Tensor:
    """Always passes factors, so that a first block, which has no drop-path, is the same function as the others."""
    return mixed(x_BLC, size, x_BLC.new_ones((len(x_BLC), 1, 1), dtype=torch.float32) if kept_B11 is None else kept_B11)


class SS2D(nn.Module):
    """Right branch: a gated selective scan over the map in four directions."""

    def __init__(self, dim: int, d_state: int, backend: str) -> None:
        super().__init__()
        inner, rank, ways = 2 * dim, math.ceil(dim / 16), NUM_DIRECTIONS
        self.scan = backend_scan(backend)
        self.split = (rank, d_state, d_state)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.empty(ways, sum(self.split), inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(ways, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(ways, inner))
        self.A_logs = nn.Parameter(torch.empty(ways * inner, d_state))
        self.Ds = nn.Parameter(torch.empty(ways * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x_BLC: Tensor, size: tuple[int, int]) -> Tensor:
        """(B,HW,C/2) -> (B,HW,C/2)."""
        # Two products instead of splitting one: the convolution and the gate need dense inputs.
        weight_x_DC, weight_z_DC = self.in_proj.weight.chunk(2)
        z_BLD = F.linear(x_BLC, weight_z_DC)
        u_BLD = F.silu(_as_rows(self.conv2d(_as_maps(F.linear(x_BLC, weight_x_DC), size))))
        y_BLD = self._scan(u_BLD, size)
        out_BLC: Tensor = self.out_proj(self.out_norm(y_BLD) * F.silu(z_BLD))
        return out_BLC

    def _scan(self, u_BLD: Tensor, size: tuple[int, int]) -> Tensor:
        # One product for all four directions in pixel order; only its small result is split. Per direction B and C come
        # first and the row is padded to a multiple of 8, so that a GPU reads and multiplies aligned rows.
        dt_KRD, B_KND, C_KND = torch.split_with_sizes(self.x_proj_weight, self.split, dim=1)
        weight_KFD = torch.cat((B_KND, C_KND, dt_KRD), dim=1)
        if u_BLD.is_cuda:
            weight_KFD = F.pad(weight_KFD, (0, 0, 0, -weight_KFD.shape[1] % 8))
        projected_BLE = F.linear(u_BLD, weight_KFD.flatten(0, 1))
        projected_BHWKF = torch.unflatten(torch.unflatten(projected_BLE, -1, (NUM_DIRECTIONS, -1)), 1, size)
        rank, states, _ = self.split
        B_BHWKN, C_BHWKN, dt_BHWKR = torch.split_with_sizes(
            projected_BHWKF[..., : 2 * states + rank], (states, states, rank), dim=-1
        )
        A_log_KDN = torch.unflatten(self.A_logs, 0, (NUM_DIRECTIONS, -1))
        D_KD = torch.unflatten(self.Ds, 0, (NUM_DIRECTIONS, -1))
        weights = (self.dt_projs_weight, self.dt_projs_bias, A_log_KDN, D_KD)
        return self.scan(torch.unflatten(u_BLD, 1, size), dt_BHWKR, B_BHWKN, C_BHWKN, *weights).flatten(1, 2)


@torch.no_grad()
def _initialize(module: nn.Module) -> None:
    """Upstream's initialization, drawn from torch's global generator."""
    if any(each.is_meta for each in module.parameters(recurse=False)):
        return  # nothing to draw; torch would import its compiler for it, which takes a second
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):  # also the depthwise one: as upstream, its fan-out ignores the groups
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, SS2D):
        ways, inner, rank = module.dt_projs_weight.shape
        nn.init.uniform_(module.x_proj_weight, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(module.dt_projs_weight, -(rank**-0.5), rank**-0.5)
        dt_KD = torch.empty(ways, inner).uniform_(math.log(_DT_MIN), math.log(_DT_MAX)).exp().clamp(min=_DT_FLOOR)
        module.dt_projs_bias.copy_(dt_KD + torch.log(-torch.expm1(-dt_KD)))  # the inverse of softplus
        module.A_logs.copy_(torch.arange(1, module.A_logs.shape[1] + 1).log().expand_as(module.A_logs))
        nn.init.ones_(module.Ds)
