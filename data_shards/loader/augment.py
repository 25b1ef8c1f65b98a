"""Random augmentation of a batch on its device. The only module here that imports torch.

The changes of an image depend only on (seed, epoch, sample), not on the batch, the rank or the device. All geometric
changes of an image are one affine map and one interpolation. Legend: B batch, C channels, H height, W width; maps use
grid_sample's coordinates, where the image spans [-1, 1] in x and in y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_shards.loader.augment_config import AugmentConfig
from data_shards.loader.draws import uniforms

# One column of draws per random number of an image, so that disabling one change does not affect the others.
_DRAWS = (
    *("hflip", "vflip", "rot90", "shift_x", "shift_y", "scale", "rotate", "brightness", "contrast"),
    *("erase", "erase_x", "erase_y", "erase_width", "erase_height", "pad_x", "pad_y", "saturation", "hue"),
)
_CHAINS = 3
_CHAIN_DRAWS = ("rotate", "shear_x", "shear_y", "shift_x", "shift_y", "tone", "strength")
_MIX_DRAWS = _CHAINS * (len(_CHAIN_DRAWS) + 1) + 1
# Purposes of draws, see draws.py.
_CHANGE, _MIX = 0xA0, 0xA1
# Brightness and two color differences (YIQ, NTSC 1953) from red, green and blue.
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
_RGB = tuple(map(tuple, np.linalg.inv(np.array(_YIQ)).tolist()))

_Map = tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def augment(images_BCHW: Tensor, config: AugmentConfig, *, seed: int, epoch: int, sample: np.ndarray) -> Tensor:
    """The batch with every image changed at random, floats in [0, 1] like the input; same shape, device and dtype.

    `sample` (B,) int64 selects the random numbers of each image: the loader's `chance`. They are drawn on the CPU, so
    that CPU and GPU make the same changes.

    Raises:
        ValueError: the images are not floats.
    """
    if not images_BCHW.is_floating_point():
        raise ValueError(f"images to augment are {images_BCHW.dtype}, but must be floats in [0, 1]; convert them first")
    draws = torch.from_numpy(augment_draws(config, seed=seed, epoch=epoch, sample=sample))
    return augment_drawn(images_BCHW, draws.to(images_BCHW), config)


def augment_draws(config: AugmentConfig, *, seed: int, epoch: int, sample: np.ndarray) -> np.ndarray:
    """All random numbers for `augment_drawn`: float32 (B, n) in [0, 1); n depends only on the config."""
    tables = [uniforms(seed, epoch, sample, len(_DRAWS), purpose=_CHANGE)]
    if config.augmix:
        tables.append(uniforms(seed, epoch, sample, _MIX_DRAWS, purpose=_MIX))
    # Truncated to 24 bits, which float32 represents exactly: rounding could give 1.
    draws: np.ndarray = np.floor(np.concatenate(tables, axis=1) * 2**24) / 2**24
    return draws.astype(np.float32)


def augment_drawn(images_BCHW: Tensor, draws_Bn: Tensor, config: AugmentConfig) -> Tensor:
    """`augment` with numbers from `augment_draws` on the images' device; uses only tensors, so it can be compiled."""
    columns = draws_Bn.unbind(1)
    draws, table = dict(zip(_DRAWS, columns, strict=False)), columns[len(_DRAWS) :]
    if config.moves_pixels:
        images_BCHW = _moved(images_BCHW, _affine(draws, config, *images_BCHW.shape[-2:]), config.padding)
    if config.brightness or config.contrast:
        images_BCHW = _relit(images_BCHW, draws, config)
    if (config.saturation or config.hue) and images_BCHW.shape[1] == 3:
        images_BCHW = _recolored(images_BCHW, draws, config)
    if config.augmix:
        images_BCHW = _mixed(images_BCHW, table, config)
    if config.erase:
        images_BCHW = _erased(images_BCHW, draws, config.erase)
    return images_BCHW


def _moved(images_BCHW: Tensor, where: _Map, padding: str) -> Tensor:
    height, width = images_BCHW.shape[-2:]
    x_B1W, y_BH1 = _centers(width, images_BCHW)[None, None, :], _centers(height, images_BCHW)[None, :, None]
    # Explicit, because affine_grid and matrix products cost more than sampling for such small maps.
    (xx, xy, x0), (yx, yy, y0) = ([value[:, None, None] for value in row] for row in where)
    grid_BHW2 = torch.stack([xx * x_B1W + (xy * y_BH1 + x0), yx * x_B1W + (yy * y_BH1 + y0)], 3)
    return functional.grid_sample(images_BCHW, grid_BHW2, mode="bilinear", padding_mode=padding, align_corners=False)


def _centers(length: int, like: Tensor) -> Tensor:
    """Coordinates of the centers of `length` pixels."""
    return (torch.arange(length, device=like.device, dtype=like.dtype) * 2 + 1) / length - 1


def _affine(draws: dict[str, Tensor], config: AugmentConfig, height: int, width: int) -> _Map:
    """For each image, the map from a position in the result to its position in the source.

    The source's x = xx * x + xy * y + x0 and y = yx * x + yy * y + y0; returned as ((xx, xy, x0), (yx, yy, y0)).
    """
    aspect = height / width
    # Symmetric: enlarging by a factor is as likely as shrinking by it.
    zoom = torch.exp(_either_way(draws["scale"], math.log1p(config.scale)))
    angle = _either_way(draws["rotate"], math.radians(config.rotate))
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    # Rotated in pixels, not in [-1, 1], which would shear images that are not square.
    xx, xy, yx, yy = cos, -sin * aspect, sin / aspect, cos
    if config.rot90:
        turns = (draws["rot90"] * 4).long().clamp(max=3)
        # Exact integers, so that a quarter turn alone does not blur.
        qc, qs = _constant([1, 0, -1, 0], xx)[turns], _constant([0, 1, 0, -1], xx)[turns]
        xx, xy, yx, yy = qc * xx - qs * yx, qc * xy - qs * yy, qs * xx + qc * yx, qs * xy + qc * yy
    mirror_x, mirror_y = _sign(draws["hflip"], config.hflip), _sign(draws["vflip"], config.vflip)
    x0, y0 = (_either_way(draws[axis], 2 * config.translate) for axis in ("shift_x", "shift_y"))
    if config.pad_crop:
        choices = 2 * config.pad_crop + 1
        x0 = x0 + 2 / width * ((draws["pad_x"] * choices).floor() - config.pad_crop)
        y0 = y0 + 2 / height * ((draws["pad_y"] * choices).floor() - config.pad_crop)
    return (xx * mirror_x, xy * mirror_y, x0), (yx * mirror_x, yy * mirror_y, y0)


def _relit(images_BCHW: Tensor, draws: dict[str, Tensor], config: AugmentConfig) -> Tensor:
    factor = torch.exp(_either_way(draws["contrast"], math.log1p(config.contrast)))[:, None, None, None]
    shift = _either_way(draws["brightness"], config.brightness)[:, None, None, None]
    mean = images_BCHW.mean((1, 2, 3), keepdim=True)
    return torch.addcmul(mean * (1 - factor) + shift, images_BCHW, factor).clamp_(0, 1)


def _recolored(images_B3HW: Tensor, draws: dict[str, Tensor], config: AugmentConfig) -> Tensor:
    """Rotates colors around the gray axis (hue), and scales their distance from it (saturation)."""
    angle = _either_way(draws["hue"], math.radians(config.hue))
    factor = torch.exp(_either_way(draws["saturation"], math.log1p(config.saturation)))
    cos, sin, zero, one = torch.cos(angle) * factor, torch.sin(angle) * factor, angle * 0, angle * 0 + 1
    rows = [torch.stack(row, 1) for row in ((one, zero, zero), (zero, cos, -sin), (zero, sin, cos))]
    to_yiq, to_rgb = (torch.stack([_constant(row, images_B3HW) for row in matrix]) for matrix in (_YIQ, _RGB))
    change_B33 = to_rgb @ torch.stack(rows, 1) @ to_yiq
    return (change_B33 @ images_B3HW.flatten(2)).view_as(images_B3HW).clamp(0, 1)


def _mixed(images_BCHW: Tensor, table: tuple[Tensor, ...], config: AugmentConfig) -> Tensor:
    """AugMix: blends the image with a mixture of chains of changes, with Dirichlet(1) and Beta(1, 1) weights."""
    weights = torch.stack([-torch.log1p(-table[n]) for n in range(_CHAINS)])
    weights = (weights + 1e-6) / (weights + 1e-6).sum(0)
    mixture = torch.zeros_like(images_BCHW)
    for chain in range(_CHAINS):
        first = _CHAINS + 1 + chain * len(_CHAIN_DRAWS)
        draws = dict(zip(_CHAIN_DRAWS, table[first : first + len(_CHAIN_DRAWS)], strict=True))
        moved = _moved(images_BCHW, _skewed(draws, config.augmix, images_BCHW), config.padding)
        mixture += weights[chain][:, None, None, None] * _toned(moved, draws, config.augmix)
    return torch.lerp(images_BCHW, mixture, table[_CHAINS][:, None, None, None]).clamp(0, 1)


def _skewed(draws: dict[str, Tensor], severity: float, like: Tensor) -> _Map:
    """Rotation by up to 30 degrees, shear and shift by up to 0.3; each change is omitted in half of the chains."""
    aspect = like.shape[-2] / like.shape[-1]
    turn, shear_x, shear_y, x0, y0 = (
        torch.sign(draw - 0.5) * (4 * (draw - 0.5).abs() - 1).clamp(min=0) * most * severity
        for draw, most in zip(
            (draws[name] for name in _CHAIN_DRAWS[:5]), (math.pi / 6, 0.3, 0.3, 0.6, 0.6), strict=True
        )
    )
    cos, sin = torch.cos(turn), torch.sin(turn)
    return ((cos, (shear_x - sin) * aspect, x0), ((shear_y + sin) / aspect, cos, y0))


def _toned(images_BCHW: Tensor, draws: dict[str, Tensor], severity: float) -> Tensor:
    """One change of the intensities: none, full contrast, fewer levels, or the brightest inverted."""
    strength = (draws["strength"] * severity)[:, None, None, None]
    low, high = images_BCHW.amin((1, 2, 3), keepdim=True), images_BCHW.amax((1, 2, 3), keepdim=True)
    stretched = (images_BCHW - low) / (high - low).clamp(min=1e-3)
    levels = torch.floor(2 ** (8 - 4 * strength))  # at least 16 of 256
    fewer = torch.floor(images_BCHW * (levels - 1) + 0.5) / (levels - 1)
    inverted = torch.where(images_BCHW >= 1 - strength, 1 - images_BCHW, images_BCHW)
    choice = (draws["tone"] * 4).long().clamp(max=3)[:, None, None, None]
    found = torch.where(choice == 1, stretched, images_BCHW)
    return torch.where(choice == 2, fewer, torch.where(choice == 3, inverted, found))


def _erased(images_BCHW: Tensor, draws: dict[str, Tensor], probability: float) -> Tensor:
    height, width = images_BCHW.shape[-2:]
    inside_BHW = (
        _span(draws["erase_y"], draws["erase_height"], height)[:, :, None]
        & _span(draws["erase_x"], draws["erase_width"], width)[:, None, :]
        & (draws["erase"] < probability)[:, None, None]
    )
    return torch.where(inside_BHW[:, None], images_BCHW.mean((1, 2, 3), keepdim=True), images_BCHW)


def _span(place: Tensor, extent: Tensor, length: int) -> Tensor:
    """A random run of 0.2 to 0.4 of the length, bool (B, length)."""
    run = (0.2 + 0.2 * extent) * length
    first = place * (length - run)
    at = torch.arange(length, device=place.device)[None, :]
    return (at >= first[:, None]) & (at < (first + run)[:, None])


def _constant(values: Sequence[float], like: Tensor) -> Tensor:
    """The values as a tensor like `like`, created on its device: a CUDA graph cannot contain a copy from the CPU."""
    return torch.stack([like.new_full((), value) for value in values])


def _either_way(draw: Tensor, most: float) -> Tensor:
    """Maps uniform draws from [0, 1) to [-most, most)."""
    return (2 * draw - 1) * most


def _sign(draw: Tensor, probability: float) -> Tensor:
    return torch.where(draw < probability, -1.0, 1.0).to(draw)
