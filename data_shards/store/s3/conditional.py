"""Conditional writes (If-None-Match): which servers support them, and their answers.

Support is probed once per process and bucket. Some servers ignore conditions, some refuse them as NotImplemented.
radosgw 16 supports them for single uploads, but not at the end of a multipart upload. A server that answers
ConditionalRequestConflict needs the object again.
"""

from __future__ import annotations

import logging

from data_shards.store.s3.errors import code_of

ONLY_IF_ABSENT = {"IfNoneMatch": "*"}
_log = logging.getLogger(__name__)
_heeds: dict[tuple[str, str], bool] = {}  # by endpoint and bucket


def heeds_conditions(endpoint: str, bucket: str) -> bool | None:
    """Whether the server supports conditional writes to this bucket; None if not probed yet."""
    return _heeds.get((endpoint, bucket))


def learn_conditions(endpoint: str, bucket: str, heeds: bool, *, uri: str) -> None:
    """Remembers the first result, and warns the user once if conditional writes are not supported."""
    if _heeds.setdefault((endpoint, bucket), heeds) is heeds is False:
        _log.warning(
            "%s ignores conditional writes (If-None-Match), so two drivers of one dataset, run or registered model are "
            "kept apart only by a lease object, which is less safe; do not start two at once, or use a server with "
            "conditional writes",
            uri,
        )


def is_there(error: Exception) -> bool:
    """Whether the server refused a conditional write because the object exists."""
    return code_of(error) in ("PreconditionFailed", "412")


def is_unknown(error: Exception) -> bool:
    """Whether the server refused a write because it does not support conditions."""
    return code_of(error) == "NotImplemented"


def is_conflict(error: Exception) -> bool:
    """Whether another writer of the same object interfered."""
    return code_of(error) == "ConditionalRequestConflict"
