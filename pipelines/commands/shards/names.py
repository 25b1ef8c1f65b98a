"""The command shards names: from the keys of a dataset to file names.

File names are looked up in the source, on this machine, and written to the terminal or to a file outside of the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from data_shards.duplicates import read_report
from data_shards.manifest import open_dataset
from data_shards.names import Sample, samples
from data_shards.store import Store
from pipelines.commands.shards.listing import Listing, ListingOptions, check_target
from pipelines.commands.shards.owner import (
    Owner,
    dataset_in,
    dataset_names,
    find_places,
    owners_config,
    read_json,
)
from pipelines.commands.shards.predicted import read_predicted
from pipelines.console.arguments import UsageError
from pipelines.console.command import Command

_KEY = set("0123456789abcdef")


@dataclass(frozen=True)
class NamesArguments(Owner, ListingOptions):
    """Arguments of `shards names`."""

    words: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[DATASET[/NAME]] [KEY ...]")] = ()
    """DATASET or DATASET/NAME (default: the only one), then keys or key prefixes (default: all)."""
    keys: tuple[str, ...] = ()
    """Keys or key prefixes, if the first one could be mistaken for a dataset."""
    predictions: str = ""
    """Name of a run: list only its test images, with the predicted class, wrong ones first."""


def names(asked: NamesArguments) -> int:
    """Prints or writes the samples of a dataset with their files."""
    store = asked.open_store()
    name, prefixes = _dataset_and_keys(store, asked)
    out = dataset_in(store, name)
    dataset = open_dataset(out)
    known = samples(dataset, read_report(out))
    config = owners_config(store, out, asked)
    check_target(asked.out, store, config, kind=".csv")
    places = find_places(config, {each.key for each in known})
    predicted = read_predicted(store, asked.predictions, dataset) if asked.predictions else {}
    chosen = [each for each in known if not predicted or each.key in predicted]
    chosen = _matching(chosen, prefixes, out)
    listing = Listing(store, out, chosen, places, predicted)
    return listing.show(asked, title="Samples", everything=bool(prefixes))


def _dataset_and_keys(store: Store, asked: NamesArguments) -> tuple[str, list[str]]:
    """The dataset's name and the key prefixes; UsageError if a word could be either."""
    words, there = list(asked.words), dataset_names(store)
    name = ""
    if asked.predictions and not words:
        name = _dataset_of_run(store, asked.predictions)
    elif words and (words[0] in there or any(each.partition("/")[0] == words[0] for each in there)):
        name = words.pop(0)
        if len(there) == 1 and _is_key(name) and not asked.keys and not words:
            raise UsageError(
                f"shards names: {name} is a dataset and a possible key prefix; write --keys {name}, or {there[0]}"
            )
    elif words and not _is_key(words[0]):
        name = words.pop(0)  # `dataset_in` rejects it and lists the datasets
    prefixes = [word.lower() for word in (*words, *asked.keys)]
    wrong = [word for word in prefixes if not _is_key(word)]
    if wrong:
        raise UsageError(f"shards names: {wrong[0]!r} is not a key prefix; keys are 20 hex digits")
    return name, prefixes


def _is_key(word: str) -> bool:
    return 0 < len(word) <= 20 and set(word.lower()) <= _KEY


def _dataset_of_run(store: Store, run: str) -> str:
    data = read_json(store, f"runs/{run}/shard/record.json").get("facts", {}).get("data", "")
    return str(data).removeprefix("datasets/")


def _matching(known: list[Sample], prefixes: Sequence[str], out: Store) -> list[Sample]:
    if not prefixes:
        return known
    for prefix in prefixes:
        if not any(each.key.startswith(prefix) for each in known):
            raise UsageError(f"shards names: no sample of {out.uri} has a key that starts with {prefix}")
    return [each for each in known if each.key.startswith(tuple(prefixes))]


NAMES = Command(
    "shards names",
    "List samples with their files: path, frame, split, label and state.",
    NamesArguments,
    names,
)
