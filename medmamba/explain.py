"""Where a network looks: Grad-CAM, occlusion, and the check that a map depends on what the network has learned.

Grad-CAM (Selvaraju et al., arXiv 1610.02391) of a block's output A and a class score y:

    alpha_c = mean over positions of dy / dA_c,      map = ReLU(sum over c of alpha_c A_c)

A block of MedMamba has two branches and so two maps: one of its convolutions, one of its scan. Occlusion (Zeiler and
Fergus, arXiv 1311.2901) covers one patch after another and measures how far the class falls; it needs neither a
gradient nor a layer. The check is that of Adebayo et al. (arXiv 1810.03292): a map that stays the same when the weights
become random says nothing about the network.
Shapes: N images, B batch, H W pixels, C channels or classes, h w positions of a block, L = h w.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)
from torch import Tensor, nn

from medmamba.config import PATCH
from medmamba.convnet import ConvNet
from medmamba.model import MedMamba, SSConvSSM, build_model
from medmamba.precision import exact_float32
from medmamba.preprocess import preprocess

Branch = Literal["conv", "scan"]
Explainer = Callable[[nn.Module, np.ndarray, int], np.ndarray]
"""(model, image_1HWC, target_class) -> map_HW, as `grad_cam` and `occlusion` are."""
MOST_AGREEMENT = 0.5  # rank correlation with the maps of random weights, beyond which a map has failed its check


def grad_cam(
    model: nn.Module, image_1HWC: np.ndarray, target_class: int, branch: Branch = "conv", *, block: int = -1
) -> np.ndarray:
    """Where a branch of a block supports a class: float32 (H, W) in [0, 1], 1 where most; all 0 where nowhere.

    `image_1HWC` is uint8 at the size that the network reads. `block` counts the blocks of all stages; the map has that
    block's resolution, enlarged: the last one has 7 x 7 positions for 224 px, and 2 x 2 for 64 px, where an earlier one
    shows more (`finest_block`). Raises ValueError for a model in training mode, and a class, block or branch that it
    lacks.
    """
    site = _site(model, branch, block)
    _check(model, image_1HWC, target_class)
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        # A leaf of its own: the gradient ends here, whether or not the weights before it want one.
        kept.append((F.relu(output) if isinstance(site, nn.BatchNorm2d) else output).detach().requires_grad_())
        return kept[0]

    hook = site.register_forward_hook(keep)
    try:
        with torch.enable_grad(), exact_float32():
            score = model(_inputs(model, image_1HWC))[0, target_class]
            (slope,) = torch.autograd.grad(score, kept[0])
    finally:
        hook.remove()
    size = image_1HWC.shape[1:3]
    # The convolution's output is (1,C,h,w), the scan's (1,L,C).
    active_CL, slope_CL = (x.detach()[0].flatten(1) if x.ndim == 4 else x.detach()[0].T for x in (kept[0], slope))
    map_hw = F.relu(slope_CL.mean(1) @ active_CL).reshape(_positions(model, block, size))
    enlarged = F.interpolate(map_hw[None, None], size=tuple(size), mode="bilinear", align_corners=False)
    return _to_unit(enlarged[0, 0].cpu().numpy())


def finest_block(model: nn.Module, size: tuple[int, int], least: int = 7) -> int:
    """The last block whose maps have at least so many positions a side for images of (height, width); else the first.

    Later blocks know more of the class and less of the place.
    """
    blocks = range(len(_blocks(model)))
    return max((index for index in blocks if min(_positions(model, index, size)) >= least), default=0)


def occlusion(
    model: nn.Module,
    image_1HWC: np.ndarray,
    target_class: int,
    *,
    task: str = "multiclass",
    patch: int = 0,
    batch_size: int = 32,
) -> np.ndarray:
    """How far a class falls where a patch is covered: float32 (H, W) in [0, 1], 1 where most; 0 where it does not fall.

    Measured in the class's log-odds, which do not saturate as probabilities do. A patch is a square of `patch` pixels
    (0: an eighth of the longer side) of the image's mean color, and moves by half of itself, so a map takes about 250
    forward passes; `batch_size` of them are computed at once. Raises ValueError as `grad_cam`.
    """
    _check(model, image_1HWC, target_class)
    height, width = image_1HWC.shape[1:3]
    side = min(patch or max(1, max(height, width) // 8), height, width)
    corners = [(top, left) for top in _starts(height, side) for left in _starts(width, side)]
    color_C = np.rint(image_1HWC.mean((0, 1, 2))).astype(np.uint8)
    whole = _log_odds(model, image_1HWC, target_class, task)[0]
    fall_HW, times_HW = np.zeros((height, width)), np.zeros((height, width))
    for first in range(0, len(corners), batch_size):
        chosen = corners[first : first + batch_size]
        covered_BHWC = np.repeat(image_1HWC, len(chosen), axis=0)
        for image_HWC, (top, left) in zip(covered_BHWC, chosen, strict=True):
            image_HWC[top : top + side, left : left + side] = color_C
        for odds, (top, left) in zip(_log_odds(model, covered_BHWC, target_class, task), chosen, strict=True):
            fall_HW[top : top + side, left : left + side] += whole - odds
            times_HW[top : top + side, left : left + side] += 1
    return _to_unit(np.maximum(fall_HW / times_HW, 0))


class SanityCheck(NamedTuple):
    """How much maps agree with those of the same network under ever more random weights."""

    layers: tuple[str, ...]
    """What has become random, from the head to the stem; each step keeps the random weights of those before."""
    agreement: tuple[float, ...]
    """After each step: Spearman's rank correlation with the maps of the trained weights, mean over the images."""

    @property
    def passed(self) -> bool:
        """Whether the maps of entirely random weights are others."""
        return abs(self.agreement[-1]) < MOST_AGREEMENT


def sanity_check(
    model: nn.Module, images_NHWC: np.ndarray, targets: Sequence[int], explain: Explainer, *, seed: int = 0
) -> SanityCheck:
    """Compares the maps of each image and its class with those under weights that become random layer by layer.

    The layers are initialized again as a fresh network of the same config has them. `explain` is called as
    `explain(model, image_1HWC, target_class)`. Raises ValueError without images.
    """
    if len(images_NHWC) == 0:
        raise ValueError("0 images: the check of a map needs some; five or more make it steady")
    asked = [(images_NHWC[at : at + 1], target) for at, target in enumerate(targets)]
    learned = [explain(model, image_1HWC, target) for image_1HWC, target in asked]
    layers, agreement = [], []
    for layer, changed in randomized(model, seed=seed):
        maps = [explain(changed, image_1HWC, target) for image_1HWC, target in asked]
        layers.append(layer)
        agreement.append(float(np.mean([_rank_correlation(a, b) for a, b in zip(learned, maps, strict=True)])))
    return SanityCheck(tuple(layers), tuple(agreement))


def randomized(model: nn.Module, *, seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """(layer, copy of the model in which it and all later layers are random), from the head to the stem.

    It is one copy, changed from step to step.
    """
    known: Any = model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build_model(known.config, scan=_scan_of(known)).to(_device(model))
    changed = copy.deepcopy(model)
    for name in reversed(_layers(model)):
        changed.get_submodule(name).load_state_dict(fresh.get_submodule(name).state_dict())
        yield name, changed


def _layers(model: nn.Module) -> list[str]:
    """The names of the parts that become random together, from stem to head: stages, or blocks where there are none."""
    found: list[str] = []
    for name, child in model.named_children():
        grouped = isinstance(child, nn.ModuleList | nn.Sequential)
        found += [f"{name}.{inner}" for inner, _ in child.named_children()] if grouped else [name]
    return found


def _scan_of(model: Any) -> str:
    return "auto" if model.scan_backend == "none" else model.scan_backend


def _rank_correlation(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """Spearman's; 0 where a map is the same everywhere, as it then ranks nothing."""
    from scipy.stats import rankdata

    a, b = rankdata(a_HW), rankdata(b_HW)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0


def _blocks(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """(block, how many times the map of the stem has been halved before its output), in order."""
    if isinstance(model, MedMamba):
        return [(block, at) for at, stage in enumerate(model.layers) for block in _children(stage, "blocks")]
    if isinstance(model, ConvNet):
        return [(block, index // model.config.blocks) for index, block in enumerate(model.blocks)]
    raise ValueError(f"a {type(model).__name__} has no blocks that are known here; explain a MedMamba or a ConvNet")


def _children(module: nn.Module, name: str) -> Iterator[nn.Module]:
    return module.get_submodule(name).children()


def _site(model: nn.Module, branch: str, block: int) -> nn.Module:
    """The module whose output is explained."""
    blocks = _blocks(model)
    if not -len(blocks) <= block < len(blocks):
        raise ValueError(f"block {block} does not exist: the network has {len(blocks)}, counted from 0")
    chosen = blocks[block][0]
    if isinstance(chosen, SSConvSSM):
        branches: dict[str, nn.Module | None] = {"conv": chosen.conv33conv33conv11, "scan": chosen.self_attention}
        found = branches.get(branch)
    else:
        last = block in (-1, len(blocks) - 1)
        found = (model.get_submodule("norm") if last else chosen) if branch == "conv" else None
    if found is None:
        raise ValueError(f"branch {branch!r}: the blocks of this network do not have it; choose conv or scan")
    return found


def _positions(model: nn.Module, block: int, size: Sequence[int]) -> tuple[int, int]:
    """Height and width of a block's maps for images of this size: halving drops an odd rest in MedMamba alone."""
    halvings = _blocks(model)[block][1]
    up = 0 if isinstance(model, MedMamba) else (1 << halvings) - 1
    height, width = ((side // PATCH + up) >> halvings for side in size)
    return height, width


def _check(model: nn.Module, image_1HWC: np.ndarray, target_class: int) -> None:
    num_classes = len(model.get_submodule("head").get_parameter("bias"))
    if not 0 <= target_class < num_classes:
        raise ValueError(f"class {target_class} does not exist: the network has {num_classes}, counted from 0")
    if model.training:
        raise ValueError("the model is in training mode, in which a score is a matter of chance; call model.eval()")
    if image_1HWC.ndim != 4 or len(image_1HWC) != 1:
        raise ValueError(f"images of shape {image_1HWC.shape}: explain one at a time, as (1, height, width, channels)")


def _inputs(model: nn.Module, images_BHWC: np.ndarray) -> Tensor:
    return preprocess(torch.from_numpy(np.ascontiguousarray(images_BHWC)).to(_device(model)))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _log_odds(model: nn.Module, images_BHWC: np.ndarray, target_class: int, task: str) -> np.ndarray:
    """Of the class against all others (B,); against its absence where any number of classes may apply."""
    with torch.inference_mode(), exact_float32():
        logits_BC = model(_inputs(model, images_BHWC)).float()
    target_B = logits_BC[:, target_class]
    if task != "multilabel" and logits_BC.shape[1] > 1:
        others = [each for each in range(logits_BC.shape[1]) if each != target_class]
        target_B = target_B - logits_BC[:, others].logsumexp(1)
    return np.asarray(target_B.cpu())


def _starts(length: int, side: int) -> list[int]:
    """Where patches begin along an axis: half a patch apart, the last one at the end."""
    return [*range(0, length - side, max(1, side // 2)), length - side]


def _to_unit(map_HW: np.ndarray) -> np.ndarray:
    largest = map_HW.max()
    return (map_HW / largest if largest > 0 else np.zeros_like(map_HW)).astype(np.float32)
