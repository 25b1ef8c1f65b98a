"""`config.json` of a dataset: the settings that it was made with, which identify it."""

from __future__ import annotations

import json
import logging
from typing import Any

from pydantic import BaseModel, ValidationError

from data_shards.config import DataConfig
from data_shards.manifest import open_dataset
from data_shards.plan import config_digest, digest_of
from data_shards.renamed import new_words, renamed, stored_values
from data_shards.rules import RULES, RULES_KEY, SPLITS_KEY, changes_since
from data_shards.store import Store, StoreKeyError

SETTINGS = "config.json"
_log = logging.getLogger(__name__)


def salt_digest(salt: str) -> str:
    """What a store keeps of a salt, to recognize it."""
    return digest_of(salt)[:12] if salt else ""


def settings_bytes(config: DataConfig, splits_from: str) -> bytes:
    """The file: all settings as flat dotted keys, the number of the rules, and where the splits came from."""
    settings = _flat(stored_values(config), config.salt)
    return json.dumps({**settings, RULES_KEY: RULES, SPLITS_KEY: splits_from}, indent=1).encode()


def settings_on_record(out: Store) -> tuple[DataConfig, str]:
    """The settings that a dataset, finished or not, was made with, without its salt; and the digest of that.

    Raises ValueError where they are missing or damaged.
    """
    try:
        flat = json.loads(out.get(SETTINGS))
        nested = _known(new_words(_nested(flat), DataConfig.PART), DataConfig())
        if nested.get("dataset") != out.uri.rsplit("/", 2)[-2]:
            raise ValueError(f"it is of the dataset {nested.get('dataset')!r}")
        salt = str(nested.pop("salt", ""))
        return DataConfig.model_validate(nested), salt
    except (StoreKeyError, ValueError, AttributeError, TypeError, ValidationError, RecursionError) as error:
        raise ValueError(
            f"{out.uri}/{SETTINGS} does not hold the settings of a dataset ({' '.join(str(error).split())[:120]}): "
            "restore it, or run `medmamba shard` with the same settings, which says what differs"
        ) from error


def refuse_drift(config: DataConfig, out: Store) -> None:
    """ValueError where the finished dataset in the store was made with other settings.

    Another source is not one of them: the images may have been moved (see `verify.check_moved`).
    """
    wanted = _flat(config.identity(), config.salt)
    stored = _stored(out)
    # What was no setting yet when the dataset was made is at its default. Without them only the explanation is lost:
    # the manifest knows the digest of its settings.
    found = wanted if stored is None else {**_flat(DataConfig().identity(), ""), **stored}
    ignored = {*(_flat(stored_values(config), "").keys() - wanted.keys()), RULES_KEY, SPLITS_KEY}
    changed = [
        _change(key, found.get(key), wanted.get(key))
        for key in sorted((wanted.keys() | found.keys()) - ignored)
        if found.get(key) != wanted.get(key)
    ]
    if not changed and open_dataset(out).manifest.config_sha256 != config_digest(config):
        changed = ["settings that this dataset did not record"]
    if changed:
        raise ValueError(
            f"{out.uri} holds a dataset made with other settings ({'; '.join(changed)}): set them back, or give the "
            "new dataset a name of its own with --data.name"
        )
    _notice_rules(out, stored or {})


def _change(key: str, old: Any, new: Any) -> str:
    """A setting that differs, in the words that users write."""
    (name, before), (_, now) = renamed(f"data.{key}", old), renamed(f"data.{key}", new)
    return f"{name}: {before!r} -> {now!r}"


def splits_from(store: Store) -> str:
    """Where the splits of a finished dataset came from; "" where that was not recorded."""
    found = (_stored(store) or {}).get(SPLITS_KEY, "")
    return found if isinstance(found, str) else ""


def _flat(settings: dict[str, Any], salt: str) -> dict[str, Any]:
    """The settings as flat dotted keys. Of the salt a digest: it must not be stored with the keys that it hides."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return {**flat, "salt": salt_digest(salt)}


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """What `_flat` was made from."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        part, _, name = key.rpartition(".")
        (nested.setdefault(part, {}) if part else nested)[name] = value
    return nested


def _known(settings: dict[str, Any], model: BaseModel) -> dict[str, Any]:
    """The settings that this release has: not the number of the rules, nor a setting of another release."""
    known: dict[str, Any] = {}
    for name in settings.keys() & type(model).model_fields.keys():
        value, part = settings[name], getattr(model, name)
        known[name] = _known(value, part) if isinstance(part, BaseModel) else value
    return known


def _stored(out: Store) -> dict[str, Any] | None:
    """The settings of a dataset; None where there are none, or something else."""
    try:
        found = json.loads(out.get(SETTINGS))
    except (StoreKeyError, json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def has_moved(config: DataConfig, out: Store) -> bool:
    """Whether `config` names another source than the finished dataset was made from."""
    found = (_stored(out) or {}).get("source", config.source)
    return bool(config.source) and found != config.source


def _notice_rules(out: Store, stored: dict[str, Any]) -> None:
    """Reports what a new conversion of the same images would do differently; the finished dataset stays as it is."""
    changes = changes_since(stored)
    if changes:
        _log.warning(
            "%s was converted by earlier rules and stays valid; a new conversion (--data.name NEW under another --run) "
            "would differ: %s",
            out.uri,
            "; ".join(changes),
        )
