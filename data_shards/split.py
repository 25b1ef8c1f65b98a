"""Assigns rows to splits: a group is in one split only, classes are spread evenly, a seed decides the rest."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from data_shards.options import option

SPLITS = ("train", "val", "test")
# Names for splits in folders and table cells, lower case.
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
# Names used only for folders. "dev" and "eval" mean different splits in different sets: see `split_word`.
_FOLDER_WORDS = SPLIT_WORDS | {
    "trainval": "train", "validate": "val", "holdout": "test", "heldout": "test",
    "dev": "dev", "development": "dev", "eval": "eval", "evaluation": "eval",
}  # fmt: skip
# Words next to a split name that carry no meaning: train_set, test-images, training data.
_FILLER = re.compile("(?:dataset|set|data|image|img|picture|sample|split|folder|file)s?")
_GLUED = re.compile(rf"({'|'.join(sorted(_FOLDER_WORDS, key=len, reverse=True))}){_FILLER.pattern}")


def split_word(folder: str) -> tuple[str, tuple[str, ...]]:
    """The split that a folder is named after, and the other words in its name.

    The first is "train", "val" or "test"; "dev" or "eval" if the other folders decide which split is meant; "" if the
    name gives no split or several. The second omits numbers and words such as `set` or `images`: `Train (70%)` and
    `01_train_images` give ("train", ()), `TEST_SIMPLE` gives ("test", ("simple",)).
    """
    spaced = re.sub(r"(?<=[^\W\d_A-Z])(?=[A-Z])", " ", folder)  # trainingSet
    spaced = re.sub(r"(?i)(h[eo]ld)[\W_]?(out)", r"\1\2", spaced)
    words = [word.lower() for word in re.findall(r"[^\W\d_]+", spaced)]
    words = [glued[1] if (glued := _GLUED.fullmatch(word)) else word for word in words]
    found = {_FOLDER_WORDS[word] for word in words if word in _FOLDER_WORDS}
    if found == {"train", "val"}:  # one folder for both: val is still to be drawn
        found = {"train"}
    others = tuple(word for word in words if word not in _FOLDER_WORDS and not _FILLER.fullmatch(word))
    return (found.pop() if len(found) == 1 else ""), others


def split_of_cell(cell: str) -> str:
    """The split that a table cell names; "" if that is uncertain.

    Folder names count only if the cell has no other content: `Test set` and `Train (80%)`, but not `not test`,
    `train 0` or `train/val`.
    """
    if plain := SPLIT_WORDS.get(cell.lower()):
        return plain
    spoken = re.sub(r"\s*\(?\d+(?:[.,]\d+)?\s*%\)?\s*$", "", cell)
    split, others = split_word(spoken)
    certain = re.fullmatch(r"[^\W\d]+(?:[\s-]+[^\W\d]+)*", spoken) and not others and split in SPLITS
    return split if certain and not (split == "train" and "val" in spoken.lower()) else ""


class Labelled(Protocol):
    """The fields of a sample that splitting needs."""

    @property
    def labels(self) -> tuple[int, ...]: ...
    @property
    def group(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...


class LeakError(ValueError):
    """One group is in two splits, so a model would be tested on patients it was trained on."""


def assign_splits(
    rows: Sequence[Labelled],
    *,
    num_classes: int,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    classes: Sequence[str] = (),
) -> list[str]:
    """The split of each row: "train", "val" or "test".

    Given splits are kept; if they are only train and test, val is drawn from train (`val_fraction` of it). Without
    given splits all three are drawn. Groups are drawn as a unit, so that each split gets its share of every class; a
    row without a group is its own group. `classes` are the names for messages.

    Raises:
        LeakError: the given splits divide a group.
        ValueError: only some rows have a split, or a class would be missing from a split.
    """
    without = sum(row.split is None for row in rows)
    if 0 < without < len(rows):
        raise ValueError(
            f"{without} of {len(rows)} rows have no split: give each row train, val or test, or drop the split column"
        )
    if without == 0:
        splits = [str(row.split) for row in rows]
        _check_given(set(splits))
        if {"train", "test"} == set(splits):
            train = [i for i, split in enumerate(splits) if split == "train"]
            fractions = np.array([1 - val_fraction, val_fraction])
            for i, split in zip(train, _drawn([rows[i] for i in train], num_classes, fractions, seed), strict=True):
                splits[i] = split
    else:
        fractions = np.array([1 - val_fraction - test_fraction, val_fraction, test_fraction])
        splits = _drawn(rows, num_classes, fractions, seed)
    check_splits(rows, splits, num_classes=num_classes, classes=classes)
    return splits


def _check_given(given: set[str]) -> None:
    """ValueError if train or test is missing from the given splits: neither can be drawn."""
    if given <= set(SPLITS) and not {"train", "test"} <= given:
        missing = " and ".join(sorted({"train", "test"} - given))
        raise ValueError(
            f"the images have the splits {', '.join(sorted(given))}, but every dataset needs train and test, and "
            f"{missing} is missing; choose the split to use for it (--data.split-values val=test; validation is then "
            "drawn from train), or have all splits drawn (--data.split-column -)"
        )


def check_splits(
    rows: Sequence[Labelled], splits: Sequence[str], *, num_classes: int, classes: Sequence[str] = ()
) -> None:
    """LeakError if a group is in two splits, ValueError if a split lacks a class."""
    homes: dict[str, str] = {}
    present: dict[str, dict[int, int]] = {split: defaultdict(int) for split in SPLITS}
    for row, split in zip(rows, splits, strict=True):
        if split not in present:
            raise ValueError(f"unknown split {split!r}: use train, val or test")
        if row.group is not None and homes.setdefault(row.group, split) != split:
            raise LeakError(
                f"group {row.group!r} is in the splits {homes[row.group]} and {split}, but must be in only one; "
                "correct the splits, or have all of them drawn by group with --data.split-column -"
            )
        for label in row.labels:
            present[split][label] += 1
    for split, counts in present.items():
        for index in range(num_classes):
            if not counts[index]:
                name = classes[index] if index < len(classes) else str(index)
                total = sum(other[index] for other in present.values())
                raise ValueError(
                    f"class {name!r} is missing from the {split} split (it has {total} samples in total), but every "
                    "split needs every class; add groups of this class, raise the split's fraction, or leave the "
                    f"class out with {option('drop-classes', name)}"
                )


def _drawn(rows: Sequence[Labelled], num_classes: int, fractions: np.ndarray, seed: int) -> list[str]:
    members: dict[tuple[bool, str], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        # Zero-padded, so that rows without a group keep their order when sorted.
        members[(True, row.group) if row.group is not None else (False, f"{index:012d}")].append(index)
    groups = [members[key] for key in sorted(members)]
    np.random.default_rng(seed).shuffle(groups)
    # The last column counts all samples, so that rows without labels (multilabel) count too.
    counts = np.zeros((len(groups), num_classes + 1))
    for position, group in enumerate(groups):
        for index in group:
            counts[position, [*rows[index].labels, num_classes]] += 1
    homes = _dealt(counts, fractions)
    splits = [""] * len(rows)
    for group, home in zip(groups, homes, strict=True):
        for index in group:
            splits[index] = SPLITS[home]
    return splits


def _dealt(counts_GC: np.ndarray, fractions: np.ndarray) -> list[int]:
    """Index of the split for each group, so that the class counts of each split are close to its share."""
    totals_C = np.maximum(counts_GC.sum(axis=0), 1)
    want_SC = fractions[:, None] * totals_C
    have_SC = np.zeros_like(want_SC)
    homes = [-1] * len(counts_GC)

    def place(group: int, split: int) -> None:
        homes[group] = split
        have_SC[split] += counts_GC[group]

    # First, every split gets one group of each class, rarest class first: shares alone would leave small splits empty.
    num_groups_C = (counts_GC > 0).sum(axis=0)[:-1]
    for label in np.argsort(num_groups_C, kind="stable").tolist():
        for split in np.argsort(fractions, kind="stable").tolist():
            free = (
                [g for g in np.flatnonzero(counts_GC[:, label]).tolist() if homes[g] < 0]
                if not have_SC[split, label]
                else []
            )
            if free:
                place(min(free, key=lambda g: counts_GC[g, -1]), split)
    # Then the largest groups first, each to the split where it reduces sum((have - want)^2 / want) most.
    weight_G = (counts_GC / totals_C).sum(axis=1)
    for group in np.argsort(-weight_G, kind="stable"):
        if homes[group] < 0:
            added_C = counts_GC[group]
            cost_S = ((2 * (have_SC - want_SC) + added_C) * added_C / want_SC).sum(axis=1)
            place(int(group), int(np.argmin(cost_S)))
    return homes
