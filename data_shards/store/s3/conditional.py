"""Conditional writes (If-None-Match): which servers heed them, and what a server answers to one.

Whether a server heeds them is asked once per process and bucket. Some servers ignore them, some refuse them as
NotImplemented. radosgw 16 heeds them for whole objects, but not at the end of an upload in parts. A server that answers
ConditionalRequestConflict wants the object sent again.
"""

from __future__ import annotations

import logging

from data_shards.store.s3.errors import code_of

ONLY_IF_ABSENT = {"IfNoneMatch": "*"}
_log = logging.getLogger(__name__)
_heeds: dict[tuple[str, str], bool] = {}  # by endpoint and bucket


def heeds_conditions(endpoint: str, bucket: str) -> bool | None:
    """Whether the server heeds conditional writes to this bucket; None where that was not found out yet."""
    return _heeds.get((endpoint, bucket))


def learn_conditions(endpoint: str, bucket: str, heeds: bool, *, uri: str) -> None:
    """Remembers what was found out first, and warns the user once where it is not safe."""
    if _heeds.setdefault((endpoint, bucket), heeds) is heeds is False:
        _log.warning(
            "%s ignores conditional writes (If-None-Match), so a lease object must keep two drivers of one dataset, "
            "run or registered model apart, which is less safe: do not start two at once, or use a server with "
            "conditional writes",
            uri,
        )


def is_there(error: Exception) -> bool:
    """Whether the server refused a conditional write because the object exists."""
    return code_of(error) in ("PreconditionFailed", "412")


def is_unknown(error: Exception) -> bool:
    """Whether the server refused a write because it has no conditions."""
    return code_of(error) == "NotImplemented"


def is_conflict(error: Exception) -> bool:
    """Whether another writer of the same object came between."""
    return code_of(error) == "ConditionalRequestConflict"
