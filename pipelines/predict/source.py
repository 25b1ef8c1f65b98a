"""Where images for prediction come from: files, frames of DICOM files, and samples of a dataset's split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_shards.config import DicomConfig
from data_shards.decode import UndecodableImage, dicom
from data_shards.index import SplitIndex
from data_shards.loader.local_shard import LocalShards
from data_shards.source.file_set import FileSetReader
from data_shards.source.files.files import FileReader
from data_shards.source.row import Row

# Nothing is stored, so pixels that may show who the patient is are classified like others.
_SHOWN = DicomConfig(identifying="keep")


class ImageSource(Protocol):
    """Reads images by `where`; usable by several threads at once."""

    def count_frames(self, where: Any) -> int:
        """Number of images at `where`, at least 1; found without decoding."""
        ...

    def read(self, where: Any, frame: int) -> bytes | np.ndarray:
        """The encoded image, or uint8 pixels. ValueError or OSError if it cannot be read."""
        ...


class Item(NamedTuple):
    """One file, or one sample of a split."""

    name: str
    source: ImageSource
    where: Any


class FileSource:
    """Files of one folder, archive or prefix. `where`: name and place, as `Files` has them."""

    def __init__(self, files: FileReader):
        self._reader = FileSetReader(files, "", _SHOWN)

    def count_frames(self, where: tuple[str, Any]) -> int:
        """See ImageSource. 1 for a file that cannot be read, which `read` reports."""
        if dicom.named_as_image(where[0]):
            return 1
        try:
            with self._reader.header(_row(where)) as file:
                facts = dicom.facts(file) if dicom.is_dicom(file) else None
        except OSError:
            return 1
        return 1 if facts is None or facts.not_image else max(1, facts.num_frames)

    def read(self, where: tuple[str, Any], frame: int) -> bytes | np.ndarray:
        """See ImageSource."""
        try:
            return self._reader.read(_row(where, frame))
        except UndecodableImage as error:
            # The options that a reason may name belong to conversions.
            raise UndecodableImage(error.reason.partition(" (--data.")[0]) from error


@dataclass(frozen=True)
class SplitSource:
    """The samples of a split, verified against the digests of their shards. `where`: position in the index."""

    shards: LocalShards
    index: SplitIndex

    def count_frames(self, where: int) -> int:
        """See ImageSource."""
        return 1

    def read(self, where: int, frame: int) -> bytes:
        """See ImageSource. ShardError if the shard is missing or damaged."""
        one = slice(where, where + 1)
        return self.shards.read_many(self.index.shard[one], self.index.offset[one], self.index.size[one])[0]


class Unreadable:
    """An input that cannot be opened. `where`: the reason."""

    def count_frames(self, where: str) -> int:
        """See ImageSource."""
        return 1

    def read(self, where: str, frame: int) -> bytes:
        """See ImageSource; always raises."""
        raise UndecodableImage(where)


def _row(where: tuple[str, Any], frame: int = 0) -> Row:
    return Row(where[0], frame, (), None, None, where[1])
