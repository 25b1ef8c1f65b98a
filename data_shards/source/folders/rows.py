"""Rows of an image set with one folder per class, possibly inside or around split folders."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections import defaultdict
from collections.abc import Sequence

from data_shards.config import DataConfig
from data_shards.decode.dicom import named_as_image
from data_shards.source.file_set import FileList
from data_shards.source.files.files import Files
from data_shards.source.files.links import broken_links
from data_shards.source.files.nested import NestedFiles
from data_shards.source.files.open import open_files
from data_shards.source.folders.layout import ClassFolder, read_layout
from data_shards.source.folders.tree import FolderTree, class_name
from data_shards.source.labels import ClassEdits, grouped_by_path, relabelled
from data_shards.source.lookalikes import described, folded, plainness, trimmed
from data_shards.source.row import Row
from data_shards.split import SPLITS, split_word


def list_folders(config: DataConfig) -> FileList:
    """A set with one folder per class, or one per class and split (see `layout.read_layout`).

    Files outside the class folders are ignored. ValueError if the folders are ambiguous, a class is missing, empty or
    not listed, or the splits have different classes.
    """
    files = open_files(config.source)
    tree = FolderTree(files)
    try:
        return _read(files, tree, config)
    except ValueError as error:
        broken = {name: why for name, why in tree.broken.items() if not named_as_image(name)}
        if not broken:
            raise
        raise ValueError(f"{error}; {''.join(broken_links(broken))}; each may be such a folder") from None


def _read(files: Files, tree: FolderTree, config: DataConfig) -> FileList:
    layout = read_layout(tree, config)
    if isinstance(files, NestedFiles) and not layout.splits_from:
        _check_zips(files.zips, config)
    classes = _classes(layout.folders, config)
    _check_images(layout.folders, tree, config)
    _check_same_classes(layout.folders, config)
    start = len(layout.root) + 1 if layout.root else 0
    rows = []
    for index, name in enumerate(classes):
        members = [
            (SPLITS.index(folder.split) if folder.split else 0, path[start:], folder.split)
            for folder in layout.folders
            if folder.name == name
            for path in tree.below(folder.path)
        ]
        rows += [Row(where, 0, (index,), split, None) for _, where, split in sorted(members)]
    made = relabelled(rows, classes, config, config.source)
    broken = broken_links(tree.broken_next_to(folder.path for folder in layout.folders))
    notes = (*layout.notes, *broken, *_merged(layout.folders), *made.notes)
    root = f"{layout.root}/" if layout.root else ""
    grouped = grouped_by_path(made.rows, config)
    return FileList(files, root, grouped, made.classes, notes, layout.splits_from)


def _check_zips(zips: Sequence[str], config: DataConfig) -> None:
    """ValueError if zips are named after splits but directly contain class folders, so the splits would be lost."""
    words = {split_word(posixpath.splitext(posixpath.basename(name))[0])[0] for name in zips} - {""}
    if len(words) > 1 and config.split_folders == "keep":
        raise ValueError(
            f"{config.source} has {', '.join(zips)}, which look like splits, but their contents have no split folder; "
            "unpack each into a folder of its own name, or have the splits drawn from all images with "
            "--data.split-folders ignore"
        )


def _classes(folders: Sequence[ClassFolder], config: DataConfig) -> tuple[str, ...]:
    """The source's class names in index order. ValueError if they do not match the folders."""
    found = sorted({folder.name for folder in folders})
    for name in found:
        if not name.isprintable() and name.encode(errors="replace").decode() != name:
            raise ValueError(
                f"the class folder {name!a} of {config.source} has a name that is not UTF-8, as in archives from older "
                "Windows programs; rename it (convmv renames all files of a set)"
            )
    _check_alike(found, config)
    named = ClassEdits(config).names_in_source(config.classes, found)
    classes = tuple(class_name(name) for name in named) or tuple(found)
    if extra := sorted(set(found) - set(classes)):
        like = [name for name in classes if _look(name) == _look(extra[0])]
        renamed = f" (or, if it means {like[0]!r}, use {_class_map(extra[:1], like[0])})" if like else ""
        raise ValueError(
            f"folder {described(extra[0])} of {config.source} is not one of the classes {', '.join(classes)}; move it "
            f"away, or add it to --data.classes{renamed}"
        )
    if missing := [name for name in classes if name not in found]:
        raise ValueError(
            f"class folder {missing[0]!r} of {config.source} is missing (found {', '.join(found)}); create it with its "
            "images, or correct --data.classes"
        )
    return classes


def _check_alike(found: Sequence[str], config: DataConfig) -> None:
    """ValueError if two folders look like two spellings of one class, unless both are listed as classes."""
    ways: dict[str, list[str]] = defaultdict(list)
    for name in found:
        ways[_look(name)].append(name)
    named, edits = {class_name(name) for name in config.classes}, ClassEdits(config)
    for names in ways.values():
        become = {edits.new_name(name) for name in names} - {None}
        if len(become) > 1 and not set(names) <= named:
            kept = min(names, key=lambda name: (plainness(name), name.casefold() != name, name))
            pairs = _class_map([name for name in names if name != kept], kept)
            raise ValueError(
                f"the folders {', '.join(map(described, names))} of {config.source} differ only in case, spaces, "
                "underscores, dots, number format or letters that look alike; if they are one class, merge them with "
                f"{pairs} or rename them; if they are not, list all classes in --data.classes"
            )


def _look(name: str) -> str:
    """A key that is equal for folder names whose difference is invisible or probably unintended."""
    text = trimmed(folded(name.replace("_", " ")))
    number = re.fullmatch(r"0*(\d+)(?:[.,]0*)?", text)
    return number[1] if number else text


def _class_map(old: Sequence[str], new: str) -> str:
    return f"--data.class-map {' '.join(shlex.quote(f'{name}={new}') for name in old)}"


def _check_images(folders: Sequence[ClassFolder], tree: FolderTree, config: DataConfig) -> None:
    """ValueError if a class folder has no files, unless the class is dropped."""
    edits = ClassEdits(config)
    for folder in folders:
        if not tree.below(folder.path) and edits.new_name(folder.name) is not None:
            within = f" in {folder.split_folder}" if folder.split_folder else ""
            raise ValueError(
                f"class folder {folder.name!r}{within} of {config.source} is empty; add its images, remove it, or "
                "correct --data.classes"
            )


def _check_same_classes(folders: Sequence[ClassFolder], config: DataConfig) -> None:
    """ValueError if a class is in one split but not in another."""
    classes_of: dict[str, set[str]] = defaultdict(set)
    called: dict[str, str] = {}
    edits = ClassEdits(config)
    for folder in folders:
        if folder.split and (name := edits.new_name(folder.name)) is not None:
            classes_of[folder.split].add(name)
            called.setdefault(folder.split, folder.split_folder)
    for name in sorted(set().union(*classes_of.values())):
        there = next(split for split, names in classes_of.items() if name in names)
        for split, names in classes_of.items():
            if name not in names:
                others = sorted(names - classes_of[there])
                renamed = f"; if it is called {others[0]!r} there, use {_class_map(others[:1], name)}" if others else ""
                raise ValueError(
                    f"class {name!r} of {config.source} has a folder in {called[there]}, but none in {called[split]}, "
                    "and every split needs every class; add its images there, leave the class out with "
                    f"--data.drop-classes {shlex.quote(name)}, or have the splits drawn from all images with "
                    f"--data.split-folders ignore{renamed}"
                )


def _merged(folders: Sequence[ClassFolder]) -> list[str]:
    """A note for each class whose folder names differ in surrounding spaces or in the encoding of accents."""
    ways: dict[str, set[str]] = defaultdict(set)
    for folder in folders:
        ways[folder.name] |= {part for part in folder.path.split("/") if class_name(part) == folder.name}
    return [
        f"class {name!r} is read from the folders {' and '.join(map(ascii, sorted(parts)))}, which differ only in "
        "surrounding spaces or in the Unicode encoding of an accent"
        for name, parts in ways.items()
        if len(parts) > 1
    ]
