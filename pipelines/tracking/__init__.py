"""MLflow: runs, registered models, promotions of their aliases, and the leases that protect them."""

from pipelines.tracking.connect import check_tracking, open_tracking
from pipelines.tracking.errors import AwayError, PatienceError, TrackingError, public_address
from pipelines.tracking.runs import Tracking, make_once

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
