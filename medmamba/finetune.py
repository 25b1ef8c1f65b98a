"""Fine-tuning: copying initial weights into a model, choosing its head, and freezing parameters."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from medmamba.checkpoint import load_state
from medmamba.config import VARIANTS, ConvNetConfig, MedMambaConfig
from medmamba.model import build_model

HEAD = ("head.weight", "head.bias")  # in every network here, with one row per class
NEW_HEAD = "new head"


@dataclass(frozen=True)
class Head:
    """The choice of the head: `rows` are the old head's rows in the order of the new classes; None: a new head."""

    rows: tuple[int, ...] | None
    reason: str
    """One line for the user."""

    @property
    def is_new(self) -> bool:
        """Whether the head starts with random weights."""
        return self.rows is None


def choose_head(card: Mapping[str, Any], classes: Sequence[str], task: str) -> Head:
    """Chooses the head for data with these classes and this task; `card` belongs to the weights and may be empty.

    The head is kept if the class names are the same in any order. Otherwise it is entirely new, because kept rows next
    to random ones would start with scores of a different scale. Weights without class names (upstream checkpoints) may
    have the same number of other classes, so their head is never kept.
    """
    old = list(card.get("classes", ()))
    if not old:
        return Head(None, f"{NEW_HEAD} for {_count(classes)}: the weights do not name their classes")
    if set(old) != set(classes):
        return Head(None, f"{NEW_HEAD} for {_count(classes)}: the weights have other classes ({_names(old)})")
    if (card.get("task") == "multilabel") != (task == "multilabel"):
        return Head(None, f"{NEW_HEAD}: the weights were trained for the task {card.get('task')}, the data is {task}")
    rows = tuple(old.index(name) for name in classes)
    if rows == tuple(range(len(rows))):
        return Head(rows, f"head kept: the same {_count(classes)}")
    return Head(rows, f"head kept and reordered: the same {_count(classes)} in another order")


def start_from(model: nn.Module, state: Mapping[str, Tensor], head: Head, *, where: str) -> None:
    """Copies the weights and buffers of `state` into `model`; a new head keeps its initialization.

    `where` names the weights in errors. Raises CheckpointError if they belong to another network.
    """
    taken = dict(state)
    for name in HEAD:
        if name in taken:
            taken[name] = model.state_dict()[name] if head.rows is None else taken[name][list(head.rows)]
    load_state(model, taken, where=where)


def network_difference(weights: MedMambaConfig | ConvNetConfig, wanted: MedMambaConfig | ConvNetConfig) -> str:
    """How the network of the weights differs from the wanted one, and the options that match it; empty if it does not.

    Settings that do not affect the tensors (drop_path) and the number of classes may differ.
    """
    old, new = _shape(weights), _shape(wanted)
    differing = [name for name in old if old[name] != new.get(name)]
    if not differing:
        return ""
    changes = ", ".join(f"{name} {_plain(old[name])} and not {_plain(new.get(name, 'none'))}" for name in differing)
    return f"{changes}; use {' '.join(_options(weights, wanted))}, or other weights"


def check_frozen(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The parameter `names` that match one of the patterns (shell wildcards; `*` also matches dots).

    Raises ValueError if a pattern matches none, or if all parameters would be frozen.
    """
    frozen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(
                f"train.freeze {pattern!r} does not match the name of any parameter (* matches any characters); did "
                f"you mean {', '.join(_close(names, pattern))}?"
            )
        frozen.update(found)
    if frozen and len(frozen) == len(set(names)):
        raise ValueError(
            f"train.freeze {' '.join(patterns)} freezes all {len(frozen)} parameters and leaves nothing to train; keep "
            f"at least the head trainable ({HEAD[0].partition('.')[0]}.*)"
        )
    return frozen


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes the parameters that match. A BatchNorm whose parameters are all frozen becomes a FrozenNorm.

    Raises ValueError like `check_frozen`.
    """
    frozen = check_frozen([name for name, _ in model.named_parameters()], patterns)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and not any(p.requires_grad for p in module.parameters()):
            model.set_submodule(name, FrozenNorm.of(module))


class FrozenNorm(nn.BatchNorm2d):
    """A BatchNorm that always uses its running statistics and never updates them, even in training mode."""

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> FrozenNorm:
        """A copy of `norm`; its tensors keep their names in the model."""
        held = cls(norm.num_features, eps=norm.eps, momentum=norm.momentum, device=norm.weight.device)
        held.load_state_dict(norm.state_dict())
        return held.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrozenNorm:
        """Stays in eval mode."""
        return super().train(False)


def parameter_names(config: MedMambaConfig | ConvNetConfig) -> list[str]:
    """The names of a network's parameters, without allocating memory for it."""
    with torch.device("meta"):
        return [name for name, _ in build_model(config, scan="reference", device="meta").named_parameters()]


def _shape(config: MedMambaConfig | ConvNetConfig) -> dict[str, Any]:
    """Option -> value, for the options that determine the tensors."""
    if isinstance(config, ConvNetConfig):
        return {"kind": config.kind, "widths": config.widths, "blocks": config.blocks}
    sizes = {"dims": config.resolved_dims, "depths": config.resolved_depths}
    return {"kind": config.kind, **sizes, "branches": config.branches, "d_state": config.d_state}


def _options(config: MedMambaConfig | ConvNetConfig, wanted: MedMambaConfig | ConvNetConfig) -> list[str]:
    """The `--model.*` options that make `wanted` the network of `config`."""
    old, new = _shape(config), _shape(wanted)
    differing = {name: value for name, value in old.items() if value != new.get(name)}
    variant = next((name for name, sizes in VARIANTS.items() if sizes == (old.get("dims"), old.get("depths"))), "")
    named = isinstance(wanted, MedMambaConfig) and (wanted.dims or wanted.depths)
    if variant and not named and {"dims", "depths"} & set(differing):
        differing = {"variant": variant} | {k: v for k, v in differing.items() if k not in ("dims", "depths")}
    return [f"--model.{name.replace('_', '-')} {_plain(value)}" for name, value in differing.items()]


def _close(names: Sequence[str], pattern: str) -> list[str]:
    """Matching patterns that resemble the given one."""
    parts = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)}
    bare = pattern.rstrip(".*")
    near = difflib.get_close_matches(bare, sorted({*parts, *names}), n=3, cutoff=0.5)
    near = near or sorted({name.partition(".")[0] for name in names})
    return [name if name in names else f"{name}.*" for name in near]


def _count(classes: Sequence[str]) -> str:
    return f"{len(classes)} class{'es' if len(classes) > 1 else ''}"


def _names(classes: Sequence[str]) -> str:
    return ", ".join(classes[:5]) + (f" and {len(classes) - 5} more" if len(classes) > 5 else "")


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
