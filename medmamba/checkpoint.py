"""Reads and writes models (weights.safetensors and model.json), and imports and exports upstream's checkpoints.

Parameters always have upstream's names, so an upstream file contains the same tensors in torch's pickle format.
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
# Keys under which training scripts store a state dict, and prefixes that torch's wrappers add to parameter names.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "net", "network", "module")
_WRAPPING = ("module", "_orig_mod")
_FIRST_TENSOR = ["patch_embed", "proj", "weight"]
_CONFIG: TypeAdapter[MedMambaConfig | ConvNetConfig] = TypeAdapter(ModelConfig)
_KINDS = (torch.float32, torch.int64)  # weights, and BatchNorm's counters
Side = Annotated[int, Field(ge=1, le=4096)]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that belongs to another network."""


class Card(BaseModel):
    """What a user of a model needs to know: how to prepare its input, and what its outputs mean."""

    model_config = ConfigDict(extra="allow", strict=True)

    classes: list[str] = Field(min_length=1, max_length=MOST_CLASSES)
    task: Literal["multiclass", "ordinal", "multilabel"]
    image_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)]
    channels: Literal[1, 3]
    max_side: Annotated[int, Field(ge=1)] | None = None


def save_model(folder: Path, model: nn.Module, config: MedMambaConfig | ConvNetConfig, *, card: dict[str, Any]) -> None:
    """Writes weights.safetensors (float32, including BatchNorm's buffers), then model.json with config and card.

    `card` has classes, task, image_size and channels (see Card). The same model gives the same bytes. Each file is
    written atomically. Raises CheckpointError if the card is invalid or contradicts the config.
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

    `digest` is the expected `model_digest` of the files, if known. Raises CheckpointError if the folder is missing, the
    digest or format differs, or the files are damaged or inconsistent. Only allocates memory for tensors that are in
    the file.
    """
    try:
        weights, described = ((folder / name).read_bytes() for name in (WEIGHTS, MODEL))
    except OSError as error:
        raise _not_a_model(str(folder), error) from error
    found = model_digest(weights, described)
    if digest is not None and found != digest:
        raise CheckpointError(
            f"{folder}: {WEIGHTS} and {MODEL} have digest {found[:12]}, but {digest[:12]} is recorded: one or both "
            "were replaced or damaged; restore them, or train and register the model again"
        )
    state, config, card = parse_model(weights, described, where=str(folder))
    _check_card(card, config, where=f"{folder}/{MODEL}")
    model = build_model(config, scan=scan, device=device)
    load_state(model, state, where=str(folder))
    return model.eval(), config, card


def parse_model(
    weights: bytes, described: bytes, *, where: str
) -> tuple[dict[str, Tensor], MedMambaConfig | ConvNetConfig, dict[str, Any]]:
    """Parses the bytes of weights.safetensors and model.json into (state, config, card); the card may be empty.

    `where` names them in errors. Raises CheckpointError like `load_model`.
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
    """Parses the bytes of a model.json into (config, card). Raises CheckpointError if it is invalid."""
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
    """Writes weights.safetensors with the same bytes as `model_files`, without holding the GIL."""
    save_file(_portable(state), path)


def model_digest(weights: bytes, described: bytes) -> str:
    """Identifies a model: sha256 (hex) of the bytes of weights.safetensors followed by model.json."""
    return hashlib.sha256(weights + described).hexdigest()


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Copies `state` into the model. Raises CheckpointError with the first tensor that does not fit."""
    own = model.state_dict()
    for name in [*own, *(n for n in state if n not in own)]:
        expected = tuple(own[name].shape) if name in own else None
        found = tuple(state[name].shape) if name in state else None
        if expected != found:
            raise CheckpointError(
                f"{where}: the checkpoint has another architecture: tensor {name!r} is {_shape(found)} in it and "
                f"{_shape(expected)} in the model; build the model from the checkpoint's own config"
            )
    model.load_state_dict(state)


def load_upstream(source: Path | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], MedMambaConfig]:
    """Returns (state, config) of an upstream checkpoint; the config is derived from the tensors' shapes.

    `source` is a .pth or .safetensors file or its state dict, possibly under a key such as "model" or "state_dict", and
    with prefixes of DataParallel, torch.compile or an outer module ("module.", "_orig_mod.", "net."). No code in the
    file is executed. Raises CheckpointError if it is not a MedMamba checkpoint, is damaged, or contains Python objects
    other than tensors.
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
    """Writes the model's state dict in the format that upstream's code loads (torch.load + load_state_dict)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(_portable(model.state_dict()), temporary)
    os.replace(temporary, path)


def _described(data: bytes) -> tuple[MedMambaConfig | ConvNetConfig, dict[str, Any]]:
    """Config and card of a model.json. Raises CheckpointError, ValueError or RecursionError if it is invalid."""
    stored = json.loads(data)
    if not isinstance(stored, dict):
        raise ValueError(f"{MODEL} contains a {type(stored).__name__}, not an object")
    if stored.get("format") != _FORMAT or isinstance(stored["format"], bool):
        raise CheckpointError(
            f"{MODEL} has format {str(stored.get('format', 'none'))[:40]!r}, but this version only reads format "
            f"{_FORMAT}; use the version of this project that wrote it"
        )
    if set(stored) != {"format", "config", "card"} or not isinstance(stored["card"], dict):
        raise ValueError(f"{MODEL} has the fields {', '.join(map(str, stored))[:200]}, not format, config and card")
    try:
        return _CONFIG.validate_python(stored["config"]), stored["card"]
    except ValidationError as error:
        raise ValueError(f"config: {_first_of(error)}") from error


def _check_card(card: dict[str, Any], config: MedMambaConfig | ConvNetConfig, *, where: str) -> None:
    """Raises CheckpointError if a card lacks a key, has an invalid value, or contradicts the config."""
    try:
        classes = Card.model_validate(card).classes
    except ValidationError as error:
        raise CheckpointError(
            f"{where}: {_first_of(error)}; a model's card has {', '.join(Card.model_fields)}, of which only the last "
            "is optional: save it again with these"
        ) from error
    if len(set(classes)) != len(classes) or "" in classes:
        raise CheckpointError(
            f"{where}: classes {classes[:20]} must be unique and not empty; save it again with distinct names"
        )
    if len(classes) != config.num_classes:
        raise CheckpointError(
            f"{where}: the card names {len(classes)} classes, but the network has {config.num_classes} outputs; save "
            "it again with one name per output"
        )


def _check_fits(config: MedMambaConfig | ConvNetConfig, state: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError if the tensors do not fit the config's network, without allocating its memory."""
    if config.num_classes < 1:
        raise CheckpointError(f"{where}: num_classes is 0, but must be at least 1; save it again with its config")
    blocks = sum(config.resolved_depths) if isinstance(config, MedMambaConfig) else len(config.widths) * config.blocks
    if blocks > len(state):  # building thousands of blocks would take minutes
        raise CheckpointError(
            f"{where}: the checkpoint has another architecture: {len(state)} tensors for {blocks} blocks; build the "
            "model from the checkpoint's own config"
        )
    with torch.device("meta"):
        skeleton = build_model(config, scan="reference", device="meta")
    load_state(skeleton, {name: value.to("meta") for name, value in state.items()}, where=where)


def _check_values(state: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError for tensors of another type than save_model writes, or with non-finite values."""
    for name, value in state.items():
        if value.dtype not in _KINDS:
            raise CheckpointError(
                f"{where}: tensor {name!r} is {value.dtype}, but must be float32 or int64; write it with save_model"
            )
        if not torch.isfinite(value).all():
            raise CheckpointError(
                f"{where}: tensor {name!r} has non-finite values: the file is damaged, or the training diverged; "
                "restore it, or train again with a lower train.optim.lr"
            )


def _not_a_model(folder: str, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:300]
    return CheckpointError(
        f"{folder}: not a model ({reason}); a model is a folder with {MODEL} and {WEIGHTS}, written by save_model"
    )


def _first_of(error: ValidationError) -> str:
    """The first broken rule as `field = value: rule`."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    value = "" if isinstance(first["input"], dict | list) else f" = {first['input']!r:.60}"
    return f"{where}{value}: {first['msg'].removeprefix('Value error, ')}"


def _portable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, dense, floats as float32; BatchNorm's counters stay integers."""
    kept = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in kept.items()}


def _config_of(state: Mapping[str, Tensor], where: str) -> MedMambaConfig:
    """The config for tensors of these shapes; drop_path cannot be derived and keeps its default."""
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
            f"{where}: not a MedMamba checkpoint (missing {error}); it must have the tensors patch_embed.proj.weight, "
            "layers.<stage>.blocks.<i>.…, head.weight"
        ) from error
    sizes: dict[str, Any] = {"dims": dims, "depths": depths}
    for variant, known in VARIANTS.items():
        if known == (dims, depths):
            sizes = {"variant": variant}
    branches = "both" if conv and scan else "conv" if conv else "scan"
    return MedMambaConfig(num_classes=num_classes, d_state=d_state, branches=branches, **sizes)


def _upstream_names(loaded: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors by upstream's names, without the prefixes of wrappers."""
    parts = {str(name): [part for part in str(name).split(".") if part not in _WRAPPING] for name in loaded}
    first = next((p for p in parts.values() if p[-3:] == _FIRST_TENSOR), _FIRST_TENSOR)
    outer = first[: -len(_FIRST_TENSOR)]
    state: dict[str, Tensor] = {}
    for name, names in parts.items():
        short = ".".join(names[len(outer) :] if names[: len(outer)] == outer else names)
        if short in state:
            raise CheckpointError(
                f"{where}: two tensors are called {short!r} without the wrappers' prefixes ({name!r} is one); "
                "save the state dict of a single network"
            )
        state[short] = loaded[name]
    return state


def _read_tensors(path: Path) -> Any:
    """Loads only tensors and plain containers from the file. Raises CheckpointError with the reason if it cannot."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use a file written by torch.save") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # broad: a damaged zip or pickle can raise anything
        raise CheckpointError(f"{path}: {_why_not_tensors(path, is_zip, error)}") from error


def _why_not_tensors(path: Path, is_zip: bool, error: Exception) -> str:
    if not path.stat().st_size:
        return "cannot be read as tensors, the file is empty; download it again"
    if is_zip and not zipfile.is_zipfile(path):
        return "cannot be read as tensors, the file is truncated; download it again"
    objects = _python_objects(path) if isinstance(error, pickle.UnpicklingError) else []
    if objects:
        shown = ", ".join(objects[:3])
        return (
            f"cannot be read as tensors, it contains Python objects ({shown}) that could run code when loaded; if you "
            "trust the file, load it yourself and save only the tensors: torch.save(net.state_dict(), path)"
        )
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return f"cannot be read as tensors ({reason}); it is damaged or not a file of torch.save: download it again"


def _python_objects(path: Path) -> list[str]:
    """Names that the pickle in a file would import, except those for tensors; does not import them."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # broad: a damaged zip or pickle can raise anything
        return []


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"
