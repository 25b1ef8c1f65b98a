"""The firewall between splits: images that stand twice, found before anything is written, and what is done about it.

Two images are exact copies where their decoded pixels are equal, near copies where their fingerprints differ in few
bits (fingerprint.py). Copies of a copy belong to one cluster. Legend: N images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_shards.config import LeakConfig, plain_name
from data_shards.fields import Count, Key, Label, SplitName, explained
from data_shards.leakage.fingerprint import SHARP, UNDECODABLE, Fingerprints, joined
from data_shards.manifest import MAKE_AGAIN, MANIFEST, ManifestError
from data_shards.source.row import Row
from data_shards.split import SPLITS, LeakError
from data_shards.store import Store, StoreKeyError

LEAKS = "leakage.json"
MOST_FINDINGS = 10_000
# Of one finding so many copies are always listed, and all of them until the report has so many in all: some 20 MB.
MOST_COPIES, MOST_COPIES_IN_ALL = 50, 100_000
_MOST_COPIES_ONCE = 50  # that reports without `equal` list of a finding
_HELD_OUT = {split: rank for rank, split in enumerate(SPLITS)}  # test is held out the most, then val

Draw = Callable[[Sequence[Row]], list[str]]
"""Gives each row its split; raises where a group is torn apart or a split lacks a class."""


class DuplicatesError(LeakError):
    """A conversion is refused because of copies; `report` lists all of them, by key."""

    report: LeakReport
    public: str
    """What was found, without the name of any file."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Copy(_Frozen):
    """One image of a finding."""

    key: Key
    split: SplitName
    labels: tuple[Label, ...]
    label_names: tuple[str, ...] = ()
    """The labels as class names; empty in reports of earlier releases."""
    dataset: str = ""
    """Empty: this one; another one as `dataset/name`."""
    fate: Literal["kept", "dropped", "moved"] = "kept"
    row: int = Field(default=-1, exclude=True)
    """Which of the image set's rows it is, while that is at hand."""

    @field_validator("dataset")
    @classmethod
    def _is_dataset(cls, value: str) -> str:
        parts = value.split("/") if value else []
        if len(value) > 511 or len(parts) not in (0, 2):
            raise ValueError("another dataset is named dataset/name")
        for part in parts:
            plain_name(part, "the name")
        return value


class Finding(_Frozen):
    """Images that are the same."""

    kind: Literal["exact", "near"]
    """exact: all of them have equal pixels; near: not all."""
    where: Literal["across splits", "within a split", "across datasets"]
    conflict: bool
    """Whether equal pixels have different labels."""
    copies: tuple[Copy, ...] = Field(min_length=2)
    """At least one of every split and label that there is."""
    more: int = Field(default=0, ge=0)
    """Copies beyond those that are listed. Reports of earlier releases listed 50 and did not count the others."""
    equal: int | None = None
    """How many of all the copies have pixels equal to another one's; none in reports of earlier releases, which called
    a finding exact where any two were."""

    @property
    def num_copies(self) -> int:
        """How many images it is about."""
        return len(self.copies) + self.more

    @property
    def head(self) -> str:
        """Its kind, and of a near one how many copies are exact."""
        if self.equal is None and self.kind == "exact" and self.num_copies > 2:
            return "exact or near"
        return f"near ({self.equal} with equal pixels)" if self.kind == "near" and self.equal else self.kind

    def rest(self, shown: int) -> str:
        """How many copies are not among the first `shown`, in words; "" where there are none."""
        hidden = self.num_copies - shown
        if self.equal is None and self.num_copies == _MOST_COPIES_ONCE:
            return f"and {hidden:,} or more copies: the release that made the report listed {_MOST_COPIES_ONCE}"
        return f"and {hidden:,} more copies" if hidden else ""


class LeakReport(_Frozen):
    """What was found among the images of a dataset, and what was done. `leakage.json` beside the manifest."""

    format: Literal[1] = 1
    images: Count
    undecodable: Count
    blank: Count
    """Images without structure, compared by their pixels only."""
    near: Count
    """Bits in which near copies may differ."""
    across: Literal["report", "drop", "move", "refuse"]
    """What was done about copies in different splits."""
    counts: dict[Annotated[str, Field(pattern=r"^[ -~]{1,80}$")], Count]
    """Copies beyond the first of their kind, by what they are."""
    dropped: tuple[Key, ...]
    """Keys of images that were left out."""
    findings: tuple[Finding, ...]
    """The worst first; at most 10,000."""
    more: Count
    """Findings beyond those."""


@dataclass(frozen=True)
class Guarded:
    """Which rows go on, in which split, and why: `rows[i]` are positions in the image set."""

    rows: list[int]
    splits: list[str]
    report: LeakReport


@dataclass(frozen=True)
class OtherDataset:
    """The images of another dataset in the store, to compare with."""

    name: str
    keys: Sequence[str]
    splits: Sequence[str]
    labels: Sequence[tuple[int, ...]]
    prints: Fingerprints
    classes: Sequence[str] = ()


def guard(
    rows: Sequence[Row],
    prints: Fingerprints,
    config: LeakConfig,
    *,
    draw: Draw,
    keys: Sequence[str],
    official: bool,
    classes: Sequence[str] = (),
    others: Iterable[OtherDataset] = (),
) -> Guarded:
    """The rows that go on, with their splits, and a report of all copies.

    Args:
        rows: Of the image set.
        prints: Their fingerprints.
        config: What is to be done about copies.
        draw: Gives rows their splits; where they have none yet, rows of one group are given the same.
        keys: Theirs in the shards.
        official: Whether splits that the rows have are those of a published set, which are kept as they are.
        classes: Names of the labels.
        others: Datasets to compare with.

    Raises:
        DuplicatesError: a copy is in two splits (or in another dataset, or under another label), and the config refuses
            that; or a class would lose all its images of a split to what the config does about copies.
    """
    exact, alike = _clusters(prints, config.near)
    drawn = all(row.split is None for row in rows)
    across = _policy(config, drawn=drawn, official=official)
    together = _components(rows, alike) if across == "move" else None
    if drawn:
        first = draw(rows if together is None else _in_groups(rows, together))
    else:
        first = _draw_val(rows, alike, draw) if across != "report" else draw(rows)
    found = _Found(rows, keys, exact, alike, first, classes)
    dropped, splits, elsewhere = np.zeros(len(rows), bool), list(first), []
    try:
        dropped = _dropped(found, config, across)
        torn = found.torn(~dropped) if across == "move" else []
        splits = _moved(first, together, torn) if together is not None else list(first)
        if config.within == "drop":
            dropped[found.spare(splits, ~dropped)] = True
        elsewhere = [_elsewhere(other, found, prints, config.near) for other in others]
        if config.datasets == "refuse":
            _refuse_those_elsewhere(found, elsewhere)
        _refuse_lost_classes(found, splits, dropped, config)
    except DuplicatesError as refusal:
        refusal.report = _report(found, prints, config, across, splits=splits, dropped=dropped, elsewhere=elsewhere)
        raise
    report = _report(
        found,
        prints,
        config,
        across,
        splits=splits,
        dropped=dropped,
        elsewhere=elsewhere,
        together=together if drawn else None,
    )
    kept = [i for i in range(len(rows)) if not dropped[i]]
    if len(kept) < len(rows) or splits != first:  # no group may be torn by it, no class lost
        splits = draw([replace(rows[i], split=splits[i]) for i in kept])
    return Guarded(kept, splits, report)


@dataclass(frozen=True)
class _Elsewhere:
    """What another dataset has in common with this one: pairs (row here, copy there, whether pixels are equal)."""

    name: str
    rows: list[int]
    pairs: list[tuple[int, Copy, bool]]
    """The first of them."""


def _elsewhere(other: OtherDataset, found: _Found, prints: Fingerprints, near: int) -> _Elsewhere:
    like = found.elsewhere(other, prints, near)
    pairs = [(i, _copy_there(other, j), equal) for i, j, equal in like[:MOST_FINDINGS]]
    return _Elsewhere(other.name, [i for i, _, _ in like], pairs)


def _copy_there(other: OtherDataset, j: int) -> Copy:
    labels = tuple(other.labels[j])
    names = named_labels(labels, other.classes)
    return Copy(key=other.keys[j], split=other.splits[j], labels=labels, label_names=names, dataset=other.name)


def _report(
    found: _Found,
    prints: Fingerprints,
    config: LeakConfig,
    across: Literal["report", "drop", "move", "refuse"],
    *,
    splits: Sequence[str],
    dropped: np.ndarray,
    elsewhere: Sequence[_Elsewhere],
    together: np.ndarray | None = None,
) -> LeakReport:
    findings, num_findings = found.findings(splits, dropped)
    shared = np.zeros(len(found.rows), bool)
    for other in elsewhere:
        shared[other.rows] = True
        num_findings += len(other.rows)
        findings += [
            found.finding_elsewhere(*pair, splits=splits, dropped=dropped)
            for pair in other.pairs[: MOST_FINDINGS - len(findings)]
        ]
    return LeakReport(
        images=len(found.rows),
        undecodable=int((prints.state == UNDECODABLE).sum()),
        blank=int(len(found.rows) - np.isin(prints.state, (UNDECODABLE, SHARP)).sum()),
        near=config.near,
        across=across,
        counts={**found.counts(together), "also in other datasets": int(shared.sum())},
        dropped=tuple(sorted(found.keys[i] for i in np.flatnonzero(dropped).tolist())),
        findings=tuple(findings),
        more=num_findings - len(findings),
    )


def _dropped(found: _Found, config: LeakConfig, across: str) -> np.ndarray:
    """(N,) bool: what is left out for its labels, or for a copy in a split held out more; raises as guard does."""
    dropped = np.zeros(len(found.rows), bool)
    conflicts = found.conflicts()
    if config.labels == "refuse" and conflicts:
        found.refuse(
            conflicts,
            "equal pixels under different labels",
            "at least one of the labels is wrong",
            "--data.leaks.labels drop or report",
        )
    if config.labels == "drop":
        dropped[[i for members in conflicts for i in members]] = True
    torn = found.torn(~dropped) if across in ("refuse", "drop") else []
    if across == "refuse" and torn:
        found.refuse(
            torn,
            "copies of one image in different splits",
            "a model would be tested on what it has seen",
            "--data.leaks.across drop, move or report",
        )
    dropped[[i for members in torn for i in members if found.splits[i] != found.held_out(members)]] = True
    return dropped


def _refuse_those_elsewhere(found: _Found, elsewhere: Sequence[_Elsewhere]) -> None:
    for other in elsewhere:
        for here, there, _ in other.pairs[:1]:
            raise DuplicatesError(
                f"{len(other.rows)} images are also in the dataset {other.name!r} of this store (for example "
                f"{found.rows[here].where!r}, key {found.keys[here]}, which has the key {there.key} there): use "
                "another store, or --data.leaks.datasets report"
            )


def _refuse_lost_classes(found: _Found, splits: Sequence[str], dropped: np.ndarray, config: LeakConfig) -> None:
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
    told = " and ".join(f"{count} {fate}" for fate, count in fates.items() if count)
    keeping = {"across": config.across in ("drop", "move"), "labels": config.labels == "drop"}
    asked = " and ".join(f"--data.leaks.{name} report" for name, does in keeping.items() if does)
    raise DuplicatesError(
        f"{lost_text(lost, found.classes)}: of the {len(there)} images that {found.label_names((label,))[0]!r} had "
        f"there, {told} as duplicates, but every split needs every class; keep the duplicates with "
        f"{asked or '--data.leaks.across report'}, add images of the class, or leave the class out"
    )


def read_report(store: Store, key: str = LEAKS) -> LeakReport:
    """The report of a finished dataset. ManifestError where it is missing or none."""
    try:
        return LeakReport.model_validate_json(store.get(key), strict=True)
    except (StoreKeyError, ValidationError) as error:
        problem = explained(error) if isinstance(error, ValidationError) else " ".join(str(error).split())[:120]
        raise ManifestError(
            f"{store.uri} has no complete {LEAKS} ({problem}): delete {MANIFEST} there {MAKE_AGAIN}"
        ) from error


def refuse_elsewhere(report: LeakReport) -> None:
    """LeakError where images of a finished dataset were also in another one when it was made."""
    for finding in report.findings:
        if finding.where == "across datasets":
            num = report.counts.get("also in other datasets", "some")
            raise LeakError(
                f"{num} images are also in other datasets of this store (e.g. key {finding.copies[0].key} in "
                f"{finding.copies[1].dataset!r}): use another store, or --data.leaks.datasets report"
            )


def _policy(config: LeakConfig, *, drawn: bool, official: bool) -> Literal["report", "drop", "move", "refuse"]:
    if config.across != "auto":
        return config.across
    if drawn:
        return "move"  # nothing is fixed yet, so copies are dealt out together and nothing is lost
    return "report" if official else "refuse"


def _clusters(prints: Fingerprints, near: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the clusters of exact copies, and of exact and near copies together: (N,) int64 each."""
    from data_shards.leakage.near import clusters, near_clusters  # with numba, which only this needs

    exact = clusters(prints.pixels)
    lone = np.flatnonzero(prints.state == UNDECODABLE)
    exact[lone] = len(prints) + lone  # what cannot be seen is like nothing
    if near == 0:
        return exact, exact
    sharp = np.flatnonzero(prints.state == SHARP)
    return exact, _united(exact, sharp, near_clusters(prints.bits[sharp], most=near))


def _united(first: np.ndarray, among: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The finest clustering of which both are parts; `second` numbers the images `among` only."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first = np.unique(first, return_inverse=True)[1]
    second = np.unique(second, return_inverse=True)[1]
    num_first, num = int(first.max(initial=-1)) + 1, int(first.max(initial=-1) + second.max(initial=-1)) + 2
    edges = coo_array((np.ones(len(among), np.int8), (first[among], num_first + second)), shape=(num, num))
    return connected_components(edges, directed=False)[1][first].astype(np.int64)


def _components(rows: Sequence[Row], alike: np.ndarray) -> np.ndarray:
    """Numbers of what must stay together: groups that share copies."""
    numbers: dict[str, int] = {}
    named = [(i, numbers.setdefault(row.group, len(numbers))) for i, row in enumerate(rows) if row.group is not None]
    if not named:
        return alike
    among, group = (np.array(column, np.int64) for column in zip(*named, strict=True))
    return _united(alike, among, group)


def _in_groups(rows: Sequence[Row], together: np.ndarray) -> list[Row]:
    """The rows with groups that hold copies together. A row that stands alone stays without a group, so that sets
    without copies are drawn as if nobody had looked."""
    first = np.unique(together, return_index=True, return_inverse=True)
    home, times = first[1][first[2]].tolist(), np.bincount(first[2])[first[2]].tolist()
    found = []
    for i, row in enumerate(rows):
        first_row = rows[home[i]]
        found.append(row if times[i] == 1 else replace(row, group=first_row.group or f"{first_row.where} and its like"))
    return found


def _draw_val(rows: Sequence[Row], alike: np.ndarray, draw: Draw) -> list[str]:
    """The splits of rows that come with some. Where validation is drawn from train, copies stay together: what is
    refused of official splits must not be made by the drawing."""
    if {row.split for row in rows} != {"train", "test"}:
        return draw(rows)
    train = [i for i, row in enumerate(rows) if row.split == "train"]
    together = _in_groups([rows[i] for i in train], _components([rows[i] for i in train], alike[train]))
    grouped = list(rows)
    for i, row in zip(train, together, strict=True):
        grouped[i] = row
    # The rows' own groups, not those of their copies, must not be in two splits.
    return draw([replace(row, split=split) for row, split in zip(rows, draw(grouped), strict=True)])


def _moved(splits: list[str], together: np.ndarray, torn: list[list[int]]) -> list[str]:
    """Whole groups move to where the most held out of their copies is."""
    target: dict[int, str] = {}
    for members in torn:
        home = int(together[members[0]])
        target[home] = max([*(splits[i] for i in members), target.get(home, SPLITS[0])], key=_HELD_OUT.__getitem__)
    return [target.get(int(home), split) for home, split in zip(together, splits, strict=True)]


class _Found:
    """The clusters of several images, and what they mean under the splits first given."""

    def __init__(
        self,
        rows: Sequence[Row],
        keys: Sequence[str],
        exact: np.ndarray,
        alike: np.ndarray,
        splits: Sequence[str],
        classes: Sequence[str] = (),
    ):
        self.rows, self.keys, self.exact, self.splits, self.classes = rows, keys, exact, splits, classes
        self.same, self.like = _several(exact), _several(alike)

    def conflicts(self) -> list[list[int]]:
        """Equal images under different labels."""
        return [members for members in self.same if len({self.rows[i].labels for i in members}) > 1]

    def torn(self, allowed: np.ndarray) -> list[list[int]]:
        """Members of each cluster that stands in more than one split."""
        kept = [[i for i in members if allowed[i]] for members in self.like]
        return [members for members in kept if len({self.splits[i] for i in members}) > 1]

    def held_out(self, members: Sequence[int]) -> str:
        """The split that the members should rather be tested in than trained on."""
        return max((self.splits[i] for i in members), key=_HELD_OUT.__getitem__)

    def spare(self, splits: Sequence[str], allowed: np.ndarray) -> list[int]:
        """All but the first of equal images with equal labels in one split."""
        seen: set[tuple] = set()
        spare = []
        for members in self.same:
            for i in members:
                if allowed[i] and (home := (self.exact[i], splits[i], self.rows[i].labels)) in seen:
                    spare.append(i)
                elif allowed[i]:
                    seen.add(home)
        return spare

    def findings(self, splits: Sequence[str], dropped: np.ndarray) -> tuple[list[Finding], int]:
        """The worst clusters (in different splits, then under different labels, then exact), and how many there are."""
        conflicts = {int(self.exact[members[0]]) for members in self.conflicts()}
        found = []
        for members in self.like:
            numbers = Counter(int(self.exact[i]) for i in members)
            equal = sum(times for times in numbers.values() if times > 1)
            kind: Literal["exact", "near"] = "exact" if len(numbers) == 1 else "near"
            harmless = not numbers.keys() & conflicts
            order = _where(self.splits[i] for i in members), harmless, kind, -equal, self.keys[members[0]]
            found.append((order, members))
        found.sort()
        # Only of the worst: a finding takes some 3 kB, and a set that is in the store twice has as many as images.
        listed, room = [], MOST_COPIES_IN_ALL
        for (where, harmless, kind, equal, _), members in found[:MOST_FINDINGS]:
            shown = self._telling_first(members)[: max(MOST_COPIES, room)]
            room -= len(shown)
            listed.append(
                Finding(
                    kind=kind,
                    where=where,
                    conflict=not harmless,
                    copies=tuple(self._copy(i, splits, dropped) for i in shown),
                    more=len(members) - len(shown),
                    equal=-equal,
                )
            )
        return listed, len(found)

    def _telling_first(self, members: Sequence[int]) -> list[int]:
        """The members, those first that show in which splits and under which labels the image is."""
        seen: set[tuple] = set()
        first: list[int] = []
        others: list[int] = []
        for i in members:
            home = self.splits[i], self.rows[i].labels
            (others if home in seen else first).append(i)
            seen.add(home)
        return [*first, *others]

    def label_names(self, labels: Sequence[int]) -> tuple[str, ...]:
        """The labels as class names."""
        return named_labels(labels, self.classes)

    def _copy(self, i: int, splits: Sequence[str], dropped: np.ndarray) -> Copy:
        fate: Literal["kept", "dropped", "moved"] = (
            "dropped" if dropped[i] else "moved" if splits[i] != self.splits[i] else "kept"
        )
        labels = self.rows[i].labels
        return Copy(
            key=self.keys[i],
            split=self.splits[i],
            labels=labels,
            label_names=self.label_names(labels),
            fate=fate,
            row=i,
        )

    def counts(self, together: np.ndarray | None) -> dict[str, int]:
        """Copies beyond the first, by kind and place; an image counts once, at its worst."""
        counts = Counter(
            {f"{kind} {where}": 0 for where in ("across splits", "within a split") for kind in ("exact", "near")}
        )
        for members in self.like:
            of_image: dict[int, list[int]] = {}
            for i in members:
                of_image.setdefault(int(self.exact[i]), []).append(i)
            for same in of_image.values():
                where = _where([self.splits[i] for i in same])
                counts[f"exact {where}"] += len(same) - 1
            counts[f"near {_where([self.splits[i] for i in members])}"] += len(of_image) - 1
        counts["under different labels"] = sum(len(members) for members in self.conflicts())
        if together is not None:  # copies of different groups, which the draw keeps on one side
            groups = ({self.rows[i].group or str(i) for i in members} for members in self.like)
            counts["dealt out together"] = sum(len(names) - 1 for names in groups)
        return dict(counts)

    def elsewhere(self, other: OtherDataset, prints: Fingerprints, near: int) -> list[tuple[int, int, bool]]:
        """Images of this dataset that the other one holds too: (which, which there, whether pixels are equal)."""
        num = len(prints)
        both = joined([prints, other.prints])
        exact, alike = _clusters(both, near)
        # The first of theirs that is equal, or else like it.
        equal = {number: j for j, number in reversed(list(enumerate(exact[num:].tolist())))}
        like = {number: j for j, number in reversed(list(enumerate(alike[num:].tolist())))}
        ours = zip(exact[:num].tolist(), alike[:num].tolist(), strict=True)
        return [(i, equal.get(e, like[a]), e in equal) for i, (e, a) in enumerate(ours) if a in like]

    def finding_elsewhere(
        self, i: int, theirs: Copy, equal: bool, *, splits: Sequence[str], dropped: np.ndarray
    ) -> Finding:
        """Image i of this dataset, and what it is there."""
        return Finding(
            kind="exact" if equal else "near",
            where="across datasets",
            conflict=False,
            copies=(self._copy(i, splits, dropped), theirs),
            equal=2 if equal else 0,
        )

    def refuse(self, clusters_: list[list[int]], what: str, why: str, remedy: str) -> None:
        """Raises, with the first of them by the names that their owner knows."""
        shown = []
        for members in clusters_[:3]:
            one = members[0]
            here = self.splits[one], self.rows[one].labels
            two = next((i for i in members if (self.splits[i], self.rows[i].labels) != here), members[1])
            kind = "equal pixels" if self.exact[one] == self.exact[two] else "nearly equal"
            named = [f"{self.rows[i].where!r} ({self.splits[i]}, {self._label_text(i)})" for i in (one, two)]
            shown.append(f"{' = '.join(named)}: {kind}")
        if len(clusters_) > len(shown):
            shown.append(f"and {len(clusters_) - len(shown)} more")
        raise DuplicatesError(
            f"{len(clusters_)} times {what} ({'; '.join(shown)}): {why}; fix the set, or say what to do with {remedy}"
        )

    def _label_text(self, i: int) -> str:
        return "label " + (", ".join(map(repr, self.label_names(self.rows[i].labels))) or "none")


def named_labels(labels: Sequence[int], classes: Sequence[str]) -> tuple[str, ...]:
    """Class names of labels; "class 2" where the names are not known."""
    return tuple(classes[label] if label < len(classes) else f"class {label}" for label in labels)


def lost_text(lost: Sequence[tuple[str, int]], classes: Sequence[str]) -> str:
    """Which classes are gone from which splits, from pairs (split, label): one clause, the first label first."""
    homes: dict[int, list[str]] = {}
    for split, label in lost:
        homes.setdefault(label, []).append(split)
    told = []
    for label, splits in homes.items():
        each = sorted(splits, key=SPLITS.index)
        among = " and ".join([*([", ".join(each[:-1])] if each[:-1] else []), each[-1]])
        told.append(f"class {named_labels((label,), classes)[0]!r} is gone from {among}")
    more = [f"{len(told) - 5} more classes are gone from some split"] if len(told) > 5 else []
    return ", ".join([*told[:5], *more])


def _where(splits: Iterable[str]) -> Literal["across splits", "within a split"]:
    return "across splits" if len(set(splits)) > 1 else "within a split"


def _several(numbers: np.ndarray) -> list[list[int]]:
    """The members, in order, of every cluster that has more than one."""
    _, number, times = np.unique(numbers, return_inverse=True, return_counts=True)
    among = np.flatnonzero(times[number] > 1)  # few: most images stand alone
    order = among[np.argsort(number[among], kind="stable")]
    cuts = np.flatnonzero(np.diff(number[order])) + 1
    return [part.tolist() for part in np.split(order, cuts) if len(part)]
