"""The folders of an image set as a tree: their contents, and which of them have images."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable

from data_shards.source.files.files import Files

# Files with these endings document a set; they are not images.
_DOCUMENTS = frozenset({
    ".bib", ".cfg", ".csv", ".doc", ".docx", ".htm", ".html", ".ini", ".ipynb", ".json", ".log", ".md", ".ods", ".pdf",
    ".ppt", ".pptx", ".py", ".rst", ".rtf", ".tex", ".tsv", ".txt", ".xls", ".xlsx", ".xml", ".yaml", ".yml",
})  # fmt: skip


def composed(name: str) -> str:
    """The name in Unicode's composed form (NFC): macOS writes accents decomposed, keyboards composed."""
    return unicodedata.normalize("NFC", name)


def class_name(folder: str) -> str:
    """The class name of a folder: its name in form NFC, without surrounding spaces."""
    return composed(folder).strip() or folder


def loose(name: str) -> str:
    """A key that is equal for names that differ only in case, encoding of accents, spaces or underscores."""
    return re.sub(r"[\s_]+", " ", composed(name)).strip().casefold()


class FolderTree:
    """Folders by path ("" is the source itself), without those that contain only documents."""

    def __init__(self, files: Files):
        self.files = sorted(files.names)
        self.broken = files.broken
        self._inside: dict[str, list[str]] = defaultdict(list)
        for folder in files.folders:
            parent, _, name = folder.rpartition("/")
            self._inside[parent].append(name)
        self._filled: set[str] = set()
        self._with_images: set[str] = set()
        self._images_in: dict[str, int] = defaultdict(int)
        for file in self.files:
            self._images_in[file.rpartition("/")[0]] += may_be_image(file)
        for folder, num_images in self._images_in.items():
            _mark(folder, self._filled)
            if num_images:
                _mark(folder, self._with_images)

    def inside(self, folder: str, *, named: Iterable[str] = ()) -> list[str]:
        """Names of the subfolders; those with only documents are omitted unless listed in `named`."""
        wanted = {class_name(name) for name in named}
        return [
            name
            for name in self._inside.get(folder, ())
            if not self.has_documents_only(joined(folder, name)) or class_name(name) in wanted
        ]

    def documents_in(self, folder: str) -> list[str]:
        """Names of the subfolders that have files but no images."""
        return [name for name in self._inside.get(folder, ()) if self.has_documents_only(joined(folder, name))]

    def has_documents_only(self, folder: str) -> bool:
        """Whether there are files below a folder, but none that could be an image."""
        return folder in self._filled and folder not in self._with_images

    def has_images(self, folder: str) -> bool:
        """Whether any file below the folder could be an image."""
        return folder in self._with_images

    def num_images_in(self, folder: str) -> int:
        """Number of files directly in the folder that could be images."""
        return self._images_in.get(folder, 0)

    def num_strays_in(self, folder: str) -> int:
        """Number of files directly in the folder that could be images, without broken links."""
        return self.num_images_in(folder) - sum(
            name.rpartition("/")[0] == folder and may_be_image(name) for name in self.broken
        )

    def broken_next_to(self, folders: Iterable[str]) -> dict[str, str]:
        """Broken links next to the folders or their parents, with the reason: each may be meant as a folder."""
        around = {""}
        for folder in folders:
            _mark(folder.rpartition("/")[0], around)
        return {name: why for name, why in self.broken.items() if name.rpartition("/")[0] in around}

    def below(self, folder: str) -> list[str]:
        """Paths of all files below a folder, sorted."""
        start = bisect_left(self.files, f"{folder}/")
        return self.files[start : bisect_left(self.files, f"{folder}0", lo=start)]  # "0" is what follows "/"


def joined(folder: str, name: str) -> str:
    """The path of a subfolder."""
    return f"{folder}/{name}" if folder else name


def may_be_image(file: str) -> bool:
    """Whether a file could be an image by its name: it does not end like a document."""
    return posixpath.splitext(file)[1].lower() not in _DOCUMENTS


def _mark(folder: str, marked: set[str]) -> None:
    """Adds a folder and its parents."""
    while folder not in marked:
        marked.add(folder)
        folder = folder.rpartition("/")[0]
