"""What became of a promotion that was recorded earlier: when it was decided, and where the alias is now."""

from __future__ import annotations

from data_shards.store import Store
from pipelines.flow import Record
from pipelines.tracking.connect import open_tracking
from pipelines.tracking.errors import TrackingError
from pipelines.tracking.registry import by_alias


def describe_promotion(record: Record, store: Store, run: str) -> str:
    """One sentence about a recorded yes; a MLflow that does not answer is part of it, not an error.

    Empty where the record does not name a version.
    """
    facts, when = record.facts, f"decided on {record.finished[:16].replace('T', ' ')} UTC"
    if not {"model", "version", "alias"} <= facts.keys():
        return ""
    alias, number, previous = facts["alias"], facts["version"], facts.get("previous")
    over = "over no other version" if previous is None else f"over version {previous}"
    then = f"{when}: version {number} of {facts['model']} was promoted to {alias}, {over}"
    try:
        now = by_alias(open_tracking(store), facts["model"], alias)
    except TrackingError as error:
        return f"{then}; where the alias is now is not known: {error}"
    if now is not None and now.number == number:
        return f"{then}, and it still is the {alias}"
    where = f"the alias {alias} is at version {now.number} now" if now else f"no version has the alias {alias} now"
    return f"{then}; {where}, and this command changed nothing; `medmamba promote --run {run} --force` moves it back"
