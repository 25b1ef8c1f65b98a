"""An image set as rows: where an image is, its labels and, where known, its split and group; a file per layout."""

from data_shards.source.open import check_folders, check_source, open_source, resolved
from data_shards.source.row import ImageSet, Row

__all__ = ["ImageSet", "Row", "check_folders", "check_source", "open_source", "resolved"]
