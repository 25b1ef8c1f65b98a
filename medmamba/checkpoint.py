"""Models on disk: weights.safetensors + model.json, and upstream's checkpoints in and out.

Parameters have upstream's names everywhere, so an upstream file is the same tensors in torch's pickle format.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from medmamba.config import MODEL, MOST_CLASSES, VARIANTS, WEIGHTS, ConvNetConfig, MedMambaConfig, ModelConfig
from medmamba.model import build_model

_FORMAT = 1
# Keys below which training scripts keep a state dict, and what torch's wrappers put into the names of its tensors.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "net", "network", "module")
_WRAPPING = ("module", "_orig_mod")
_FIRST_TENSOR = ["patch_embed", "proj", "weight"]
_CONFIG: TypeAdapter[MedMambaConfig | ConvNetConfig] = TypeAdapter(ModelConfig)
_KINDS = (torch.float32, torch.int64)  # weights, and BatchNorm's counters
Side = Annotated[int, Field(ge=1, le=4096)]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that belongs to another network."""


class Card(BaseModel):
    """What a user of a model must know of it: how an image becomes its input, and what its outputs mean."""

    model_config = ConfigDict(extra="allow", strict=True)

    classes: list[str] = Field(min_length=1, max_length=MOST_CLASSES)
    task: Literal["multiclass", "ordinal", "multilabel"]
    image_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)]
    channels: Literal[1, 3]
    max_side: Annotated[int, Field(ge=1)] | None = None


def save_model(folder: Path, model: nn.Module, config: MedMambaConfig | ConvNetConfig, *, card: dict[str, Any]) -> None:
    """Writes weights.safetensors (float32, BatchNorm's buffers too), then model.json with config and card.

    `card` says what a user of the model needs: classes, task, image_size, channels. The same model gives the same
    bytes. Neither file is ever seen half-written.
    """
    _check_card(card, config, where="card")
    folder.mkdir(parents=True, exist_ok=True)
    weights, described = model_files(model.state_dict(), config, card)
    _write(folder / WEIGHTS, weights)
    _write(folder / MODEL, described)


def load_model(
    folder: Path, *, scan: str = "auto", device: str = "cpu", digest: str | None = None
) -> tuple[nn.Module, MedMambaConfig | ConvNetConfig, dict[str, Any]]:
    """Returns (model in eval mode on `device`, its config, its card).

    `digest` is the `model_digest` that the files must have, where it is known. CheckpointError: no such folder,
    another digest, another format, damaged, or files that contradict themselves or each other. Memory is taken only
    for tensors that the file holds.
    """
    try:
        weights, described = ((folder / name).read_bytes() for name in (WEIGHTS, MODEL))
    except OSError as error:
        raise _not_a_model(str(folder), error) from error
    found = model_digest(weights, described)
    if digest is not None and found != digest:
        raise CheckpointError(
            f"{folder}: {WEIGHTS} and {MODEL} have the digest {found[:12]}, but {digest[:12]} is on record: one or "
            "both were replaced or damaged, and are not used; restore them, or train and register the model again"
        )
    state, config, card = parse_model(weights, described, where=str(folder))
    _check_card(card, config, where=f"{folder}/{MODEL}")
    model = build_model(config, scan=scan, device=device)
    load_state(model, state, where=str(folder))
    return model.eval(), config, card


def parse_model(
    weights: bytes, described: bytes, *, where: str
) -> tuple[dict[str, Tensor], MedMambaConfig | ConvNetConfig, dict[str, Any]]:
    """Returns (state, config, card) of the bytes of weights.safetensors and model.json; the card may be empty.

    `where` names them in errors. CheckpointError as `load_model`.
    """
    config, card = parse_description(described, where=where)
    try:
        state = load(weights)
    except (KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise _not_a_model(where, error) from error
    _check_fits(config, state, where=where)
    _check_values(state, where=where)
    if card:
        _check_card(card, config, where=f"{where}/{MODEL}")
    return state, config, card


def parse_description(described: bytes, *, where: str) -> tuple[MedMambaConfig | ConvNetConfig, dict[str, Any]]:
    """Returns (config, card) of the bytes of a model.json. CheckpointError: not one of format 1."""
    try:
        return _described(described)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _not_a_model(where, error) from error


def model_files(
    state: Mapping[str, Tensor], config: MedMambaConfig | ConvNetConfig, card: Mapping[str, Any]
) -> tuple[bytes, bytes]:
    """The bytes of weights.safetensors and model.json; the same values give the same bytes."""
    return save(_portable(state)), description(config, card)


def description(config: MedMambaConfig | ConvNetConfig, card: Mapping[str, Any]) -> bytes:
    """The bytes of model.json."""
    text = json.dumps({"format": _FORMAT, "config": config.model_dump(mode="json"), "card": card}, indent=2)
    return text.encode() + b"\n"


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes the file weights.safetensors, the bytes of `model_files`, without holding Python's lock meanwhile."""
    save_file(_portable(state), path)


def model_digest(weights: bytes, described: bytes) -> str:
    """What a model is known by: sha256 (hex) of the bytes of weights.safetensors and, behind them, model.json."""
    return hashlib.sha256(weights + described).hexdigest()


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
    _check_fits(config, state, where)
    return state, config


def export_upstream(model: nn.Module, path: Path) -> None:
    """Writes the model's state dict as upstream's code loads it (torch.load + load_state_dict)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(_portable(model.state_dict()), beside)
    os.replace(beside, path)


def _described(data: bytes) -> tuple[MedMambaConfig | ConvNetConfig, dict[str, Any]]:
    """Config and card of a model.json. CheckpointError, ValueError, RecursionError: not one of format 1."""
    stored = json.loads(data)
    if not isinstance(stored, dict):
        raise ValueError(f"{MODEL} holds a {type(stored).__name__}, not an object")
    if stored.get("format") != _FORMAT or isinstance(stored["format"], bool):
        raise CheckpointError(
            f"{MODEL} is of format {str(stored.get('format', 'none'))[:40]!r}, and this code reads format {_FORMAT} "
            "only; read it with the version of this project that wrote it"
        )
    if set(stored) != {"format", "config", "card"} or not isinstance(stored["card"], dict):
        raise ValueError(f"{MODEL} has the fields {', '.join(map(str, stored))[:200]}, not format, config and card")
    try:
        return _CONFIG.validate_python(stored["config"]), stored["card"]
    except ValidationError as error:
        raise ValueError(f"config: {_first_of(error)}") from error


def _check_card(card: dict[str, Any], config: MedMambaConfig | ConvNetConfig, *, where: str) -> None:
    """CheckpointError where a card lacks a key, has a value of the wrong kind, or contradicts the config."""
    try:
        classes = Card.model_validate(card).classes
    except ValidationError as error:
        raise CheckpointError(
            f"{where}: {_first_of(error)}; the card of a model says its {', '.join(Card.model_fields)}: save it again "
            "with all but the last of them"
        ) from error
    if len(set(classes)) != len(classes) or "" in classes:
        raise CheckpointError(f"{where}: classes {classes[:20]}: each class has a name of its own; save it with those")
    if len(classes) != config.num_classes:
        raise CheckpointError(
            f"{where}: the card names {len(classes)} classes, but the network has {config.num_classes} outputs, one "
            "for each class; save it with the names of exactly those"
        )


def _check_fits(config: MedMambaConfig | ConvNetConfig, state: Mapping[str, Tensor], where: str) -> None:
    """CheckpointError where the tensors are not those of the config's network; no memory is taken for it."""
    if config.num_classes < 1:
        raise CheckpointError(f"{where}: num_classes is 0, but a network has an output; save it with its config")
    blocks = sum(config.resolved_depths) if isinstance(config, MedMambaConfig) else len(config.widths) * config.blocks
    if blocks > len(state):  # building thousands of them only to say so would take minutes
        raise CheckpointError(
            f"{where}: a checkpoint of another architecture: {len(state)} tensors for {blocks} blocks; build the model "
            "from the checkpoint's own config"
        )
    with torch.device("meta"):  # shapes only: a wrong checkpoint is named here, not where it is used
        skeleton = build_model(config, scan="reference", device="meta")
    load_state(skeleton, {name: value.to("meta") for name, value in state.items()}, where=where)


def _check_values(state: Mapping[str, Tensor], where: str) -> None:
    """CheckpointError for a tensor of another type than save_model writes, or with values that are not numbers."""
    for name, value in state.items():
        if value.dtype not in _KINDS:
            raise CheckpointError(
                f"{where}: tensor {name!r} is {value.dtype}, but {WEIGHTS} holds float32 and int64; write it with "
                "save_model"
            )
        if not torch.isfinite(value).all():
            raise CheckpointError(
                f"{where}: tensor {name!r} has values that are not finite, so every score would be nan: the file was "
                "damaged, or the training diverged; restore it, or train again with a lower train.optim.lr"
            )


def _not_a_model(folder: str, error: Exception) -> CheckpointError:
    told = " ".join(str(error).split())[:300]
    return CheckpointError(
        f"{folder}: not a model ({told}); a model is a folder with {MODEL} and {WEIGHTS} as save_model writes them"
    )


def _first_of(error: ValidationError) -> str:
    """The first broken rule as `field = value: rule`."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    value = "" if isinstance(first["input"], dict | list) else f" = {first['input']!r:.60}"
    return f"{where}{value}: {first['msg'].removeprefix('Value error, ')}"


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
