"""The origin of a dataset in the store: its settings, its salt and its source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from data_shards.config import DataConfig
from data_shards.manifest import MANIFEST
from data_shards.names import Places, find
from data_shards.settings import SETTINGS, salt_digest, settings_on_record
from data_shards.store import Store, StoreKeyError
from pipelines.console.arguments import UsageError


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Where the original images are."""

    source: str = ""
    """Where the image set is now, if it has moved. Empty: where it was when the dataset was made."""
    salt: str = ""
    """The dataset's --data.salt. Empty: the one that a run of this store has recorded."""


def dataset_in(store: Store, name: str, *, unfinished: bool = False) -> Store:
    """The folder of the dataset; UsageError with the available ones if none, or more than one, matches."""
    there = dataset_names(store, unfinished=unfinished)
    if not there:
        kind = "dataset" if unfinished else "finished dataset"
        raise UsageError(f"no {kind} in {store.uri}; make one with `medmamba shard`, or give another --store")
    matching = [each for each in there if not name or each == name or each.partition("/")[0] == name]
    if len(matching) != 1:
        problem = f"dataset {name!r} not found" if not matching else f"{len(matching)} datasets match"
        raise UsageError(f"{problem} in {store.uri}; give DATASET/NAME, one of {', '.join(there)}")
    return store.at("datasets", *matching[0].split("/"))


def dataset_names(store: Store, *, unfinished: bool = False) -> list[str]:
    """The datasets of a store as DATASET/NAME; `unfinished` includes conversions that have not finished."""
    marks = (MANIFEST, SETTINGS) if unfinished else (MANIFEST,)
    keys = [key for key in store.at("datasets").list() if key.count("/") == 2]
    return sorted({key.rpartition("/")[0] for key in keys if key.rpartition("/")[2] in marks})


def owners_config(store: Store, out: Store, owner: Owner) -> DataConfig:
    """The settings of the dataset, with its salt and source; UsageError if the salt is wrong or not known."""
    config, digest = settings_on_record(out)
    if owner.source:
        config = config.model_copy(update={"source": owner.source})
    if owner.salt and salt_digest(owner.salt) != digest:
        has = "another salt" if digest else "no salt"
        raise UsageError(f"--salt does not match {out.uri}, which has {has}; correct it, or leave it out")
    salt = owner.salt or (_salt_of_a_run(store, digest) if digest else "")
    if salt is None:
        raise UsageError(
            f"{out.uri} was made with a salt (--data.salt) that no run of this store has recorded; give it with --salt"
        )
    return config.model_copy(update={"salt": salt})


def _salt_of_a_run(store: Store, digest: str) -> str | None:
    """The salt with this digest that a run was started with; None if there is none."""
    for key in store.list("runs/"):
        if key.count("/") == 2 and key.endswith("/workflow.json"):
            found = read_json(store, key).get("recipe", {})
            data = found.get("data", {}) if isinstance(found, dict) else {}
        elif key.count("/") == 3 and key.endswith("/shard/config.json"):
            data = read_json(store, key).get("config", {})
        else:
            continue
        salt = data.get("salt") if isinstance(data, dict) else None
        if isinstance(salt, str) and salt_digest(salt) == digest:
            return salt
    return None


def read_json(store: Store, key: str) -> dict[str, Any]:
    """The JSON mapping at `key`; empty if there is none."""
    try:
        found = json.loads(store.get(key))
    except (StoreKeyError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def find_places(config: DataConfig, wanted: set[str]) -> Places:
    """See `names.find`; UsageError if the source is not found."""
    try:
        return find(config, wanted)
    except ValueError as error:
        raise UsageError(
            f"the images were not found in {config.source or '(no recorded source)'} ({error}); give their "
            "location with --source"
        ) from None
