"""Images that are the same: clusters of exact and near duplicates, and what they mean under the splits of the rows.

Two images are exact duplicates where their decoded pixels are equal, near duplicates where their fingerprints differ in
few bits (fingerprint.py), turned ones where that is so after one of the eight symmetries of the square, shifted ones
where they agree after a small turn or shift (shifted.py). Duplicates of a duplicate belong to one cluster.
Legend: N images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_shards.duplicates.fingerprint import SHARP, UNDECODABLE, Fingerprints, joined
from data_shards.duplicates.report import Copy, DuplicatesError, Finding, Kind, Symmetries, named_labels
from data_shards.source.row import Row
from data_shards.split import SPLITS

MOST_FINDINGS = 10_000
# So many duplicates of a finding are always listed; all of them until the report has so many in total, some 20 MB.
MOST_COPIES, MOST_COPIES_IN_ALL = 50, 100_000
KINDS: tuple[Kind, ...] = ("exact", "near", "turned", "shifted")
"""How duplicates are alike, a level of clusters each."""
_LIKENESS = {"exact": "equal pixels", "near": "nearly equal", "turned": "turned or mirrored", "shifted": "shifted"}
HELD_OUT = {split: rank for rank, split in enumerate(SPLITS)}  # test is held out most, then val


@dataclass(frozen=True)
class OtherDataset:
    """The images of another dataset in the store, to compare with."""

    name: str
    keys: Sequence[str]
    splits: Sequence[str]
    labels: Sequence[tuple[int, ...]]
    prints: Fingerprints
    classes: Sequence[str] = ()


class DuplicateClusters:
    """The clusters of several duplicates each, and what they mean under the splits first given."""

    def __init__(
        self,
        rows: Sequence[Row],
        keys: Sequence[str],
        levels: Sequence[np.ndarray],
        splits: Sequence[str],
        classes: Sequence[str] = (),
    ):
        """`levels` are those of `clusters_of`."""
        self.rows, self.keys, self.levels, self.splits, self.classes = rows, keys, levels, splits, classes
        self.exact = levels[0]
        self.same, self.like = _several(self.exact), _several(levels[-1])

    def conflicts(self) -> list[list[int]]:
        """Equal images under different labels."""
        return [members for members in self.same if len({self.rows[i].labels for i in members}) > 1]

    def torn(self, allowed: np.ndarray) -> list[list[int]]:
        """Members of each cluster that is in more than one split."""
        kept = [[i for i in members if allowed[i]] for members in self.like]
        return [members for members in kept if len({self.splits[i] for i in members}) > 1]

    def held_out(self, members: Sequence[int]) -> str:
        """The split that the members should rather be tested in than trained on."""
        return max((self.splits[i] for i in members), key=HELD_OUT.__getitem__)

    def spare(self, splits: Sequence[str], allowed: np.ndarray) -> list[int]:
        """All but the first of equal images with equal labels in one split."""
        seen: set[tuple[object, ...]] = set()
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
            level = self._level(members)
            harmless = not numbers.keys() & conflicts
            order = _where(self.splits[i] for i in members), harmless, level, -equal, self.keys[members[0]]
            found.append((order, members))
        found.sort()
        # Only of the worst: a finding takes some 3 kB, and a set that is in the store twice has as many as images.
        listed, room = [], MOST_COPIES_IN_ALL
        for (where, harmless, level, equal, _), members in found[:MOST_FINDINGS]:
            shown = self._telling_first(members)[: max(MOST_COPIES, room)]
            room -= len(shown)
            listed.append(
                Finding(
                    kind=KINDS[level],
                    where=where,
                    conflict=not harmless,
                    copies=tuple(self._copy(i, splits, dropped) for i in shown),
                    more=len(members) - len(shown),
                    equal=-equal,
                )
            )
        return listed, len(found)

    def _level(self, members: Sequence[int]) -> int:
        """The first level at which the members are one cluster."""
        return next(n for n, numbers in enumerate(self.levels) if len({int(numbers[i]) for i in members}) == 1)

    def _telling_first(self, members: Sequence[int]) -> list[int]:
        """The members, those first that show in which splits and under which labels the image is."""
        seen: set[tuple[object, ...]] = set()
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
        """Duplicates beyond the first, by kind and place; an image counts once, at its worst."""
        kinds = KINDS[: max(2, len(self.levels))]
        counts = Counter({f"{kind} {where}": 0 for where in ("across splits", "within a split") for kind in kinds})
        for members in self.like:
            parts = {i: [i] for i in members}
            for kind, numbers in zip(kinds, self.levels, strict=False):
                whole: dict[int, list[list[int]]] = {}
                for part in parts.values():
                    whole.setdefault(int(numbers[part[0]]), []).append(part)
                parts = {number: [i for part in inside for i in part] for number, inside in whole.items()}
                for number, inside in whole.items():
                    counts[f"{kind} {_where([self.splits[i] for i in parts[number]])}"] += len(inside) - 1
        counts["under different labels"] = sum(len(members) for members in self.conflicts())
        if together is not None:  # duplicates of different groups, which the draw keeps on one side
            groups = ({self.rows[i].group or str(i) for i in members} for members in self.like)
            counts["dealt out together"] = sum(len(names) - 1 for names in groups)
        return dict(counts)

    def elsewhere(
        self, other: OtherDataset, prints: Fingerprints, near: int, symmetries: Symmetries
    ) -> list[tuple[int, int, Kind]]:
        """Images of this dataset that the other one holds too: (which, which there, how they are alike)."""
        num = len(prints)
        levels = clusters_of(joined([prints, other.prints]), near, symmetries)
        # The first of theirs that is equal, or else like it.
        theirs = [{number: j for j, number in reversed(list(enumerate(each[num:].tolist())))} for each in levels]
        found: list[tuple[int, int, Kind]] = []
        for i, numbers in enumerate(zip(*(each[:num].tolist() for each in levels), strict=True)):
            level = next((n for n, number in enumerate(numbers) if number in theirs[n]), None)
            if level is not None:
                found.append((i, theirs[level][numbers[level]], KINDS[level]))
        return found

    def finding_elsewhere(
        self, i: int, theirs: Copy, kind: Kind, *, splits: Sequence[str], dropped: np.ndarray
    ) -> Finding:
        """Image i of this dataset, and what it is there."""
        return Finding(
            kind=kind,
            where="across datasets",
            conflict=False,
            copies=(self._copy(i, splits, dropped), theirs),
            equal=2 if kind == "exact" else 0,
        )

    def refuse(self, clusters: list[list[int]], what: str, why: str, remedy: str) -> None:
        """Raises, with the first of them by the names that their owner knows."""
        shown = []
        for members in clusters[:3]:
            one = members[0]
            here = self.splits[one], self.rows[one].labels
            two = next((i for i in members if (self.splits[i], self.rows[i].labels) != here), members[1])
            kind = _LIKENESS[KINDS[self._level((one, two))]]
            named = [f"{self.rows[i].where!r} ({self.splits[i]}, {self._label_text(i)})" for i in (one, two)]
            shown.append(f"{' = '.join(named)}: {kind}")
        if len(clusters) > len(shown):
            shown.append(f"and {len(clusters) - len(shown)} more")
        images = "1 image has" if len(clusters) == 1 else f"{len(clusters):,} images have"
        raise DuplicatesError(
            f"{images} {what} ({'; '.join(shown)}): {why}; fix the set, or say what to do with {remedy}"
        )

    def _label_text(self, i: int) -> str:
        return "label " + (", ".join(map(repr, self.label_names(self.rows[i].labels))) or "none")


def clusters_of(prints: Fingerprints, near: int, symmetries: Symmetries = "off") -> tuple[np.ndarray, ...]:
    """Numbers of the clusters, (N,) int64 each: of exact duplicates, of exact and near ones together, and, if they are
    searched for, of these and turned ones together, and of these and shifted ones (where there are thumbnails)."""
    from data_shards.duplicates.near import clusters, near_clusters, turned_clusters  # with numba

    exact = clusters(prints.pixels)
    lone = np.flatnonzero(prints.state == UNDECODABLE)
    exact[lone] = len(prints) + lone  # an undecodable image has no duplicates
    if near == 0:
        return exact, exact
    sharp = np.flatnonzero(prints.state == SHARP)
    alike = _united(exact, sharp, near_clusters(prints.bits[sharp], most=near))
    if symmetries == "off":
        return exact, alike
    turned = _united(alike, sharp, turned_clusters(prints.bits[sharp], most=near))
    if symmetries == "exact" or prints.thumbnails is None:
        return exact, alike, turned
    from data_shards.duplicates.shifted import shifted_clusters

    return exact, alike, turned, _united(turned, sharp, shifted_clusters(prints.thumbnails[sharp]))


def _united(first: np.ndarray, among: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The finest clustering of which both are parts; `second` numbers the images `among` only."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first = np.unique(first, return_inverse=True)[1]
    second = np.unique(second, return_inverse=True)[1]
    num_first, num = int(first.max(initial=-1)) + 1, int(first.max(initial=-1) + second.max(initial=-1)) + 2
    edges = coo_array((np.ones(len(among), np.int8), (first[among], num_first + second)), shape=(num, num))
    united: np.ndarray = connected_components(edges, directed=False)[1][first].astype(np.int64)
    return united


def components(rows: Sequence[Row], alike: np.ndarray) -> np.ndarray:
    """Numbers of what must stay together: groups that share duplicates."""
    numbers: dict[str, int] = {}
    named = [(i, numbers.setdefault(row.group, len(numbers))) for i, row in enumerate(rows) if row.group is not None]
    if not named:
        return alike
    among, group = (np.array(column, np.int64) for column in zip(*named, strict=True))
    return _united(alike, among, group)


def _where(splits: Iterable[str]) -> Literal["across splits", "within a split"]:
    return "across splits" if len(set(splits)) > 1 else "within a split"


def _several(numbers: np.ndarray) -> list[list[int]]:
    """The members, in order, of every cluster that has more than one."""
    _, number, times = np.unique(numbers, return_inverse=True, return_counts=True)
    among = np.flatnonzero(times[number] > 1)  # few: most images are alone
    order = among[np.argsort(number[among], kind="stable")]
    cuts = np.flatnonzero(np.diff(number[order])) + 1
    return [part.tolist() for part in np.split(order, cuts) if len(part)]
