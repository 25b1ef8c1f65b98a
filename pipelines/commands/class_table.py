"""How many images each class has in each split: the first thing to check in a dataset."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from data_shards.manifest import MANIFEST, Manifest
from data_shards.split import SPLITS
from data_shards.store import Store, StoreError
from pipelines.console.terminal import console, table
from pipelines.wording import counted

_WIDTH = 80  # columns, on any terminal and in a log
_MOST_CLASSES = 200


def completed(facts: dict[str, Any], store: Store) -> dict[str, Any]:
    """Adds `samples` and `task` to the facts of a shard step; records of earlier releases lack them.

    Both come from the manifest. If it cannot be read, `samples` are sums over the classes, which are correct if every
    image has one class; otherwise they are omitted.
    """
    if "samples" in facts:
        return facts
    try:
        manifest = Manifest.model_validate_json(store.at(*facts["data"].split("/")).get(MANIFEST))
        samples = {split: counts.samples for split, counts in manifest.splits.items()}
        return {**facts, "samples": samples, "task": manifest.task}
    except (StoreError, ValidationError):
        sums = {split: sum(classes.values()) for split, classes in facts["counts"].items()}
        return {**facts, "samples": sums} if sum(sums.values()) == facts["num_images"] else facts


def print_classes(facts: dict[str, Any]) -> None:
    """Prints images per class and split from a shard step's completed facts, and where the splits come from."""
    counts, samples = facts["counts"], facts.get("samples", {})
    splits = [split for split in SPLITS if split in counts]
    names = list(dict.fromkeys(name for split in splits for name in counts[split]))
    rows = [(name, *_row([counts[split].get(name, 0) for split in splits])) for name in names[:_MOST_CLASSES]]
    if len(names) > _MOST_CLASSES:
        rows.append(
            (
                f"({counted(len(names) - _MOST_CLASSES, 'more class', 'more classes')}: --json prints all)",
                *[""] * (len(splits) + 1),
            )
        )
    if samples:
        rows.append(("all images", *_row([samples[split] for split in splits])))
    table("Classes", ("class", *splits, "all"), rows, numeric=(*splits, "all"), width=_WIDTH)
    if facts.get("task") == "multilabel":
        console().print("An image with several classes is counted in each of them.")
    if facts.get("splits_from"):
        console().print(f"splits: {facts['splits_from']}", width=_WIDTH)


def _row(numbers: list[int]) -> list[str]:
    return [f"{number:,}" for number in (*numbers, sum(numbers))]
