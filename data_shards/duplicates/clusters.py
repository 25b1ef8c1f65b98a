"""Images that are the same: clusters of exact and near duplicates, and what they mean under the splits of the rows.

Two images are exact duplicates where their decoded pixels are equal, near duplicates where their fingerprints differ in
few bits (fingerprint.py). Duplicates of a duplicate belong to one cluster. Legend: N images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_shards.duplicates.fingerprint import SHARP, UNDECODABLE, Fingerprints, joined
from data_shards.duplicates.report import Copy, DuplicatesError, Finding, named_labels
from data_shards.source.row import Row
from data_shards.split import SPLITS

MOST_FINDINGS = 10_000
# So many duplicates of a finding are always listed; all of them until the report has so many in total, some 20 MB.
MOST_COPIES, MOST_COPIES_IN_ALL = 50, 100_000
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
        if together is not None:  # duplicates of different groups, which the draw keeps on one side
            groups = ({self.rows[i].group or str(i) for i in members} for members in self.like)
            counts["dealt out together"] = sum(len(names) - 1 for names in groups)
        return dict(counts)

    def elsewhere(self, other: OtherDataset, prints: Fingerprints, near: int) -> list[tuple[int, int, bool]]:
        """Images of this dataset that the other one holds too: (which, which there, whether pixels are equal)."""
        num = len(prints)
        both = joined([prints, other.prints])
        exact, alike = clusters_of(both, near)
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

    def refuse(self, clusters: list[list[int]], what: str, why: str, remedy: str) -> None:
        """Raises, with the first of them by the names that their owner knows."""
        shown = []
        for members in clusters[:3]:
            one = members[0]
            here = self.splits[one], self.rows[one].labels
            two = next((i for i in members if (self.splits[i], self.rows[i].labels) != here), members[1])
            kind = "equal pixels" if self.exact[one] == self.exact[two] else "nearly equal"
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


def clusters_of(prints: Fingerprints, near: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the clusters of exact duplicates, and of exact and near ones together: (N,) int64 each."""
    from data_shards.duplicates.near import clusters, near_clusters  # with numba, which only this needs

    exact = clusters(prints.pixels)
    lone = np.flatnonzero(prints.state == UNDECODABLE)
    exact[lone] = len(prints) + lone  # an undecodable image has no duplicates
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
