"""An image set whose images are files: pictures as they are, and the frames of DICOM files."""

from __future__ import annotations

import functools
import io
import posixpath
from typing import BinaryIO

import numpy as np

from data_shards.config import DataConfig
from data_shards.decode import UndecodableImage, dicom
from data_shards.source.dicom_rows import with_frames
from data_shards.source.files.files import Files
from data_shards.source.row import Row

# What one read fetches at least, from a DICOM file or one whose name does not say what it is: at planning most headers
# lie in the first, at conversion most slices in one. Files that are named as pictures are read whole.
_HEADER_BYTES, _FILE_BYTES = 64 << 10, 1 << 20


class FileSet:
    """Images that are files below `root` of `files`; a row's `where` is relative to it, in a tar as in a folder."""

    def __init__(
        self,
        files: Files,
        root: str,
        rows: list[Row],
        config: DataConfig,
        *,
        classes: tuple[str, ...],
        notes: tuple[str, ...] = (),
        splits_from: str = "",
    ):
        self._files, self._root, self._rows, self._config = files, root, rows, config
        self.classes, self.task, self.notes = classes, str(config.task), (*notes, *files.notes)
        self.splits_from = splits_from

    @functools.cached_property
    def rows(self) -> list[Row]:
        """The images. Those of DICOM files are counted when they are first asked for: a shard's writer never does."""
        return with_frames(self._rows, functools.partial(self._open, _HEADER_BYTES), self._config)

    def read(self, row: Row) -> bytes | np.ndarray:
        """The file's bytes, as they are, or the pixels of a DICOM file's frame.

        UndecodableImage where the file is there but cannot be read, or is a DICOM file that cannot be displayed.
        """
        try:
            with self._open(_FILE_BYTES, row.where) as file:
                if not dicom.is_dicom(file):
                    return file.read()
                return dicom.frame(file, row.frame, self._config.dicom, alone=dicom.named_as_image(row.where))
        except OSError as error:  # a link to nowhere, no right to read it, a bad block
            raise UndecodableImage(f"cannot be read: {error.strerror or type(error).__name__}") from error

    def inside(self, row: Row) -> str:
        """See ImageSet."""
        return self._name(row.where)

    def stamp(self, row: Row) -> str:
        """See ImageSet. With the file's name, as the same `where` is another file below another root."""
        name = self._name(row.where)
        stamp = self._files.stamp(name)
        return f"{name}|{stamp}" if stamp else ""

    def _name(self, where: str) -> str:
        return posixpath.normpath(posixpath.join(self._root, where))

    def _open(self, buffer_bytes: int, where: str) -> BinaryIO:
        name = self._name(where)
        if dicom.named_as_image(where):  # in one request
            return io.BytesIO(self._files.read(name))
        return self._files.open(name, buffer_bytes=buffer_bytes)
