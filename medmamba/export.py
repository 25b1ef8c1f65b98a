"""Trained networks for other runtimes: ONNX, a torch.export program, and the paper's own code.

ONNX and torch.export hold the preprocessing too: uint8 images (batch, height, width, channels) of the card's size in,
probabilities (batch, classes) out, any batch. The selective scan is a loop operator in both (ops/ss2d_scan/loop.py).
Every file is read again in its own runtime and compared with the network before it is given its name.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medmamba.checkpoint import export_upstream, load_upstream
from medmamba.loss import scores
from medmamba.model import SS2D, MedMamba
from medmamba.precision import exact_float32
from medmamba.preprocess import preprocess

TOLERANCE = 1e-5  # probabilities may differ by so much from the network's
BATCHES = (1, 5)  # batch sizes that are compared
_TRACED = 2  # torch takes a batch of 1 for a constant


class ExportError(ValueError):
    """A network that cannot be exported, or a file that does not do what the network does."""


@dataclass(frozen=True)
class Export:
    """A file that was written and compared."""

    path: Path
    size_bytes: int
    seconds: float
    """For tracing, writing and comparing."""
    differences: dict[int, float] = field(default_factory=dict)
    """Batch size -> largest difference from the network's probabilities; empty where the tensors are equal."""


def to_onnx(model: nn.Module, card: Mapping[str, Any], path: Path) -> Export:
    """Writes the network with its preprocessing as ONNX: input `images`, output `probabilities`.

    The metadata of the file say classes, task, image_size and channels. ExportError: the packages of the extra `export`
    are missing, or onnxruntime computes something else.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise ExportError(
            f"ONNX needs the package {error.name}, which is not installed: pip install 'medmamba[export]'"
        ) from error

    def write(classifier: nn.Module, temporary: Path) -> None:
        program = torch.onnx.export(
            classifier,
            (_images(card, _TRACED),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=_shapes(),
        )
        if program is None:
            raise ExportError("torch.onnx.export returned nothing; report this as a defect")
        for key, value in _described(card).items():
            program.model.metadata_props[key] = value
        program.save(temporary)

    def read(temporary: Path) -> Callable[[Tensor], np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(temporary, options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(["probabilities"], {"images": images.numpy()})[0]

    return _exported(model, card, path, write, read)


def to_torch_export(model: nn.Module, card: Mapping[str, Any], path: Path) -> Export:
    """Writes the network with its preprocessing as a program that `torch.export.load(path).module()` runs.

    It needs torch and nothing of this project. Its extra file `card.json` says classes, task, image_size and channels.
    ExportError: the program computes something else.
    """

    def write(classifier: nn.Module, temporary: Path) -> None:
        program = torch.export.export(classifier, (_images(card, _TRACED),), dynamic_shapes=_shapes(), strict=False)
        torch.export.save(program, temporary, extra_files={"card.json": json.dumps(dict(card))})

    def read(temporary: Path) -> Callable[[Tensor], np.ndarray]:
        program = torch.export.load(temporary).module()
        return lambda images: program(images).numpy()

    return _exported(model, card, path, write, read)


def to_upstream(model: nn.Module, path: Path) -> Export:
    """Writes the state dict that the paper's code loads: `net.load_state_dict(torch.load(path))`.

    ExportError: the network is not one that the paper's code builds.
    """
    if not isinstance(model, MedMamba) or model.config.branches != "both":
        kind = f"a MedMamba with branches {model.config.branches!r}" if isinstance(model, MedMamba) else "no MedMamba"
        raise ExportError(f"the paper's code cannot load {kind}: choose onnx or torch-export")
    begun = time.monotonic()
    with _sibling(path) as temporary:
        export_upstream(model, temporary)
        stored, config = load_upstream(temporary)
        own = model.state_dict()
        same = set(stored) == set(own) and all(torch.equal(stored[name], own[name].cpu()) for name in own)
        if not same or config.resolved_dims != model.config.resolved_dims:
            raise ExportError(f"{path}: the tensors that were written are not those of the network; report this")
    return Export(path, path.stat().st_size, time.monotonic() - begun)


class _Classifier(nn.Module):
    """Images uint8 (B,H,W,C) -> probabilities (B, classes), with a scan that can leave torch."""

    def __init__(self, model: nn.Module, task: str):
        from medmamba.ops.ss2d_scan import loop

        super().__init__()
        self.model = copy.deepcopy(model).cpu().eval()
        self.task = task
        for module in self.model.modules():
            if isinstance(module, SS2D):
                module.scan = loop.scan

    def forward(self, images: Tensor) -> Tensor:
        return scores(self.model(preprocess(images)), self.task)


def _exported(
    model: nn.Module,
    card: Mapping[str, Any],
    path: Path,
    write: Callable[[nn.Module, Path], None],
    read: Callable[[Path], Callable[[Tensor], np.ndarray]],
) -> Export:
    """Writes, reads again, compares, and only then gives the file its name."""
    begun = time.monotonic()
    if model.training:
        raise ExportError("the model is in training mode, in which a score is a matter of chance; call model.eval()")
    with _sibling(path) as temporary, _quiet(), torch.no_grad():
        write(_Classifier(model, card["task"]).eval(), temporary)
        differences = _compare(model, card, read(temporary))
        if not max(differences.values()) <= TOLERANCE:
            raise ExportError(
                f"{path}: the exported network differs by {max(differences.values()):.1e} from the original, more than "
                f"{TOLERANCE:.0e}; it was not kept"
            )
    return Export(path, path.stat().st_size, time.monotonic() - begun, differences)


def _compare(model: nn.Module, card: Mapping[str, Any], run: Callable[[Tensor], np.ndarray]) -> dict[int, float]:
    device = next(model.parameters()).device
    differences = {}
    for batch in BATCHES:
        images = _images(card, batch)
        with exact_float32():
            own = scores(model(preprocess(images.to(device))), card["task"]).cpu().numpy()
        differences[batch] = float(np.abs(run(images) - own).max())
    return differences


def _images(card: Mapping[str, Any], batch: int) -> Tensor:
    """Uint8 images of the card's size: soft shapes and noise, the same each time."""
    size = card["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    draw = np.random.default_rng(batch)
    y, x = np.mgrid[0:height, 0:width]
    waves = draw.uniform(2, 12, (batch, card["channels"], 1, 1))
    shapes = np.sin(x / width * waves) * np.cos(y / height * waves[:, ::-1])
    pixels = 127 + 80 * shapes + draw.normal(0, 30, shapes.shape)
    return torch.from_numpy(np.moveaxis(pixels.clip(0, 255).astype(np.uint8), 1, -1).copy())


def _shapes() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1)},)


def _described(card: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(card[key]) for key in ("classes", "task", "image_size", "channels")}


@contextlib.contextmanager
def _sibling(path: Path) -> Iterator[Path]:
    """A file next to `path` that takes its name at the end; removed where that is not reached."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays at the end: torch warns about others.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter tells of its own parts, torchvision's absence for one."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
