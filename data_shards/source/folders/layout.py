"""Finds which folders of an image set are classes, and which are splits around or inside them.

A set is read as classes/images, splits/classes/images or classes/splits/images, inside any number of wrapping folders.
Splits are recognized by name (`split.split_word`) or set by the configuration. If names do not decide and several
folders have equal subfolders, either level could be the classes: this is refused until the classes are named.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data_shards.config import DataConfig
from data_shards.source.folders.splits import DROP, listed, meaning, origin, said, say_which, split_of_each, typed
from data_shards.source.folders.tree import FolderTree, class_name, joined, loose
from data_shards.source.labels import ClassEdits
from data_shards.split import SPLIT_WORDS, SPLITS, split_word

_TABLE = "list the images in a table with a split column (--data.layout table)"


@dataclass(frozen=True)
class ClassFolder:
    """A folder with images of one class and, if split folders exist, one split. `path` is inside the source."""

    path: str
    name: str
    split: str | None = None
    split_folder: str = ""
    """Name of the folder that gives the split."""


@dataclass(frozen=True)
class FolderLayout:
    """The class folders of a set, below `root` ("" or a path in the source), and notes for the user."""

    root: str
    folders: tuple[ClassFolder, ...]
    splits_from: str = ""
    """Origin of the splits, as a clause; "" if only the seed decides."""
    notes: tuple[str, ...] = ()


@dataclass
class _Reader:
    """State shared by all decisions: the tree, the configuration and the top folders."""

    tree: FolderTree
    config: DataConfig
    root: str = ""
    tops: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        return self.config.source

    @functools.cached_property
    def _named(self) -> set[str]:
        return {class_name(each) for each in self.config.classes}

    def names_class(self, name: str) -> bool:
        """Whether the configuration lists it as a class."""
        return class_name(name) in self._named or ClassEdits(self.config).new_name(class_name(name)) in self._named

    def inside(self, folder: str) -> list[str]:
        return self.tree.inside(folder, named=self.config.classes)

    def below(self, top: str) -> list[str]:
        return self.inside(joined(self.root, top))


def read_layout(tree: FolderTree, config: DataConfig) -> FolderLayout:
    """The class folders of the set. ValueError, with a remedy, if there are none or they are ambiguous.

    Does not check that all splits have the same classes.
    """
    reader = _Reader(tree, config)
    _descend(reader)
    if not reader.tops:
        raise ValueError(
            f"{config.source} has no folders; layout `folders` needs one folder per class, with its images inside"
        )
    layout = _read(reader)
    return FolderLayout(layout.root, layout.folders, layout.splits_from, (*_left_out(reader), *layout.notes))


def _read(reader: _Reader) -> FolderLayout:
    if any(reader.names_class(top) for top in reader.tops):
        return _classes_of_splits(reader) if _splits_are_inside(reader) else _classes(reader)
    roots = _class_roots(reader)
    if _are_splits(reader, roots):
        _leave_out_empty(reader)
        return _splits(reader, roots)
    if _splits_are_inside(reader):
        return _classes_of_splits(reader)
    if not reader.config.classes:
        if shared := _shared(reader, list(roots.values())):
            raise ValueError(_either(reader, shared))
        if inner := _recurring(reader, roots):
            raise ValueError(
                f"{reader.source} has {len(reader.tops)} folders ({listed(reader.tops)}) that contain {listed(inner)} "
                f"repeatedly, like patient folders with class folders inside; {_TABLE} and a group column, or, if the "
                f"outer folders are the classes, name them: --data.classes {typed(reader.tops)}"
            )
    return _classes(reader)


def _descend(reader: _Reader) -> None:
    """Finds the root: archives often wrap everything in one folder."""
    found: set[str] = set()
    while True:
        inside = reader.inside(reader.root)
        found |= {loose(name) for name in inside}
        reader.left_out += [
            joined(reader.root, name)
            for name in inside
            if said(name, reader.config) == DROP and not reader.names_class(name)
        ]
        reader.tops = [name for name in inside if joined(reader.root, name) not in reader.left_out]
        _note_documents(reader, reader.root)
        if len(reader.tops) != 1 or reader.names_class(reader.tops[0]) or not reader.below(reader.tops[0]):
            break
        reader.root = joined(reader.root, reader.tops[0])
    found |= {loose(name) for top in reader.tops for name in reader.below(top)}  # class/split/image
    found |= {loose(path.rpartition("/")[2]) for path in reader.documents}
    for pair in reader.config.split_values:
        if loose(pair.rpartition("=")[0]) not in found:
            raise ValueError(
                f"split_values has {pair!r}, but {reader.source} has no such folder around its class folders (it has "
                f"{listed(reader.tops)}); write FOLDER=train, val, test or drop"
            )


def _note_documents(reader: _Reader, folder: str) -> None:
    names = [name for name in reader.tree.documents_in(folder) if not reader.names_class(name)]
    reader.documents += [joined(folder, name) for name in names]


def _leave_out_empty(reader: _Reader) -> None:
    """Ignores empty folders next to splits, unless they are named like a split."""
    paths = {top: joined(reader.root, top) for top in reader.tops}
    empty = [top for top, path in paths.items() if not reader.tree.below(path) and not meaning(top, reader.config)]
    reader.documents += [paths[top] for top in empty]
    reader.tops = [top for top in reader.tops if top not in empty]


def _class_roots(reader: _Reader) -> dict[str, str]:
    """The path of each top folder's class folders: some sets have train/train/... and test/test/..."""
    roots = {top: joined(reader.root, top) for top in reader.tops}
    while True:
        inside = {top: reader.inside(root) for top, root in roots.items()}
        several = {loose(name) for names in inside.values() if len(names) > 1 for name in names}
        deeper = {
            top: inner
            for top, names in inside.items()
            if len(names) == 1 and loose(names[0]) not in several and not reader.names_class(names[0])
            if reader.inside(inner := joined(roots[top], names[0]))
        }
        if not deeper:
            return roots
        roots |= deeper


# ----------------------------------------------------------------------------------------- the kind of the top folders


def _are_splits(reader: _Reader, roots: Mapping[str, str]) -> bool:
    """Whether the top folders are splits. ValueError if they look like splits but have no class folders."""
    if any(reader.names_class(name) for root in roots.values() for name in reader.inside(root)):
        return True
    if any(said(top, reader.config) for top in reader.tops):
        return True
    words = {top: split_word(top)[0] for top in reader.tops}
    named = [top for top in reader.tops if words[top]]
    if len({words[top] for top in named}) < 2:
        _refuse_lone_split(reader, named)
        return False
    if named != reader.tops and "train" not in words.values():  # classes such as `valid` and `test tube`
        return False
    if not any(reader.inside(roots[top]) for top in named):
        raise ValueError(
            f"{reader.source} has the folders {listed(reader.tops)}, which look like splits, but have no class folders "
            f"inside; put each image into a folder of its class, or {_TABLE}; if they are classes, name them with "
            f"--data.classes {typed(reader.tops)}"
        )
    return True


def _refuse_lone_split(reader: _Reader, named: Sequence[str]) -> None:
    """ValueError if `train` has subfolders but no sibling is named like a split: they cannot all be classes."""
    plain = [top for top in named if SPLIT_WORDS.get(loose(top)) == "train" and len(reader.below(top)) > 1]
    others = [top for top in reader.tops if top not in named]
    if plain and others and not reader.config.classes:
        raise ValueError(
            f"{reader.source} has the folder {plain[0]!r}, which looks like a split with the classes "
            f"{listed(reader.below(plain[0]))}, next to {listed(others)}; exclude folders that are not splits with "
            f"--data.split-values {typed(f'{other}=drop' for other in others)} (=val and =test keep them), or name the "
            f"classes: --data.classes {typed(reader.tops)}"
        )


def _splits_are_inside(reader: _Reader) -> bool:
    """Whether the top folders are classes with a folder for each split. ValueError if only some have them."""
    if reader.config.split_folders == "ignore":
        return False
    inside = {top: reader.below(top) for top in reader.tops}
    meanings = {top: [meaning(name, reader.config) for name in names] for top, names in inside.items()}
    divided = [top for top in reader.tops if len(set(meanings[top])) > 1 and all(meanings[top])]
    other = [top for top in reader.tops if top not in divided or reader.tree.num_images_in(joined(reader.root, top))]
    if divided and other:
        raise ValueError(
            f"folder {divided[0]!r} of {reader.source} has the splits {listed(inside[divided[0]])}, but not all images "
            f"of {other[0]!r} are in such folders; move them there, or have all splits drawn with --data.split-folders "
            "ignore"
        )
    return bool(divided)


def _shared(reader: _Reader, folders: Sequence[str]) -> list[str]:
    """Names of the subfolders if all of `folders` have mostly the same ones, at least two; else none.

    If a top folder is named like a split, two equal names are enough.
    """
    inside = [
        {loose(name): name for name in reader.inside(folder) if reader.tree.has_images(joined(folder, name))}
        for folder in folders
    ]
    if len(inside) < 2:
        return []
    everywhere = set.intersection(*(set(names) for names in inside))
    anywhere = {key: name for names in inside for key, name in names.items()}
    mostly = 2 * len(everywhere) >= len(anywhere) or any(split_word(top)[0] for top in reader.tops)
    if len(everywhere) < 2 or not mostly or all(split_word(name)[0] for name in everywhere):
        return []
    return [anywhere[key] for key in sorted(anywhere)]


def _recurring(reader: _Reader, roots: Mapping[str, str]) -> list[str]:
    """Names of a few subfolders that recur in many folders, not all of which have all of them; else none."""
    inside = [
        {loose(name): name for name in reader.inside(root) if reader.tree.has_images(joined(root, name))}
        for root in roots.values()
    ]
    counts = Counter(key for names in inside for key in names)
    few = len(inside) > 2 * len(counts) > 2 and all(count > 1 for count in counts.values())
    if not few or not all(inside) or any(reader.tree.num_images_in(root) for root in roots.values()):
        return []
    return sorted({name for names in inside for name in names.values()})


def _shared_by_splits(reader: _Reader, parts: Sequence[str]) -> list[str]:
    """Subfolder names shared by the split folders of one class: classes recur across splits, patients do not."""
    for top in reader.tops:
        if shared := _shared(reader, [part for part in parts if part.startswith(f"{joined(reader.root, top)}/")]):
            return shared
    return []


def _either(reader: _Reader, inner: Sequence[str]) -> str:
    outer = reader.tops
    return (
        f"{reader.source} has the folders {listed(outer)}, each with the folders {listed(inner)} inside, and either "
        f"could be the classes; name them with --data.classes {typed(outer)} (inner folders are merged) or "
        f"--data.classes {typed(inner)} (outer folders are splits: {say_which(outer)})"
    )


# ----------------------------------------------------------------------------------------------- the three ways to read


def _classes(reader: _Reader) -> FolderLayout:
    """Classes/images."""
    folders = tuple(ClassFolder(joined(reader.root, name), class_name(name)) for name in reader.tops)
    wrapping = [part for part in reader.root.split("/") if split_word(part)[0] and not split_word(part)[1]]
    lone = f"all drawn from the folder {wrapping[-1]}, as there is no other split" if wrapping else ""
    return FolderLayout(reader.root, folders, lone)


def _classes_of_splits(reader: _Reader) -> FolderLayout:
    """Classes/splits/images."""
    places = [(top, name) for top in reader.tops for name in reader.below(top)]
    for top in reader.tops:
        _note_documents(reader, joined(reader.root, top))
    parts = [joined(joined(reader.root, top), name) for top, name in places]
    if not any(reader.names_class(top) for top in reader.tops) and (shared := _shared_by_splits(reader, parts)):
        one = f"{reader.source}/{joined(reader.root, reader.tops[0])}"
        raise ValueError(
            f"{reader.source} has the folders {listed(reader.tops)} around splits, and the folders {listed(shared)} "
            f"inside; if the inner ones are the classes, read one of the outer ones (--data.source {typed([one])}) or "
            f"{_TABLE}; if the outer ones are, name them: --data.classes {typed(reader.tops)}"
        )
    siblings = [reader.below(top) for top in reader.tops]
    splits = split_of_each(sorted({name for _, name in places}), reader.config, siblings=siblings)
    folders = [
        ClassFolder(part, class_name(top), splits[name], name)
        for (top, name), part in zip(places, parts, strict=True)
        if splits[name] != DROP
    ]
    return FolderLayout(reader.root, tuple(folders), origin(splits, where=" inside each class"))


def _splits(reader: _Reader, roots: Mapping[str, str]) -> FolderLayout:
    """Splits/classes/images."""
    ignored = reader.config.split_folders == "ignore"
    splits = split_of_each(reader.tops, reader.config)
    tops = [top for split in (*SPLITS, "") for top in reader.tops if splits.get(top) == split]
    for top in tops:
        _check_split_folder(reader, top, roots[top])
        _note_documents(reader, roots[top])
    inner = [joined(roots[top], name) for top in tops for name in reader.inside(roots[top])]
    if not reader.config.classes and (shared := _shared(reader, inner)):
        names = sorted({path.rpartition("/")[2] for path in inner})
        raise ValueError(
            f"the splits of {reader.source} have the folders {listed(names)}, each with the folders {listed(shared)} "
            f"inside, and either could be the classes; if the outer ones are, name them with --data.classes "
            f"{typed(names)}; if the inner ones are, {_TABLE}"
        )
    lone = len({splits[top] for top in tops}) == 1
    folders = [
        ClassFolder(joined(roots[top], name), class_name(name), None if ignored or lone else splits[top], top)
        for top in tops
        for name in reader.inside(roots[top])
    ]
    strays = [(top, num) for top in tops if (num := reader.tree.num_strays_in(joined(reader.root, top)))]
    notes = tuple(f"ignored {_files(num)} of {top} outside its class folders" for top, num in strays)
    if ignored:
        clause = f"drawn from all images; the split folders {listed(tops)} are ignored"
    elif lone:
        clause = f"all drawn from {listed(tops)}, as there is no other split"
    else:
        clause = origin({top: splits[top] for top in tops})
    return FolderLayout(reader.root, tuple(folders), clause, notes)


def _check_split_folder(reader: _Reader, top: str, root: str) -> None:
    """ValueError if a split folder has no class folders, or no images in them."""
    if reader.inside(root) and reader.tree.has_images(root):
        return
    what = "has images, but no class folders" if reader.tree.has_images(root) else "has no images"
    raise ValueError(
        f"split folder {top!r} of {reader.source} {what}; put each of its images into a folder of its class, or "
        f"exclude the folder with --data.split-values {typed([f'{top}=drop'])}"
    )


# ----------------------------------------------------------------------------------------------------------- sentences


def _left_out(reader: _Reader) -> list[str]:
    """Notes about files and folders of the set that are not read."""
    notes = []
    if reader.left_out:
        notes.append(f"ignored folders excluded by --data.split-values: {listed(reader.left_out)}")
    if reader.documents:
        notes.append(f"ignored folders without images: {listed(reader.documents)}")
    if num := reader.tree.num_strays_in(reader.root):
        notes.append(f"ignored {_files(num)} outside the class folders")
    return notes


def _files(num: int) -> str:
    return f"{num} files" if num > 1 else "1 file"
