"""Everything that MLflow is told: runs, registered models, the moves of their aliases, and who may make them."""

from pipelines.tracking.client import (
    AwayError,
    PatienceError,
    Tracking,
    TrackingError,
    check_tracking,
    make_once,
    open_tracking,
    public_address,
)

__all__ = [
    "AwayError",
    "PatienceError",
    "Tracking",
    "TrackingError",
    "check_tracking",
    "make_once",
    "open_tracking",
    "public_address",
]
