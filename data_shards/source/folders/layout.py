"""Which folders of an image set are its classes, and which are splits around them or inside of them.

A set is read as classes/images, splits/classes/images or classes/splits/images, below any number of folders that wrap
all of it. Names say what a split is (`split.split_word`), or the configuration does. Where names say nothing and
several folders hold equal ones, either could be the classes: that is refused until the classes are named.
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
    """A folder whose images are of one class, and of one split where folders say so. `path` is inside the source."""

    path: str
    name: str
    split: str | None = None
    split_folder: str = ""
    """The folder that says so, as it is called."""


@dataclass(frozen=True)
class FolderLayout:
    """The class folders of a set, below `root` ("" or a path in the source), and what its owner should know."""

    root: str
    folders: tuple[ClassFolder, ...]
    splits_from: str = ""
    """Where the splits come from, in a clause; "" where nothing but the seed has a say."""
    notes: tuple[str, ...] = ()


@dataclass
class _Reader:
    """What all decisions need: the tree, the configuration, and what the folders at the top are."""

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
        """Whether the configuration names it as a class."""
        return class_name(name) in self._named or ClassEdits(self.config).new_name(class_name(name)) in self._named

    def inside(self, folder: str) -> list[str]:
        return self.tree.inside(folder, named=self.config.classes)

    def below(self, top: str) -> list[str]:
        return self.inside(joined(self.root, top))


def read_layout(tree: FolderTree, config: DataConfig) -> FolderLayout:
    """The class folders of the set. ValueError, with a remedy, where there are none or they could be read in two ways.

    That the classes are the same in all splits is not looked at here.
    """
    reader = _Reader(tree, config)
    _descend(reader)
    if not reader.tops:
        raise ValueError(
            f"{config.source} has no folders: layout `folders` wants one folder per class, with its images inside"
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
                f"{reader.source} has {len(reader.tops)} folders ({listed(reader.tops)}), and inside of them again and "
                f"again {listed(inner)}, as where each patient has a folder with class folders inside: {_TABLE} and a "
                f"group column, or name the classes if they are the outer folders: --data.classes {typed(reader.tops)}"
            )
    return _classes(reader)


def _descend(reader: _Reader) -> None:
    """Finds the root: archives often wrap everything into one folder."""
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
                f"split_values has {pair!r}, but {reader.source} has no such folder around its class folders (there "
                f"are {listed(reader.tops)}): write FOLDER=train, val, test or drop"
            )


def _note_documents(reader: _Reader, folder: str) -> None:
    names = [name for name in reader.tree.documents_in(folder) if not reader.names_class(name)]
    reader.documents += [joined(folder, name) for name in names]


def _leave_out_empty(reader: _Reader) -> None:
    """An empty folder beside splits that is not called one has nothing to say."""
    paths = {top: joined(reader.root, top) for top in reader.tops}
    empty = [top for top, path in paths.items() if not reader.tree.below(path) and not meaning(top, reader.config)]
    reader.documents += [paths[top] for top in empty]
    reader.tops = [top for top in reader.tops if top not in empty]


def _class_roots(reader: _Reader) -> dict[str, str]:
    """Where the class folders of each folder at the top are: some sets have train/train/... beside test/test/..."""
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


# ------------------------------------------------------------------------------------- what the folders at the top are


def _are_splits(reader: _Reader, roots: Mapping[str, str]) -> bool:
    """Whether the folders at the top are splits. ValueError where they look like splits, but hold no classes."""
    if any(reader.names_class(name) for root in roots.values() for name in reader.inside(root)):
        return True
    if any(said(top, reader.config) for top in reader.tops):
        return True
    words = {top: split_word(top)[0] for top in reader.tops}
    named = [top for top in reader.tops if words[top]]
    if len({words[top] for top in named}) < 2:
        _refuse_lone_split(reader, named)
        return False
    if named != reader.tops and "train" not in words.values():  # classes such as `valid` and `test tube` among others
        return False
    if not any(reader.inside(roots[top]) for top in named):
        raise ValueError(
            f"{reader.source} has the folders {listed(reader.tops)}, which look like splits, not classes, and have no "
            f"class folders inside: put each image into a folder of its class, or {_TABLE}; if they are classes, name "
            f"them with --data.classes {typed(reader.tops)}"
        )
    return True


def _refuse_lone_split(reader: _Reader, named: Sequence[str]) -> None:
    """ValueError where `train` holds folders and nothing beside it is called a split: they cannot all be classes."""
    plain = [top for top in named if SPLIT_WORDS.get(loose(top)) == "train" and len(reader.below(top)) > 1]
    others = [top for top in reader.tops if top not in named]
    if plain and others and not reader.config.classes:
        raise ValueError(
            f"{reader.source} has the folder {plain[0]!r}, which looks like a split with the classes "
            f"{listed(reader.below(plain[0]))}, beside {listed(others)}: leave out what is not a split with "
            f"--data.split-values {typed(f'{other}=drop' for other in others)} (=val and =test keep it), or name the "
            f"classes: --data.classes {typed(reader.tops)}"
        )


def _splits_are_inside(reader: _Reader) -> bool:
    """Whether the folders at the top are classes with a folder for each split. ValueError where only some have them."""
    if reader.config.split_folders == "ignore":
        return False
    inside = {top: reader.below(top) for top in reader.tops}
    meanings = {top: [meaning(name, reader.config) for name in names] for top, names in inside.items()}
    whole = [top for top in reader.tops if len(set(meanings[top])) > 1 and all(meanings[top])]
    torn = [top for top in reader.tops if top not in whole or reader.tree.num_images_in(joined(reader.root, top))]
    if whole and torn:
        raise ValueError(
            f"folder {whole[0]!r} of {reader.source} holds the splits {listed(inside[whole[0]])}, but not all images "
            f"of {torn[0]!r} are in such folders: move them there, or have all splits drawn with --data.split-folders "
            "ignore"
        )
    return bool(whole)


def _shared(reader: _Reader, folders: Sequence[str]) -> list[str]:
    """Names of the folders inside, where all of `folders` hold mostly the same ones, at least two; else none.

    Where one of them is called a split, two that are the same will do.
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
    """Names of a few folders that come again and again inside of many, some of which lack one; else none."""
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
    """Names that the split folders of one class share: patients would not be in two splits, classes are."""
    for top in reader.tops:
        if shared := _shared(reader, [part for part in parts if part.startswith(f"{joined(reader.root, top)}/")]):
            return shared
    return []


def _either(reader: _Reader, inner: Sequence[str]) -> str:
    outer = reader.tops
    return (
        f"{reader.source} has the folders {listed(outer)}, each with the folders {listed(inner)} inside, and either "
        f"could be the classes: name them with --data.classes {typed(outer)} (what is inside belongs to its class) or "
        f"--data.classes {typed(inner)} (the outer folders are then splits: {say_which(outer)})"
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
            f"inside: if the inner ones are the classes, read one of the outer ones (--data.source {typed([one])}) or "
            f"{_TABLE}; if the outer ones are, name them: --data.classes {typed(reader.tops)}"
        )
    beside = [reader.below(top) for top in reader.tops]
    splits = split_of_each(sorted({name for _, name in places}), reader.config, beside=beside)
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
            f"the splits of {reader.source} hold the folders {listed(names)}, each with the folders {listed(shared)} "
            f"inside, and either could be the classes: name the first with --data.classes {typed(names)}; if the "
            f"second are, {_TABLE}"
        )
    lone = len({splits[top] for top in tops}) == 1
    folders = [
        ClassFolder(joined(roots[top], name), class_name(name), None if ignored or lone else splits[top], top)
        for top in tops
        for name in reader.inside(roots[top])
    ]
    strays = [(top, num) for top in tops if (num := reader.tree.num_strays_in(joined(reader.root, top)))]
    notes = tuple(f"left out, as they are in no class folder of {top}: {_files(num)}" for top, num in strays)
    if ignored:
        clause = f"drawn from all images; the split folders {listed(tops)} are ignored"
    elif lone:
        clause = f"all drawn from {listed(tops)}, as there is no other split"
    else:
        clause = origin({top: splits[top] for top in tops})
    return FolderLayout(reader.root, tuple(folders), clause, notes)


def _check_split_folder(reader: _Reader, top: str, root: str) -> None:
    """ValueError where a split folder has no class folders, or nothing in them."""
    if reader.inside(root) and reader.tree.has_images(root):
        return
    what = "has images, but no class folders" if reader.tree.has_images(root) else "holds no images"
    raise ValueError(
        f"split folder {top!r} of {reader.source} {what}: put each of its images into a folder of its class, or leave "
        f"the folder out with --data.split-values {typed([f'{top}=drop'])}"
    )


# ----------------------------------------------------------------------------------------------------------- sentences


def _left_out(reader: _Reader) -> list[str]:
    """What of the set is not read, a sentence each."""
    notes = []
    if reader.left_out:
        notes.append(f"folders left out, as --data.split-values says: {listed(reader.left_out)}")
    if reader.documents:
        notes.append(f"folders left out, as they hold no images: {listed(reader.documents)}")
    if num := reader.tree.num_strays_in(reader.root):
        notes.append(f"left out, as they are beside the class folders: {_files(num)}")
    return notes


def _files(num: int) -> str:
    return f"{num} files" if num > 1 else "1 file"
