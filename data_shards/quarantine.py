"""Images that cannot be decoded: how many a conversion accepts, and how it reports them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from data_shards.config import DataConfig
from data_shards.duplicates import lost_text
from data_shards.options import printable
from data_shards.plan import ShardPlan


class RefusedError(ValueError):
    """A refused conversion. `public` gives the reason without file names, for records that others read."""

    def __init__(self, message: str, *, public: str):
        super().__init__(message)
        self.public = public


def check_quarantine(config: DataConfig, bad: int, good: int, named: Callable[[], list[str]]) -> None:
    """RefusedError if too many of the images are bad; `named` lists them for the owner of the images."""
    share = bad / max(1, bad + good)
    if share > config.max_quarantine:
        found = (
            f"{bad} of {bad + good} images ({share:.1%}) cannot be decoded, but max_quarantine allows "
            f"{config.max_quarantine:.1%}"
        )
        raise RefusedError(
            f"{found}: {'; '.join([*named(), 'repair or remove them'])}, or raise --data.max-quarantine", public=found
        )


def check_lost_classes(
    plans: Sequence[ShardPlan], reasons: dict[str, str], classes: Sequence[str], listing: str
) -> None:
    """ValueError if a class has no images left in a split because none of them could be decoded."""
    planned = Counter((plan.split, label) for plan in plans for p in plan.rows for label in p.row.labels)
    bad = Counter(
        (plan.split, label) for plan in plans for p in plan.rows if p.key in reasons for label in p.row.labels
    )
    lost = [home for home, num in sorted(bad.items()) if num == planned[home]]
    if not lost:
        return
    label, homes = lost[0][1], {split for split, other in lost if other == lost[0][1]}
    there = [plan for plan in plans if plan.split in homes]
    keys = {p.key for plan in there for p in plan.rows if label in p.row.labels}
    named = "; ".join(first_named(there, {key: reason for key, reason in reasons.items() if key in keys}))
    raise ValueError(
        f"{lost_text(lost, classes)}: none of the {len(keys)} images of {classes[label]!r} there can be decoded "
        f"({named}), but every split needs every class; repair them, add images of the class, or leave the class out; "
        f"{listing}"
    )


def first_named(plans: Sequence[ShardPlan], reasons: dict[str, str], most: int = 3) -> list[str]:
    """The first quarantined files with their reasons; only for the owner of the images, never stored."""
    rows = sorted((p.row.where, reasons[p.key]) for plan in plans for p in plan.rows if p.key in reasons)
    more = [f"and {len(rows) - most} more"] if len(rows) > most else []
    return [f"{printable(where)} ({printable(reason)})" for where, reason in rows[:most]] + more
