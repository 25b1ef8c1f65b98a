"""An image set whose images are files: encoded images, and frames of DICOM files."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np

from data_shards.config import DataConfig, DicomConfig
from data_shards.decode import UndecodableImage, dicom
from data_shards.source.dicom_rows import with_frames
from data_shards.source.files.files import FileReader, Files
from data_shards.source.row import ImageSet, Row

# Least bytes per read of a DICOM file, or one of unknown type: most headers fit into the first number, most slices into
# the second. Files named as images are read completely.
_HEADER_BYTES, _FILE_BYTES = 64 << 10, 1 << 20


@dataclass(frozen=True)
class FileSetReader:
    """Reads images that are files below `root`; a row's `where` is relative to it."""

    files: FileReader
    root: str
    dicom: DicomConfig

    def read(self, row: Row) -> bytes | np.ndarray:
        """The file's bytes unchanged, or the pixels of a DICOM frame.

        UndecodableImage if the file cannot be read, or is a DICOM file that cannot be displayed.
        """
        try:
            with self._open(row, _FILE_BYTES) as file:
                if not dicom.is_dicom(file):
                    return file.read()
                return dicom.frame(file, row.frame, self.dicom, alone=dicom.named_as_image(row.where))
        except OSError as error:  # a broken link, missing permission, a bad block
            raise UndecodableImage(f"cannot be read: {error.strerror or type(error).__name__}") from error

    def header(self, row: Row) -> BinaryIO:
        """The row's file, opened with a small buffer."""
        return self._open(row, _HEADER_BYTES)

    def inside(self, row: Row) -> str:
        """See Reader."""
        return posixpath.normpath(posixpath.join(self.root, row.where))

    def stamp(self, row: Row) -> str:
        """See Reader. Includes the file's name, because the same `where` is another file below another root."""
        name = self.inside(row)
        stamp = self.files.stamp(name, row.place)
        return f"{name}|{stamp}" if stamp else ""

    def _open(self, row: Row, buffer_bytes: int) -> BinaryIO:
        name = self.inside(row)
        if dicom.named_as_image(row.where):  # one request is enough
            return io.BytesIO(self.files.read(name, row.place))
        return self.files.open(name, row.place, buffer_bytes=buffer_bytes)


@dataclass(frozen=True)
class FileList:
    """The files of a set, with labels and splits from their names or a table; none has been opened."""

    files: Files
    root: str
    rows: list[Row]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    splits_from: str = ""

    def image_set(self, config: DataConfig) -> ImageSet:
        """The images; DICOM headers are read, and each frame becomes an image."""
        reader = FileSetReader(self.files.reader, self.root, config.dicom)
        rows = with_frames(list(self._placed(reader)), reader.header, config)
        notes = (*self.notes, *self.files.notes)
        return ImageSet(rows, self.classes, str(config.task), notes, reader, self.splits_from)

    def _placed(self, reader: FileSetReader) -> Iterator[Row]:
        for row in self.rows:
            place = self.files.place(reader.inside(row))
            yield row if place is None else replace(row, place=place)
