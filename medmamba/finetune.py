"""Training that starts from weights: what a fresh model takes from them, which head it gets, and what stays frozen."""

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

HEAD = ("head.weight", "head.bias")  # of every network here: one row per class
NEW_HEAD = "new head"


@dataclass(frozen=True)
class Head:
    """What becomes of the head: `rows` are the rows of the old one in the order of the new classes; None: a new one."""

    rows: tuple[int, ...] | None
    reason: str
    """In one line, for the user."""

    @property
    def is_new(self) -> bool:
        """Whether the head starts at random."""
        return self.rows is None


def choose_head(card: Mapping[str, Any], classes: Sequence[str], task: str) -> Head:
    """The head for data of these classes and this task; `card` is that of the weights, empty where they have none.

    It is kept where the class names are the same, in whatever order. Otherwise all of it is new: rows of some classes
    beside random ones would start with scores of different size. Weights without class names (an upstream checkpoint)
    may count the same number of other classes, so their head is never kept.
    """
    old = list(card.get("classes", ()))
    if not old:
        return Head(None, f"{NEW_HEAD} for {_count(classes)}: the weights do not say which classes theirs was for")
    if set(old) != set(classes):
        return Head(None, f"{NEW_HEAD} for {_count(classes)}: the weights know others ({_names(old)})")
    if (card.get("task") == "multilabel") != (task == "multilabel"):
        return Head(None, f"{NEW_HEAD}: the weights were trained for the task {card.get('task')}, the data are {task}")
    rows = tuple(old.index(name) for name in classes)
    if rows == tuple(range(len(rows))):
        return Head(rows, f"head kept: the same {_count(classes)}")
    return Head(rows, f"head kept, its rows reordered: the same {_count(classes)} in another order")


def start_from(model: nn.Module, state: Mapping[str, Tensor], head: Head, *, where: str) -> None:
    """Copies the weights and BatchNorm's buffers of `state` into `model`; a new head stays as it was initialized.

    `where` names the weights in errors. CheckpointError: they are of another network.
    """
    taken = dict(state)
    for name in HEAD:
        if name in taken:
            taken[name] = model.state_dict()[name] if head.rows is None else taken[name][list(head.rows)]
    load_state(model, taken, where=where)


def network_difference(weights: MedMambaConfig | ConvNetConfig, wanted: MedMambaConfig | ConvNetConfig) -> str:
    """How the network of the weights differs from the wanted one, and the options that give it; empty if it does not.

    What leaves no trace in the tensors (drop-path), and the number of classes, may differ.
    """
    old, new = _shape(weights), _shape(wanted)
    differing = [name for name in old if old[name] != new.get(name)]
    if not differing:
        return ""
    told = ", ".join(f"{name} {_plain(old[name])} and not {_plain(new.get(name, 'none'))}" for name in differing)
    return f"{told}; use {' '.join(_options(weights, wanted))}, or other weights"


def check_frozen(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The parameters of these `names` that match one of the patterns (shell wildcards; `*` also matches dots).

    ValueError: a pattern matches none, or nothing is left to train.
    """
    frozen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(
                f"train.freeze {pattern!r} matches no parameter of the network: a pattern must match the names of some "
                f"(* stands for any characters); did you mean {', '.join(_close(names, pattern))}?"
            )
        frozen.update(found)
    if frozen and len(frozen) == len(set(names)):
        raise ValueError(
            f"train.freeze {' '.join(patterns)} freezes all {len(frozen)} parameters: nothing would be trained; leave "
            f"out at least the head ({HEAD[0].partition('.')[0]}.*)"
        )
    return frozen


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Takes the parameters that match out of the training. A BatchNorm whose own are all frozen becomes a FrozenNorm.

    ValueError as `check_frozen`.
    """
    frozen = check_frozen([name for name, _ in model.named_parameters()], patterns)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and not any(p.requires_grad for p in module.parameters()):
            model.set_submodule(name, FrozenNorm.of(module))


class FrozenNorm(nn.BatchNorm2d):
    """A BatchNorm that always uses its running statistics and never changes them, also while the model trains."""

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> FrozenNorm:
        """One with the tensors of `norm`, which keep their names in the model."""
        held = cls(norm.num_features, eps=norm.eps, momentum=norm.momentum, device=norm.weight.device)
        held.load_state_dict(norm.state_dict())
        return held.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrozenNorm:
        """Stays in eval mode."""
        return super().train(False)


def parameter_names(config: MedMambaConfig | ConvNetConfig) -> list[str]:
    """The names of the parameters of a network; no memory is taken for it."""
    from medmamba.model import build_model

    with torch.device("meta"):
        return [name for name, _ in build_model(config, scan="reference", device="meta").named_parameters()]


def _shape(config: MedMambaConfig | ConvNetConfig) -> dict[str, Any]:
    """Option -> value, of what decides the tensors."""
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
    """Patterns that do match, and resemble the one that does not."""
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
