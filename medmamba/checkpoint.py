"""Models on disk: weights.safetensors + model.json, and upstream's checkpoints in and out.

Parameters have upstream's names everywhere, so an upstream file is the same tensors in torch's pickle format.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from medmamba.config import VARIANTS, ConvNetConfig, MedMambaConfig, ModelConfig
from medmamba.model import build_model

WEIGHTS, MODEL = "weights.safetensors", "model.json"
_FORMAT = 1
# Keys below which training scripts keep a state dict, and what torch's wrappers put into the names of its tensors.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "net", "network", "module")
_WRAPPING = ("module", "_orig_mod")
_FIRST_TENSOR = ["patch_embed", "proj", "weight"]
_CONFIG: TypeAdapter[MedMambaConfig | ConvNetConfig] = TypeAdapter(ModelConfig)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that belongs to another network."""


def save_model(folder: Path, model: nn.Module, config: MedMambaConfig | ConvNetConfig, *, card: dict[str, Any]) -> None:
    """Writes weights.safetensors (float32, BatchNorm's buffers too), then model.json with config and card.

    `card` says what a user of the model needs: classes, task, image_size, channels. The same model gives the same
    bytes. Neither file is ever seen half-written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / WEIGHTS, save(_portable(model.state_dict())))
    text = json.dumps({"format": _FORMAT, "config": config.model_dump(mode="json"), "card": card}, indent=2)
    _write(folder / MODEL, text.encode() + b"\n")


def load_model(
    folder: Path, *, scan: str = "auto", device: str = "cpu"
) -> tuple[nn.Module, MedMambaConfig | ConvNetConfig, dict[str, Any]]:
    """Returns (model in eval mode on `device`, its config, its card). CheckpointError: no such folder, or damaged."""
    try:
        stored = json.loads((folder / MODEL).read_text())
        config, card = _CONFIG.validate_python(stored["config"]), stored["card"]
        state = load_file(folder / WEIGHTS)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: not a model ({error}); a model is a folder with {MODEL} and {WEIGHTS} as save_model writes them"
        ) from error
    model = build_model(config, scan=scan, device=device)
    load_state(model, state, where=str(folder))
    return model.eval(), config, card


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Copies `state` into the model; CheckpointError names the first tensor that does not fit."""
    own = model.state_dict()
    for name in [*own, *(n for n in state if n not in own)]:
        expected = tuple(own[name].shape) if name in own else None
        found = tuple(state[name].shape) if name in state else None
        if expected != found:
            raise CheckpointError(
                f"{where}: a checkpoint of another architecture: tensor {name!r} is {_shape(found)} in it and "
                f"{_shape(expected)} in the model; build the model from the checkpoint's own config"
            )
    model.load_state_dict(state)


def load_upstream(source: Path | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], MedMambaConfig]:
    """Returns (state, config) of an upstream checkpoint: its tensors by name and the config their shapes tell.

    `source` is the .pth or .safetensors file or its state dict, bare or below a key such as "model" or "state_dict",
    also with the names that DataParallel, torch.compile or an outer module give ("module.", "_orig_mod.", "net.").
    Nothing in the file is executed. CheckpointError: not a MedMamba checkpoint, a truncated file, or one that holds
    Python objects beside tensors.
    """
    where = str(source) if isinstance(source, Path) else "state dict"
    loaded: Any = _read_tensors(source) if isinstance(source, Path) else source
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{where}: not a state dict of tensors; save it with torch.save(net.state_dict(), path)")
    state = _upstream_names(loaded, where)
    config = _config_of(state, where)
    with torch.device("meta"):  # shapes only: a wrong checkpoint is named here, not where it is used
        skeleton = build_model(config, scan="reference", device="meta")
    load_state(skeleton, {name: value.to("meta") for name, value in state.items()}, where=where)
    return state, config


def export_upstream(model: nn.Module, path: Path) -> None:
    """Writes the model's state dict as upstream's code loads it (torch.load + load_state_dict)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(_portable(model.state_dict()), beside)
    os.replace(beside, path)


def _portable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, dense, floats as float32; BatchNorm's counters stay integers."""
    kept = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in kept.items()}


def _config_of(state: Mapping[str, Tensor], where: str) -> MedMambaConfig:
    """The config that gives tensors of these shapes; drop-path leaves no trace and stays at its default."""
    try:
        blocks = {tuple(name.split(".")[1:4:2]) for name in state if name.startswith("layers.") and ".blocks." in name}
        num_stages = 1 + max(int(stage) for stage, _ in blocks)
        depths = tuple(sum(int(stage) == index for stage, _ in blocks) for index in range(num_stages))
        dims = tuple(state["patch_embed.proj.weight"].shape[0] * 2**stage for stage in range(num_stages))
        num_classes = state["head.weight"].shape[0]
        conv, scan = (any(f".blocks.0.{part}." in name for name in state) for part in ("conv33conv33conv11", "ln_1"))
        d_state = state["layers.0.blocks.0.self_attention.A_logs"].shape[1] if scan else 16
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{where}: not a MedMamba checkpoint (missing {error}); its tensors are named patch_embed.proj.weight, "
            "layers.<stage>.blocks.<i>.…, head.weight"
        ) from error
    sizes: dict[str, Any] = {"dims": dims, "depths": depths}
    for variant, known in VARIANTS.items():
        if known == (dims, depths):
            sizes = {"variant": variant}
    branches = "both" if conv and scan else "conv" if conv else "scan"
    return MedMambaConfig(num_classes=num_classes, d_state=d_state, branches=branches, **sizes)


def _upstream_names(loaded: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors by upstream's names, without what a wrapper around the network put into them."""
    parts = {str(name): [part for part in str(name).split(".") if part not in _WRAPPING] for name in loaded}
    first = next((p for p in parts.values() if p[-3:] == _FIRST_TENSOR), _FIRST_TENSOR)
    outer = first[: -len(_FIRST_TENSOR)]
    state: dict[str, Tensor] = {}
    for name, names in parts.items():
        short = ".".join(names[len(outer) :] if names[: len(outer)] == outer else names)
        if short in state:
            raise CheckpointError(
                f"{where}: two tensors are {short!r} without the names of wrappers ({name!r} is one of them); "
                "save the state dict of one network"
            )
        state[short] = loaded[name]
    return state


def _read_tensors(path: Path) -> Any:
    """What the file holds, of tensors and plain containers alone; CheckpointError says what else it is."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); name a file that torch.save wrote") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a damaged zip or pickle leads to
        raise CheckpointError(f"{path}: {_why_not_tensors(path, is_zip, error)}") from error


def _why_not_tensors(path: Path, is_zip: bool, error: Exception) -> str:
    if not path.stat().st_size:
        return "cannot be read as tensors, the file is empty; get it again"
    if is_zip and not zipfile.is_zipfile(path):
        return "cannot be read as tensors, the file is truncated; get it again"
    objects = _python_objects(path) if isinstance(error, pickle.UnpicklingError) else []
    if objects:
        shown = ", ".join(objects[:3])
        return (
            f"cannot be read as tensors, it holds Python objects ({shown}), which could run code when they are loaded; "
            "where you trust the file, load it yourself and save the tensors alone: "
            "torch.save(net.state_dict(), path)"
        )
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return f"cannot be read as tensors ({reason}); it is damaged or not a file of torch.save: get it again"


def _python_objects(path: Path) -> list[str]:
    """Names of what the pickle in a file would import, apart from what tensors need; nothing is imported."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip of torch.save, or a pickle that ends early
        return []


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"
