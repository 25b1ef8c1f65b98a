"""Rows of an image set with one folder per class."""

from __future__ import annotations

from collections.abc import Sequence

from data_shards.config import DataConfig
from data_shards.file_set import FileSet
from data_shards.files import Files, open_files
from data_shards.labels import ClassEdits, grouped_by_path, relabelled
from data_shards.source import Row
from data_shards.split import SPLIT_WORDS


def open_folders(config: DataConfig) -> FileSet:
    """A set with one folder per class. Files beside the class folders are none of its images."""
    files, source = open_files(config.source), config.source
    root = _class_root(files, config.classes)
    found = _folders_in(files, root)
    if not found:
        raise ValueError(
            f"{source} has no folders: layout `folders` wants one folder per class, with its images inside"
        )
    if set(found) <= set(SPLIT_WORDS):
        raise ValueError(
            f"{source} has the folders {', '.join(found)}, which look like splits, not classes: list the images in a "
            "CSV with a split column (--data.layout csv)"
        )
    classes = ClassEdits(config).names_in_source(config.classes, found) or tuple(found)
    extra = sorted(set(found) - set(classes))
    if extra:
        raise ValueError(
            f"folder {extra[0]!r} of {source} is none of the classes {', '.join(classes)}: move it away, or add it to "
            "--data.classes"
        )
    rows = []
    for index, name in enumerate(classes):
        members = [file[len(root) :] for file in files.names if file.startswith(f"{root}{name}/")]
        if not members:
            what = "is empty" if name in found else f"is missing (there are {', '.join(found)})"
            raise ValueError(f"class folder {name!r} of {source} {what}: put its images there, or mend --data.classes")
        rows += [Row(where, 0, (index,), None, None) for where in members]
    made = relabelled(rows, classes, config, source)
    return FileSet(files, root, grouped_by_path(made.rows, config), config, classes=made.classes, notes=made.notes)


def _folders_in(files: Files, root: str) -> list[str]:
    return [f[len(root) :] for f in files.folders if f.startswith(root) and "/" not in f[len(root) :]]


def _class_root(files: Files, classes: Sequence[str]) -> str:
    """Where the class folders lie, "" or ending in "/": archives often wrap everything into one folder."""
    root = ""
    while True:
        inside = _folders_in(files, root)
        if len(inside) != 1 or inside[0] in classes or not _folders_in(files, f"{root}{inside[0]}/"):
            return root
        root += f"{inside[0]}/"
