"""Changes to a source's labels and groups: classes dropped or renamed, groups found by path.

All layouts use the same rules; tables apply them to class names, folders and .npz files to class indices.
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
        """The dataset's name for a class of the source; None if it is dropped."""
        return None if name in self.dropped else self._new.get(name, name)

    def classes(self, names: Sequence[str]) -> tuple[str, ...]:
        """The dataset's classes, in the order of the source's.

        A class renamed to an existing one is merged into it; a new name takes the position of its first old name.
        """
        as_written = {composed(name): name for name in names}
        staying = {name for name in as_written if self.new_name(name) == name}
        renamed = {name: self.new_name(name) for name in as_written}
        new = [new for name, new in renamed.items() if new is not None and (new == name or new not in staying)]
        return tuple(dict.fromkeys(as_written.get(name, name) for name in new))

    def require_known(self, names: Iterable[str], source: str) -> None:
        """ValueError if a class to drop or rename is not in the source."""
        there = {composed(name) for name in names}
        for option, wanted in (("drop-classes", self.dropped), ("class-map", frozenset(self._new))):
            if unknown := sorted(wanted - there):
                raise ValueError(
                    f"--data.{option} names the class {unknown[0]!r}, but {source} has {listed(sorted(there))}; "
                    "correct or remove the name"
                )

    def names_in_source(self, named: Sequence[str], there: Sequence[str]) -> tuple[str, ...]:
        """The classes to look for in a source with the names `there`, if the configuration names the classes `named`.

        A named class may exist only after renaming; a class to rename or drop need not be named.
        """
        if not named:
            return ()
        present = {composed(name) for name in there}
        expected = [name for name in named if composed(name) in present or composed(name) not in self.new_names]
        known = {composed(name) for name in expected}
        return (*expected, *(name for name in there if composed(name) in self.old_names - known))


class Relabelled(NamedTuple):
    """Rows with the dataset's classes, and a sentence for the user about each change."""

    rows: list[Row]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def relabelled(rows: Sequence[Row], classes: Sequence[str], config: DataConfig, source: str) -> Relabelled:
    """Rows whose labels are indices of `classes`, after `data.drop_classes` and `data.class_map`.

    Raises ValueError if one of these names a class that the source does not have, or if no image is left.
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
        raise ValueError(f"--data.drop-classes drops all images of {source}; name fewer classes")
    return Relabelled(kept, remaining, edit_notes(edits, counts, several=several))


def require_named(classes: Sequence[str], edits: ClassEdits) -> None:
    """ValueError if renaming gives a class that the dataset does not have."""
    if missing := sorted(edits.new_names - set(map(composed, classes))):
        raise ValueError(
            f"--data.class-map renames a class to {missing[0]!r}, but the classes are {listed(classes)}; add it to "
            "--data.classes or correct the name"
        )


def edit_notes(edits: ClassEdits, counts: Counter[str], *, several: bool) -> tuple[str, ...]:
    """Notes on dropped and renamed classes, with the number of images; `counts` are by the source's names."""
    notes = []
    if edits.dropped:
        dropped = ", ".join(f"{name or 'without a label'} ({counts[name]:,})" for name in sorted(edits.dropped))
        what = "removed the label, kept the images" if several else "dropped the images of these classes"
        notes.append(f"--data.drop-classes: {what}: {dropped}")
    renamed = [name for name in sorted(edits.old_names - edits.dropped) if edits.new_name(name) != name]
    if renamed:
        pairs = ", ".join(
            f"{name or 'without a label'} ({counts[name]:,}) -> {edits.new_name(name)}" for name in renamed
        )
        notes.append(f"--data.class-map: renamed {pairs}")
    return tuple(notes)


def grouped_by_path(rows: Sequence[Row], config: DataConfig) -> list[Row]:
    """The rows, with the group that `data.group_pattern` finds in each path; unchanged without a pattern.

    Raises ValueError if a path does not match or its group is empty.
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
            f"--data.group-pattern '{config.group_pattern}' finds no group in the paths of {len(unmatched):,} of "
            f"{len(rows):,} images ({examples}), but every image needs one; widen the pattern or remove these images"
        )
    return [dataclasses.replace(row, group=composed(str(group))) for row, group in zip(rows, groups, strict=True)]


def check_settings(config: DataConfig) -> None:
    """ValueError if a setting does not apply to the layout or task of a resolved configuration."""
    unused = {
        "group_pattern": config.layout in ("npz", "phantoms") and "images in files (folders or table)",
        "drop_classes": config.layout == "phantoms" and "image sets of your own",
        "class_map": config.layout == "phantoms" and "image sets of your own",
        "no_finding": (config.layout != "table" or config.task != "multilabel") and "multilabel tables",
        "metadata_columns": config.layout != "table" and "a set with a table",
        "split_values": config.layout != "folders"
        and any(pair.rpartition("=")[2] == "drop" for pair in config.split_values)
        and "split folders (=drop excludes one)",
        "label_separator": (config.layout != "table" or config.task != "multilabel") and "multilabel tables",
    }
    for name, needed in unused.items():
        value = getattr(config, name)
        if needed and value != type(config).model_fields[name].default:
            remedy = "set --data.task multilabel or remove the option" if "tables" in needed else "remove the option"
            raise ValueError(
                f"--data.{name.replace('_', '-')} {value if isinstance(value, str) else ' '.join(value)!r} is for "
                f"{needed}, but the layout is {config.layout} and the task is {config.task}; {remedy}"
            )


def composed(name: str) -> str:
    """The name in Unicode's form NFC, in which letters and their accents are one character."""
    return unicodedata.normalize("NFC", name)
