"""The weights that a training starts from (`train.init`): looked up once, in the driver, and copied into the store.

A training is identified by their digest, not by where they were: a step's `train.init` is the digest, and workers read
the copy `weights/<digest>/` in the store. So other weights make another training, and the same weights in another
place do not. A run keeps the weights that it was begun with when the original is gone or an alias has moved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from data_shards.manifest import Manifest, open_dataset
from data_shards.store import Store, StoreError, open_store
from medmamba.config import MODEL, WEIGHTS, ConvNetConfig, MedMambaConfig
from pipelines.flow import DriftError
from pipelines.flow.record import read_identity
from pipelines.flow.runner import step_folder
from pipelines.override import ConfigError, flatten
from pipelines.scratch import scratch
from pipelines.tracking.leases import Driver
from pipelines.wording import counted
from pipelines.worker.config import TrainConfig, TrainStepConfig

FOLDER, ORIGIN = "weights", "origin.json"
KINDS = (
    "give a folder with weights.safetensors and model.json (runs/RUN/train/model of the store, for example), a "
    "checkpoint file of the paper's code (.pth), models:/NAME@ALIAS or models:/NAME/VERSION"
)
_REGISTERED = re.compile(r"models:/(?P<model>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<number>[1-9]\d*))")


class Trained(Protocol):
    """What of a recipe says how its network is trained."""

    @property
    def model(self) -> MedMambaConfig | ConvNetConfig:
        """The network."""

    @property
    def train(self) -> TrainConfig:
        """How its weights are found."""


class InitialWeightsError(ConfigError):
    """`train.init` or `train.freeze` is wrong: says which, why and what to write instead."""


@dataclass(frozen=True)
class InitialWeights:
    """Weights that were found: where they come from, and what they are."""

    uri: str
    """The registered version (also where an alias was asked for), the folder or the file."""
    digest: str
    """`medmamba.checkpoint.model_digest` of their two files."""
    config: MedMambaConfig | ConvNetConfig
    card: Mapping[str, Any]
    """Empty where they have none: an upstream checkpoint."""
    files: Mapping[str, bytes]
    """Name -> content; empty where the store already has them."""
    note: str = ""
    """What the user must know about how they were found."""

    @property
    def summary(self) -> str:
        """In one line, for the user."""
        note = f"; {self.note}" if self.note else ""
        return f"train.init is {self.uri} (weights {self.digest[:12]}){note}"

    def keep(self, store: Store) -> None:
        """Writes `weights/<digest>/` in the store unless it exists."""
        folder = store.at(FOLDER, self.digest)
        if folder.head(ORIGIN) is not None:
            return
        for name, data in self.files.items():
            folder.ensure(name, data)
        folder.put(ORIGIN, _json({"uri": self.uri, "digest": self.digest}), if_absent=True)


def weights_of_run(recipe: Trained, store: Store, run: str, *, kept_source: str = "") -> InitialWeights | None:
    """The weights that the trainings of `run` start from; None where they start from random ones.

    `kept_source` is the `train.init` that the run was begun with: asked for the same again, it keeps its weights, and
    the note says so where the source has others by now (an alias moved, perhaps to this run's own model).

    Raises:
        DriftError: the run was begun with other weights from another source.
        InitialWeightsError: the weights were not found, they are damaged or of another network than `recipe.model`, or
            a pattern of `train.freeze` does not fit it.
        ValueError: the store or MLflow does not answer, or what they hold was replaced.
    """
    if not recipe.train.init:
        return None
    from medmamba.finetune import check_frozen, network_difference, parameter_names

    begun = _begun_with(store, run)
    if recipe.train.init == kept_source and _is_kept(store, begun):
        found = replace(_kept(store, begun), note=_since(recipe.train.init, store, begun))
    else:
        found = find_weights(recipe.train.init, store)
    if problem := network_difference(found.config, recipe.model):
        raise InitialWeightsError(f"train.init {recipe.train.init} has another network than the recipe: {problem}")
    try:
        check_frozen(parameter_names(recipe.model.model_copy(update={"num_classes": 1})), recipe.train.freeze)
    except ValueError as error:
        raise InitialWeightsError(str(error)) from None
    if begun and begun != found.digest:
        raise DriftError(
            f"train.init {recipe.train.init} is {found.uri} with the weights {found.digest[:12]}, but run {run!r} was "
            f"begun with {begun[:12]} ({_origin(store, begun).get('uri', 'unknown')}). A run's name stands for one "
            f"training: give this one another name (--run NAME), or resume with --train.init {FOLDER}/{begun}"
        )
    return found


def find_weights(source: str, store: Store) -> InitialWeights:
    """The weights that `source` (`train.init`) names now.

    Raises InitialWeightsError where they are not found or damaged, IntegrityError where they were replaced after they
    were registered, and another ValueError where the store or MLflow does not answer.
    """
    if source.startswith("models:"):
        return _registered(source, store)
    relative = "://" not in source and not source.startswith(("/", "~"))
    places = [source, f"{store.uri}/{source}"] if relative else [source]
    for place in places:
        try:
            folder = open_store(place)
        except StoreError as error:
            raise InitialWeightsError(f"train.init {source}: {error}") from None
        if folder.head("model.json") is not None:
            return _from_folder(folder)
        parent, _, name = folder.uri.rpartition("/")
        if name and not parent.endswith(":/") and open_store(parent or "/").head(name) is not None:
            is_folder = name == "weights.safetensors" and open_store(parent).head("model.json") is not None
            return _from_folder(open_store(parent)) if is_folder else _from_file(open_store(parent or "/"), name)
    raise InitialWeightsError(f"train.init {source}: no weights found at {' or '.join(places)}; {KINDS}")


def _since(source: str, store: Store, begun: str) -> str:
    """How the source of the weights that a run was begun with has changed; empty where it still has them."""
    try:
        now = find_weights(source, store)
    except ValueError:
        return f"{source} cannot be read now, and this run uses the copy in the store"
    if now.digest == begun:
        return ""
    return (
        f"{source} has other weights by now ({now.uri}, {now.digest[:12]}), and this run keeps those it was begun "
        "with: give --run another name to start from the new ones"
    )


def begin_from(config: TrainStepConfig, shard: dict, context: Driver) -> dict[str, str]:
    """Tells the user what the training takes from its weights; returns `uri`, `digest` and what happened to `head`.

    Empty where it starts from random weights. ValueError: the head is new, and `train.freeze` would keep it random.
    """
    if not config.train.init:
        return {}
    from medmamba.finetune import HEAD, check_frozen, choose_head, parameter_names

    manifest = open_dataset(context.store.at(shard["data"]), digest=shard["digest"]).manifest
    kept = _kept(context.store, config.train.init)
    head = choose_head(kept.card, manifest.classes, manifest.task)
    names = parameter_names(kept.config)
    frozen = check_frozen(names, config.train.freeze)
    if head.is_new and frozen & set(HEAD):
        raise ValueError(
            f"train.freeze {' '.join(config.train.freeze)} freezes the head, but it is new and random ({head.reason}): "
            "leave head.* out of the patterns"
        )
    context.show.say(f"starting from {kept.uri} (weights {kept.digest[:12]}): {head.reason}; all other layers kept")
    if seen := _other_images(kept.card, config, manifest):
        context.show.say(seen)
    if kept.card.get("dataset") == manifest.dataset and kept.card.get("manifest") not in (None, shard["digest"]):
        context.show.say(
            f"caution: the weights were trained on {manifest.dataset} with other images or splits (manifest "
            f"{str(kept.card['manifest'])[:12]}), so they may have seen images of this test split: its metrics may be "
            "too good"
        )
    if frozen:
        context.show.say(f"frozen: {len(frozen)} of {counted(len(names), 'parameter')}, with the BatchNorms among them")
    return {"uri": kept.uri, "digest": kept.digest, "head": head.reason}


def kept_uri(config: TrainStepConfig, store: Store) -> str:
    """Where workers find the weights of a step's config; empty where it starts from random ones."""
    return store.at(FOLDER, config.train.init).uri if config.train.init else ""


def _registered(source: str, store: Store) -> InitialWeights:
    from pipelines.tracking import open_tracking
    from pipelines.tracking.registry import DIGEST_TAG, IntegrityError, by_alias, by_number, fetched, versions

    asked = _REGISTERED.fullmatch(source)
    if asked is None:
        raise InitialWeightsError(f"train.init {source}: write models:/NAME@ALIAS or models:/NAME/VERSION")
    tracking, model = open_tracking(store), asked["model"]
    if asked["alias"]:
        version = by_alias(tracking, model, asked["alias"])
    else:
        version = by_number(tracking, model, int(asked["number"]))
    if version is None:
        numbers = ", ".join(str(each.number) for each in versions(tracking, model))
        there = f"it has version {numbers} of {model}" if numbers else f"it has no model {model}"
        raise InitialWeightsError(
            f"train.init {source}: MLflow at {tracking.address} has no such model version ({there}); name one that "
            "exists, or another store or MLFLOW_TRACKING_URI"
        )
    digest = version.tags.get(DIGEST_TAG, "")
    if _is_kept(store, digest):
        return replace(_kept(store, digest), uri=version.uri)
    with fetched(tracking, version) as folder:
        found = _of_files(version.uri, *((folder / name).read_bytes() for name in (WEIGHTS, MODEL)))
    if found.digest != digest:
        raise IntegrityError(
            f"the weights of {version.uri} have the digest {found.digest[:12]}, but {digest[:12]} was registered (tag "
            f"{DIGEST_TAG}): they were replaced or damaged in the artifact store, and are not used; restore them"
        )
    return found


def _from_folder(folder: Store) -> InitialWeights:

    if folder.head(WEIGHTS) is None:
        raise InitialWeightsError(f"train.init: {folder.uri} has a {MODEL} but no {WEIGHTS}; {KINDS}")
    return _of_files(folder.uri, folder.get(WEIGHTS), folder.get(MODEL))


def _from_file(folder: Store, name: str) -> InitialWeights:
    """The weights of an upstream checkpoint; it names no classes, so its card is empty."""
    from medmamba.checkpoint import CheckpointError, load_upstream, model_files

    uri = f"{folder.uri.rstrip('/')}/{name}"
    with scratch("init") as here:
        path = folder.path(name)
        if path is None:
            path = here / name
            folder.fetch(name, path)
        try:
            state, config = load_upstream(path)
        except CheckpointError as error:
            raise InitialWeightsError(f"train.init: {str(error).replace(str(path), uri)}") from error
    return _of_files(uri, *model_files(state, config, {}))


def _of_files(uri: str, weights: bytes, described: bytes) -> InitialWeights:
    from medmamba.checkpoint import CheckpointError, model_digest, parse_model

    try:
        _, config, card = parse_model(weights, described, where=uri)
    except CheckpointError as error:
        raise InitialWeightsError(f"train.init: {error}") from error
    files = {WEIGHTS: weights, MODEL: described}
    return InitialWeights(uri, model_digest(weights, described), config, card, files)


def _kept(store: Store, digest: str) -> InitialWeights:
    """Weights that the store keeps; workers compare the files with the digest when they read them."""
    from medmamba.checkpoint import parse_description

    folder = store.at(FOLDER, digest)
    config, card = parse_description(folder.get(MODEL), where=folder.uri)
    return InitialWeights(_origin(store, digest).get("uri", folder.uri), digest, config, card, {})


def _is_kept(store: Store, digest: str) -> bool:
    return bool(digest) and store.at(FOLDER, digest).head(ORIGIN) is not None


def _origin(store: Store, digest: str) -> dict[str, str]:
    """Where weights that the store keeps came from when it first took them; empty where it has none of this digest."""
    if not _is_kept(store, digest):
        return {}
    return json.loads(store.at(FOLDER, digest).get(ORIGIN))


def _begun_with(store: Store, run: str) -> str:
    """The digest of the weights that the run's sweep or training was begun with; empty where neither was."""
    for step, key in (("train", "train.init"), ("tune", "start.train.init")):
        begun = read_identity(step_folder(store, run, step))
        if begun is not None and (digest := flatten(begun.config).get(key)):
            return digest
    return ""


def _other_images(card: Mapping[str, Any], config: TrainStepConfig, manifest: Manifest) -> str:
    """A line where the weights were trained on images of another kind; empty where not, or where it is unknown."""
    if not card:
        return ""
    old = (card["image_size"], card["channels"])
    new = (config.train.image_size, manifest.channels)
    if old == new:
        return ""
    return f"the weights saw {_images(*old)}, this training has {_images(*new)}: every layer takes both"


def _images(size: int | list[int], channels: int) -> str:
    side = " x ".join(map(str, size)) if isinstance(size, list) else size
    return f"{'gray' if channels == 1 else 'RGB'} images of {side} px"


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=2, sort_keys=True).encode() + b"\n"
