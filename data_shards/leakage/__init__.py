"""Images that appear more than once, in one split or in several: found before anything is written, and reported."""

from data_shards.leakage.report import (
    LEAKS,
    Copy,
    DuplicatesError,
    Finding,
    LeakReport,
    lost_text,
    named_labels,
    read_report,
    refuse_elsewhere,
)

__all__ = [
    "LEAKS",
    "Copy",
    "DuplicatesError",
    "Finding",
    "LeakReport",
    "lost_text",
    "named_labels",
    "read_report",
    "refuse_elsewhere",
]
