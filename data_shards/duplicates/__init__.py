"""Duplicates in one split or in several: found before anything is written, and reported."""

from data_shards.duplicates.report import (
    REPORT,
    Copy,
    DuplicatesError,
    DuplicatesReport,
    Finding,
    lost_text,
    named_labels,
    read_report,
    refuse_elsewhere,
)

__all__ = [
    "REPORT",
    "Copy",
    "DuplicatesError",
    "DuplicatesReport",
    "Finding",
    "lost_text",
    "named_labels",
    "read_report",
    "refuse_elsewhere",
]
