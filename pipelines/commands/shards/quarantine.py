"""The command shards quarantine: images that could not be decoded, also those of a rejected conversion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import tyro

from data_shards.duplicates import read_report
from data_shards.manifest import MANIFEST, Dataset, open_dataset
from data_shards.names import Places, Sample, quarantined, quarantined_so_far, samples
from data_shards.store import Store
from pipelines.commands.shards.listing import Listing, ListingOptions, check_target
from pipelines.commands.shards.owner import Owner, dataset_in, find_places, owners_config
from pipelines.console.arguments import UsageError
from pipelines.console.command import Command, Flag
from pipelines.console.terminal import console, table
from pipelines.wording import counted


@dataclass(frozen=True)
class QuarantineArguments(Owner, ListingOptions):
    """Arguments of `shards quarantine`."""

    dataset: tyro.conf.Positional[str] = ""
    """DATASET or DATASET/NAME in the store, finished or not. Empty: the only one."""
    names: Flag = False
    """Look up the file names in the source."""


def quarantine(asked: QuarantineArguments) -> int:
    """Prints or writes the quarantined images, with reasons."""
    store = asked.open_store()
    out = dataset_in(store, asked.dataset, unfinished=True)
    dataset = open_dataset(out) if out.head(MANIFEST) is not None else None
    if dataset is None:
        bad, num = quarantined_so_far(out)
    else:
        bad, num = quarantined(dataset), len(dataset.table) + len(dataset.manifest.quarantine)
    places = _places(asked, store, out, dataset, bad)
    reasons = Counter(each.reason for each in bad)
    if not asked.json:
        _print(reasons, out, num, is_finished=dataset is not None)
    counts = {"images": num, "quarantined": len(bad), "reasons": dict(reasons.most_common())}
    extra = {"finished": dataset is not None, **counts}
    listing = Listing(store, out, bad, places, {}, state_column="reason")
    return listing.show(asked, title="Images", everything=asked.all, extra=extra)


def _places(
    asked: QuarantineArguments, store: Store, out: Store, dataset: Dataset | None, bad: Sequence[Sample]
) -> Places | None:
    """The files in the source; None if they are not asked for."""
    if not asked.names:
        if asked.out:
            raise UsageError("shards quarantine: --out writes file names; add --names")
        return None
    config = owners_config(store, out, asked)
    check_target(asked.out, store, config, kind=".csv")
    if dataset is None:
        return replace(find_places(config, {each.key for each in bad}), unlisted=None)
    return find_places(config, {each.key for each in samples(dataset, read_report(out))})


def _print(reasons: Counter, out: Store, num: int, *, is_finished: bool) -> None:
    if reasons:
        rows = [(reason, f"{count:,}") for reason, count in reasons.most_common()]
        table("Quarantined", ("reason", "images"), rows)
    state = "" if is_finished else "; the conversion has not finished"
    bad = reasons.total()
    console().print(f"{bad:,} of {counted(num, 'image')} of {out.uri} quarantined{state}", soft_wrap=True)
    if not is_finished and not num:
        console().print("No shard was written yet; reasons are recorded when shards are written.")


QUARANTINE = Command(
    "shards quarantine",
    "List the images that could not be decoded, with reasons, also of a rejected conversion.",
    QuarantineArguments,
    quarantine,
)
