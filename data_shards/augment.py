"""Random changes of a whole batch at once, on the batch's device. The only module here that imports torch.

All geometric changes of an image are one affine map and one interpolation; what comes in from outside the image is
its reflection. Legend: B batch, C channels, H height, W width; maps work in grid_sample's coordinates, where the
image spans [-1, 1] in x and in y.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from data_shards.augment_config import AugmentConfig

# One column of draws for each random number of an image, so that switching one change off moves no other.
_DRAWS = ("hflip", "vflip", "rot90", "shift_x", "shift_y", "scale", "rotate", "brightness", "contrast")
_ERASE_DRAWS = ("erase", "erase_x", "erase_y", "erase_width", "erase_height")


def augment(images_BCHW: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """The batch with every image changed at random, floats in [0, 1] like the input; same shape, device and dtype.

    The generator is one on the CPU, wherever the images are, so that CPU and GPU draw the same changes; the same
    state and images give the same result.

    Raises:
        ValueError: the images are not floats.
    """
    if not images_BCHW.is_floating_point():
        raise ValueError(f"images to augment are {images_BCHW.dtype}, but must be floats in [0, 1]: convert them first")
    names = _DRAWS + _ERASE_DRAWS
    table = torch.rand((len(images_BCHW), len(names)), generator=generator).to(images_BCHW)
    draws = dict(zip(names, table.unbind(1), strict=True))
    if config.moves_pixels:
        images_BCHW = _moved(images_BCHW, draws, config)
    if config.brightness or config.contrast:
        images_BCHW = _relit(images_BCHW, draws, config)
    if config.erase:
        images_BCHW = _erased(images_BCHW, draws, config.erase)
    return images_BCHW


def _moved(images_BCHW: Tensor, draws: dict[str, Tensor], config: AugmentConfig) -> Tensor:
    height, width = images_BCHW.shape[-2:]
    x_B1W, y_BH1 = _centres(width, images_BCHW)[None, None, :], _centres(height, images_BCHW)[None, :, None]
    # Written out rather than as affine_grid and matrix products: for maps this small those cost more than sampling.
    (xx, xy, x0), (yx, yy, y0) = (
        [value[:, None, None] for value in row] for row in _affine(draws, config, aspect=height / width)
    )
    grid_BHW2 = torch.stack([xx * x_B1W + (xy * y_BH1 + x0), yx * x_B1W + (yy * y_BH1 + y0)], 3)
    return functional.grid_sample(
        images_BCHW, grid_BHW2, mode="bilinear", padding_mode="reflection", align_corners=False
    )


def _centres(length: int, like: Tensor) -> Tensor:
    """Where the centres of `length` pixels in a row lie."""
    return (torch.arange(length, device=like.device, dtype=like.dtype) * 2 + 1) / length - 1


def _affine(draws: dict[str, Tensor], config: AugmentConfig, *, aspect: float) -> tuple[tuple[Tensor, ...], ...]:
    """For each image the map from a place in the result to the place in the source that it is taken from.

    The source's x = xx * x + xy * y + x0 and y = yx * x + yy * y + y0; returned as ((xx, xy, x0), (yx, yy, y0)).
    """
    # Enlarged by a factor as often as shrunk by it.
    zoom = torch.exp(_either_way(draws["scale"], math.log1p(config.scale)))
    angle = _either_way(draws["rotate"], math.radians(config.rotate))
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    # Turned in pixels, not in [-1, 1], or an image that is not square would be sheared.
    xx, xy, yx, yy = cos, -sin * aspect, sin / aspect, cos
    if config.rot90:
        turns = (draws["rot90"] * 4).long().clamp(max=3)
        # Exact integers, so that a quarter turn alone moves pixels without blurring them.
        qc, qs = xx.new_tensor([1, 0, -1, 0])[turns], xx.new_tensor([0, 1, 0, -1])[turns]
        xx, xy, yx, yy = qc * xx - qs * yx, qc * xy - qs * yy, qs * xx + qc * yx, qs * xy + qc * yy
    mirror_x, mirror_y = _sign(draws["hflip"], config.hflip), _sign(draws["vflip"], config.vflip)
    x0, y0 = (_either_way(draws[axis], 2 * config.translate) for axis in ("shift_x", "shift_y"))
    return (xx * mirror_x, xy * mirror_y, x0), (yx * mirror_x, yy * mirror_y, y0)


def _relit(images_BCHW: Tensor, draws: dict[str, Tensor], config: AugmentConfig) -> Tensor:
    factor = torch.exp(_either_way(draws["contrast"], math.log1p(config.contrast)))[:, None, None, None]
    shift = _either_way(draws["brightness"], config.brightness)[:, None, None, None]
    mean = images_BCHW.mean((1, 2, 3), keepdim=True)
    return torch.addcmul(mean * (1 - factor) + shift, images_BCHW, factor).clamp_(0, 1)


def _erased(images_BCHW: Tensor, draws: dict[str, Tensor], probability: float) -> Tensor:
    height, width = images_BCHW.shape[-2:]
    inside_BHW = (
        _span(draws["erase_y"], draws["erase_height"], height)[:, :, None]
        & _span(draws["erase_x"], draws["erase_width"], width)[:, None, :]
        & (draws["erase"] < probability)[:, None, None]
    )
    return torch.where(inside_BHW[:, None], images_BCHW.mean((1, 2, 3), keepdim=True), images_BCHW)


def _span(place: Tensor, extent: Tensor, length: int) -> Tensor:
    """(B, length) bool: a run of 0.2 to 0.4 of the length somewhere inside it."""
    run = (0.2 + 0.2 * extent) * length
    first = place * (length - run)
    at = torch.arange(length, device=place.device)[None, :]
    return (at >= first[:, None]) & (at < (first + run)[:, None])


def _either_way(draw: Tensor, most: float) -> Tensor:
    """Uniform draws in [0, 1) spread over [-most, most)."""
    return (2 * draw - 1) * most


def _sign(draw: Tensor, probability: float) -> Tensor:
    return torch.where(draw < probability, -1.0, 1.0).to(draw)
