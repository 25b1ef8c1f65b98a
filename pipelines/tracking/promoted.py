"""Describes an earlier promotion: when it was decided, and where the alias points now."""

from __future__ import annotations

from data_shards.store import Store
from pipelines.flow import Record
from pipelines.tracking.connect import open_tracking
from pipelines.tracking.errors import TrackingError
from pipelines.tracking.registry import by_alias


def describe_promotion(record: Record, store: Store, run: str) -> str:
    """A sentence about a recorded promotion; empty if the record names no version.

    If MLflow does not answer, the sentence says so.
    """
    facts, when = record.facts, f"decided on {record.finished[:16].replace('T', ' ')} UTC"
    if not {"model", "version", "alias"} <= facts.keys():
        return ""
    alias, number, previous = facts["alias"], facts["version"], facts.get("previous")
    over = "replacing no version" if previous is None else f"replacing version {previous}"
    then = f"{when}: version {number} of {facts['model']} was promoted to {alias}, {over}"
    try:
        now = by_alias(open_tracking(store), facts["model"], alias)
    except TrackingError as error:
        return f"{then}; the current position of the alias is unknown: {error}"
    if now is not None and now.number == number:
        return f"{then}, and it is still the {alias}"
    where = f"the alias {alias} is now at version {now.number}" if now else f"no version has the alias {alias} now"
    return f"{then}; {where}, and this command changed nothing; `medmamba promote --run {run} --force` moves it back"
