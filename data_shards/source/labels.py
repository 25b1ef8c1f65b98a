"""What the configuration changes about the labels and groups of a source: classes left out or renamed, groups by path.

Every layout uses the same rules; a table applies them to names, folders and .npz files to class indices.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from data_shards.config import DataConfig
from data_shards.options import listed
from data_shards.source.row import Row


class ClassEdits:
    """`data.drop_classes` and `data.class_map`. Names are compared in Unicode's form NFC and replaced once."""

    def __init__(self, config: DataConfig):
        pairs = [pair.rpartition("=") for pair in config.class_map]
        self._new = {composed(old.strip()): composed(new.strip()) for old, _, new in pairs}
        self.dropped = frozenset(composed(name.strip()) for name in config.drop_classes)
        self.old_names = frozenset(self._new) | self.dropped
        self.new_names = frozenset(self._new.values())

    def __bool__(self) -> bool:
        return bool(self.old_names)

    def new_name(self, name: str) -> str | None:
        """What a class of the source is called in the dataset; None where it is left out."""
        return None if name in self.dropped else self._new.get(name, name)

    def classes(self, names: Sequence[str]) -> tuple[str, ...]:
        """The dataset's classes from the source's, in their order.

        A class that is renamed to another one of them joins that; a new name takes the place of its first old one.
        """
        as_written = {composed(name): name for name in names}
        staying = {name for name in as_written if self.new_name(name) == name}
        renamed = {name: self.new_name(name) for name in as_written}
        new = [new for name, new in renamed.items() if new is not None and (new == name or new not in staying)]
        return tuple(dict.fromkeys(as_written.get(name, name) for name in new))

    def require_known(self, names: Iterable[str], source: str) -> None:
        """ValueError where a class to leave out or rename is not among the names of the source."""
        there = {composed(name) for name in names}
        for option, wanted in (("drop-classes", self.dropped), ("class-map", frozenset(self._new))):
            if unknown := sorted(wanted - there):
                raise ValueError(
                    f"--data.{option} names the class {unknown[0]!r}, but {source} has {listed(sorted(there))}: "
                    "correct the name or leave it out"
                )

    def names_in_source(self, named: Sequence[str], there: Sequence[str]) -> tuple[str, ...]:
        """The classes to look for in a source that has the names `there`, where `named` are those of the configuration.

        A named class may be one that only renaming brings about; a class to rename or leave out need not be named.
        """
        if not named:
            return ()
        present = {composed(name) for name in there}
        expected = [name for name in named if composed(name) in present or composed(name) not in self.new_names]
        known = {composed(name) for name in expected}
        return (*expected, *(name for name in there if composed(name) in self.old_names - known))


class Relabelled(NamedTuple):
    """Rows under the classes of the dataset, and a sentence for each change that its owner should know."""

    rows: list[Row]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def relabelled(rows: Sequence[Row], classes: Sequence[str], config: DataConfig, source: str) -> Relabelled:
    """Rows whose labels are indices of `classes`, after `data.drop_classes` and `data.class_map`.

    Raises ValueError where one of these names a class that the source does not have, or no image is left.
    """
    edits = ClassEdits(config)
    if not edits:
        return Relabelled(list(rows), tuple(classes), ())
    edits.require_known(classes, source)
    remaining = edits.classes(config.classes or classes)
    require_named(remaining, edits)
    index_of = {composed(name): index for index, name in enumerate(remaining)}
    several = config.task == "multilabel"
    counts: Counter[str] = Counter()
    kept = []
    for row in rows:
        old = [composed(classes[label]) for label in row.labels]
        counts.update(old)
        new = [name for name in map(edits.new_name, old) if name is not None]
        if new or several:
            kept.append(dataclasses.replace(row, labels=tuple(sorted({index_of[name] for name in new}))))
    if not kept:
        raise ValueError(f"--data.drop-classes leaves no image of {source}: name fewer classes")
    return Relabelled(kept, remaining, edit_notes(edits, counts, several=several))


def require_named(classes: Sequence[str], edits: ClassEdits) -> None:
    """ValueError where renaming brings about a class that is not one of the dataset's."""
    if missing := sorted(edits.new_names - set(map(composed, classes))):
        raise ValueError(
            f"--data.class-map renames to {missing[0]!r}, but the classes are {listed(classes)}: add it to "
            "--data.classes or correct the name"
        )


def edit_notes(edits: ClassEdits, counts: Counter[str], *, several: bool) -> tuple[str, ...]:
    """What was left out and renamed, with the images of each class; `counts` are those of the source's names."""
    notes = []
    if edits.dropped:
        dropped = ", ".join(f"{name or 'without a label'} ({counts[name]:,})" for name in sorted(edits.dropped))
        what = "the label is removed, the images are kept" if several else "the images of these classes are left out"
        notes.append(f"--data.drop-classes: {what}: {dropped}")
    renamed = [name for name in sorted(edits.old_names - edits.dropped) if edits.new_name(name) != name]
    if renamed:
        pairs = ", ".join(
            f"{name or 'without a label'} ({counts[name]:,}) -> {edits.new_name(name)}" for name in renamed
        )
        notes.append(f"--data.class-map: images are labelled {pairs}")
    return tuple(notes)


def grouped_by_path(rows: Sequence[Row], config: DataConfig) -> list[Row]:
    """The rows, each with the group that `data.group_pattern` finds in its path; without a pattern as they are.

    Raises ValueError where a path does not match, or its group is empty.
    """
    if not config.group_pattern:
        return list(rows)
    pattern = re.compile(config.group_pattern)
    found = [pattern.search(row.where) for row in rows]
    groups = [match and match.group(1) for match in found]
    unmatched = [row.where for row, group in zip(rows, groups, strict=True) if not group]
    if unmatched:
        examples = ", ".join(repr(where) for where in unmatched[:3])
        raise ValueError(
            f"the paths of {len(unmatched):,} of {len(rows):,} images give no group by --data.group-pattern "
            f"{config.group_pattern!r} ({examples}): every image needs its group, so widen the pattern or move these "
            "images away"
        )
    return [dataclasses.replace(row, group=composed(str(group))) for row, group in zip(rows, groups, strict=True)]


def check_settings(config: DataConfig) -> None:
    """ValueError where a setting has no meaning for the layout or task of a resolved configuration."""
    unused = {
        "group_pattern": config.layout in ("npz", "phantoms") and "images in files (folders or table)",
        "drop_classes": config.layout == "phantoms" and "image sets of your own",
        "class_map": config.layout == "phantoms" and "image sets of your own",
        "no_finding": (config.layout != "table" or config.task != "multilabel") and "multilabel tables",
        "split_values": config.layout != "folders"
        and any(pair.rpartition("=")[2] == "drop" for pair in config.split_values)
        and "split folders (=drop leaves one out)",
        "label_separator": (config.layout != "table" or config.task != "multilabel") and "multilabel tables",
    }
    for name, needed in unused.items():
        value = getattr(config, name)
        if needed and value != type(config).model_fields[name].default:
            remedy = "set --data.task multilabel or leave it out" if "tables" in needed else "leave it out"
            raise ValueError(
                f"--data.{name.replace('_', '-')} {value if isinstance(value, str) else ' '.join(value)!r} is for "
                f"{needed}, but the layout is {config.layout} and the task {config.task}: {remedy}"
            )


def composed(name: str) -> str:
    """The name in Unicode's form NFC: an accent is a part of its letter, however the source coded it."""
    return unicodedata.normalize("NFC", name)
