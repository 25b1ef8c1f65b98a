"""Where a dataset of the store came from: its settings, its salt and its source."""

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
    """Where the images are, for those who have them."""

    source: str = ""
    """Where the image set is now. Empty: where it was when the dataset was made."""
    salt: str = ""
    """The dataset's --data.salt. Empty: as a run in this store has it on record."""


def dataset_in(store: Store, name: str, *, unfinished: bool = False) -> Store:
    """Where the dataset is. UsageError, listing what there is, where there is none or it is not clear which."""
    there = dataset_names(store, unfinished=unfinished)
    if not there:
        kind = "dataset" if unfinished else "finished dataset"
        raise UsageError(f"{store.uri} holds no {kind}: `medmamba shard` makes one, or name another --store")
    matching = [each for each in there if not name or each == name or each.partition("/")[0] == name]
    if len(matching) != 1:
        how = "which one is not said" if not name else f"{name!r} is {len(matching) or 'none'} of them"
        raise UsageError(f"{store.uri} holds the datasets {', '.join(there)}, and {how}: give DATASET/NAME")
    return store.at("datasets", *matching[0].split("/"))


def dataset_names(store: Store, *, unfinished: bool = False) -> list[str]:
    """The datasets of a store as DATASET/NAME; with those whose conversion has not finished, if these are wanted."""
    marks = (MANIFEST, SETTINGS) if unfinished else (MANIFEST,)
    keys = [key for key in store.at("datasets").list() if key.count("/") == 2]
    return sorted({key.rpartition("/")[0] for key in keys if key.rpartition("/")[2] in marks})


def owners_config(store: Store, out: Store, owner: Owner) -> DataConfig:
    """The settings that the dataset was made with, its salt and its source. UsageError where the salt is not known."""
    config, digest = settings_on_record(out)
    if owner.source:
        config = config.model_copy(update={"source": owner.source})
    if owner.salt and salt_digest(owner.salt) != digest:
        has = "another salt" if digest else "no salt"
        raise UsageError(f"--salt is not what {out.uri} was made with, which has {has}: correct it, or leave it out")
    salt = owner.salt or (_salt_of_a_run(store, digest) if digest else "")
    if salt is None:
        raise UsageError(
            f"{out.uri} was made with a salt (--data.salt), which no run of this store has on record: give it with "
            "--salt"
        )
    return config.model_copy(update={"salt": salt})


def _salt_of_a_run(store: Store, digest: str) -> str | None:
    """The salt of this digest that a run was begun with."""
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
    """The JSON mapping at `key`; empty where there is none."""
    try:
        found = json.loads(store.get(key))
    except (StoreKeyError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def find_places(config: DataConfig, wanted: set[str]) -> Places:
    """See `names.find`. UsageError where the source is not there."""
    try:
        return find(config, wanted)
    except ValueError as error:
        raise UsageError(
            f"the images are looked for in {config.source or 'no place that is on record'} ({error}): give the place "
            "where they are now with --source"
        ) from None
