"""What is done about duplicates before anything is written, so that none is in two splits."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from data_shards.config import DuplicatesConfig
from data_shards.duplicates.clusters import (
    HELD_OUT,
    MOST_FINDINGS,
    DuplicateClusters,
    OtherDataset,
    clusters_of,
    components,
)
from data_shards.duplicates.fingerprint import SHARP, UNDECODABLE, Fingerprints
from data_shards.duplicates.report import Copy, DuplicatesError, DuplicatesReport, Kind, lost_text, named_labels
from data_shards.source.row import Row
from data_shards.split import SPLITS

Draw = Callable[[Sequence[Row]], list[str]]
"""Gives each row its split; raises where a group is torn apart or a split lacks a class."""


@dataclass(frozen=True)
class Guarded:
    """Which rows remain, in which split, and why: `rows[i]` are positions in the image set."""

    rows: list[int]
    splits: list[str]
    report: DuplicatesReport


def guard(
    rows: Sequence[Row],
    prints: Fingerprints,
    config: DuplicatesConfig,
    *,
    draw: Draw,
    keys: Sequence[str],
    official: bool,
    classes: Sequence[str] = (),
    others: Iterable[OtherDataset] = (),
) -> Guarded:
    """The rows that remain, with their splits, and a report of all duplicates.

    Args:
        rows: Of the image set.
        prints: Their fingerprints.
        config: What is to be done about duplicates.
        draw: Gives rows their splits; where they have none yet, rows of one group are given the same.
        keys: Theirs in the shards.
        official: Whether splits that the rows have are those of a published set, which are kept as they are.
        classes: Names of the labels.
        others: Datasets to compare with.

    Raises:
        DuplicatesError: an image is in two splits (or in another dataset, or under another label), and the config
            refuses that; or a class would lose all its images of a split to what the config does about duplicates.
    """
    levels = clusters_of(prints, config.near, config.symmetries)
    alike = levels[-1]
    drawn = all(row.split is None for row in rows)
    across = _policy(config, drawn=drawn, official=official)
    together = components(rows, alike) if across == "move" else None
    if drawn:
        first = draw(rows if together is None else _in_groups(rows, together))
    else:
        first = _draw_val(rows, alike, draw) if across != "report" else draw(rows)
    found = DuplicateClusters(rows, keys, levels, first, classes)
    dropped, splits, elsewhere = np.zeros(len(rows), bool), list(first), []
    report = functools.partial(_report, found, prints, config, across)
    try:
        dropped = _dropped(found, config, across)
        if together is not None:
            splits = _moved(first, together, found.torn(~dropped))
        if config.within == "drop":
            dropped[found.spare(splits, ~dropped)] = True
        elsewhere = [_elsewhere(other, found, prints, config) for other in others]
        if config.datasets == "refuse":
            _refuse_those_elsewhere(found, elsewhere)
        _refuse_lost_classes(found, splits, dropped, config)
    except DuplicatesError as refusal:
        refusal.report = report(splits=splits, dropped=dropped, elsewhere=elsewhere)
        raise
    dealt = together if drawn else None
    listed = report(splits=splits, dropped=dropped, elsewhere=elsewhere, together=dealt)
    kept = [i for i in range(len(rows)) if not dropped[i]]
    if len(kept) < len(rows) or splits != first:  # no group may be torn by it, no class lost
        splits = draw([replace(rows[i], split=splits[i]) for i in kept])
    return Guarded(kept, splits, listed)


@dataclass(frozen=True)
class _Elsewhere:
    """What another dataset has in common with this one: pairs (row here, duplicate there, how they are alike)."""

    name: str
    rows: list[int]
    pairs: list[tuple[int, Copy, Kind]]
    """The first of them."""


def _elsewhere(
    other: OtherDataset, found: DuplicateClusters, prints: Fingerprints, config: DuplicatesConfig
) -> _Elsewhere:
    like = found.elsewhere(other, prints, config.near, config.symmetries)
    pairs = [(i, _copy_there(other, j), kind) for i, j, kind in like[:MOST_FINDINGS]]
    return _Elsewhere(other.name, [i for i, _, _ in like], pairs)


def _copy_there(other: OtherDataset, j: int) -> Copy:
    labels = tuple(other.labels[j])
    names = named_labels(labels, other.classes)
    return Copy(key=other.keys[j], split=other.splits[j], labels=labels, label_names=names, dataset=other.name)


def _report(
    found: DuplicateClusters,
    prints: Fingerprints,
    config: DuplicatesConfig,
    across: Literal["report", "drop", "move", "refuse"],
    *,
    splits: Sequence[str],
    dropped: np.ndarray,
    elsewhere: Sequence[_Elsewhere],
    together: np.ndarray | None = None,
) -> DuplicatesReport:
    findings, num_findings = found.findings(splits, dropped)
    shared = np.zeros(len(found.rows), bool)
    for other in elsewhere:
        shared[other.rows] = True
        num_findings += len(other.rows)
        findings += [
            found.finding_elsewhere(*pair, splits=splits, dropped=dropped)
            for pair in other.pairs[: MOST_FINDINGS - len(findings)]
        ]
    return DuplicatesReport(
        images=len(found.rows),
        undecodable=int((prints.state == UNDECODABLE).sum()),
        blank=int(len(found.rows) - np.isin(prints.state, (UNDECODABLE, SHARP)).sum()),
        near=config.near,
        across=across,
        counts={**found.counts(together), "also in other datasets": int(shared.sum())},
        dropped=tuple(sorted(found.keys[i] for i in np.flatnonzero(dropped).tolist())),
        findings=tuple(findings),
        more=num_findings - len(findings),
        symmetries=config.symmetries,
    )


def _dropped(found: DuplicateClusters, config: DuplicatesConfig, across: str) -> np.ndarray:
    """(N,) bool: what is left out for its labels, or for a duplicate in a split held out more; raises as guard does."""
    dropped = np.zeros(len(found.rows), bool)
    conflicts = found.conflicts()
    if config.labels == "refuse" and conflicts:
        found.refuse(
            conflicts,
            "duplicates with different labels",
            "at least one of the labels is wrong",
            "--data.duplicates.labels drop or report",
        )
    if config.labels == "drop":
        dropped[[i for members in conflicts for i in members]] = True
    torn = found.torn(~dropped) if across in ("refuse", "drop") else []
    if across == "refuse" and torn:
        found.refuse(
            torn,
            "duplicates in different splits",
            "a model would be tested on what it has seen",
            "--data.duplicates.across drop, move or report",
        )
    dropped[[i for members in torn for i in members if found.splits[i] != found.held_out(members)]] = True
    return dropped


def _refuse_those_elsewhere(found: DuplicateClusters, elsewhere: Sequence[_Elsewhere]) -> None:
    for other in elsewhere:
        for here, there, _ in other.pairs[:1]:
            raise DuplicatesError(
                f"{len(other.rows)} images are also in the dataset {other.name!r} of this store (for example "
                f"{found.rows[here].where!r}, key {found.keys[here]}, which has the key {there.key} there): use "
                "another store, or --data.duplicates.datasets report"
            )


def _refuse_lost_classes(
    found: DuplicateClusters, splits: Sequence[str], dropped: np.ndarray, config: DuplicatesConfig
) -> None:
    """DuplicatesError where what was dropped or moved were all images that a split had of a class."""
    homes = list(zip(splits, dropped.tolist(), strict=True))
    if not dropped.any() and list(splits) == list(found.splits):
        return
    before = Counter(
        (split, label) for row, split in zip(found.rows, found.splits, strict=True) for label in row.labels
    )
    after = {
        (split, label) for row, (split, gone) in zip(found.rows, homes, strict=True) if not gone for label in row.labels
    }
    lost = [home for home in sorted(before) if home not in after]
    if not lost:
        return
    label, homes_lost = lost[0][1], [split for split, other in lost if other == lost[0][1]]
    there = [i for i, row in enumerate(found.rows) if found.splits[i] in homes_lost and label in row.labels]
    num_dropped = int(dropped[there].sum())
    fates = {"dropped": num_dropped, "moved to another split": len(there) - num_dropped}
    shown = " and ".join(f"{count} {fate}" for fate, count in fates.items() if count)
    keeping = {"across": config.across in ("drop", "move"), "labels": config.labels == "drop"}
    asked = " and ".join(f"--data.duplicates.{name} report" for name, does in keeping.items() if does)
    raise DuplicatesError(
        f"{lost_text(lost, found.classes)}: of the {len(there)} images that {found.label_names((label,))[0]!r} had "
        f"there, {shown} as duplicates, but every split needs every class; keep the duplicates with "
        f"{asked or '--data.duplicates.across report'}, add images of the class, or leave the class out"
    )


def _policy(config: DuplicatesConfig, *, drawn: bool, official: bool) -> Literal["report", "drop", "move", "refuse"]:
    if config.across != "auto":
        return config.across
    if drawn:
        return "move"  # no split is given, so duplicates are drawn together and nothing is lost
    return "report" if official else "refuse"


def _in_groups(rows: Sequence[Row], together: np.ndarray) -> list[Row]:
    """The rows with groups that hold duplicates together. A row that is alone stays without a group, so that sets
    without duplicates are drawn as before."""
    first = np.unique(together, return_index=True, return_inverse=True)
    home, times = first[1][first[2]].tolist(), np.bincount(first[2])[first[2]].tolist()
    found = []
    for i, row in enumerate(rows):
        first_row = rows[home[i]]
        found.append(row if times[i] == 1 else replace(row, group=first_row.group or f"{first_row.where} and its like"))
    return found


def _draw_val(rows: Sequence[Row], alike: np.ndarray, draw: Draw) -> list[str]:
    """The splits of rows that have some already. Where validation is drawn from train, duplicates stay together: the
    drawing must not make what is refused in official splits."""
    if {row.split for row in rows} != {"train", "test"}:
        return draw(rows)
    train = [i for i, row in enumerate(rows) if row.split == "train"]
    together = _in_groups([rows[i] for i in train], components([rows[i] for i in train], alike[train]))
    grouped = list(rows)
    for i, row in zip(train, together, strict=True):
        grouped[i] = row
    # The rows' own groups, not those of their duplicates, must not be in two splits.
    return draw([replace(row, split=split) for row, split in zip(rows, draw(grouped), strict=True)])


def _moved(splits: list[str], together: np.ndarray, torn: list[list[int]]) -> list[str]:
    """Complete groups move to where the most held out of their duplicates is."""
    target: dict[int, str] = {}
    for members in torn:
        home = int(together[members[0]])
        target[home] = max([*(splits[i] for i in members), target.get(home, SPLITS[0])], key=HELD_OUT.__getitem__)
    return [target.get(int(home), split) for home, split in zip(together, splits, strict=True)]
