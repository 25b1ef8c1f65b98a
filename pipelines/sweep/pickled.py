"""Sweeps that an earlier version interrupted: their state in the store is Ray Tune's pickles, which are never read."""

from __future__ import annotations

import json
from collections.abc import Callable

from data_shards.store import Store
from pipelines.sweep.ledger import Ledger
from pipelines.wording import counted

FOLDER = "ray"


def drop_pickled(out: Store, ledger: Ledger, say: Callable[[str], None]) -> None:
    """Deletes what an earlier version left of a sweep, and says what is lost with it, unless the ledger has it."""
    keys = list(out.list(f"{FOLDER}/"))
    if keys and not ledger.records():
        epochs = _epochs(out, keys)
        say(
            f"the sweep was interrupted under an earlier version, which kept its state as pickles. They could run "
            f"code, so they are deleted unread and the sweep begins again: {counted(len(epochs), 'trial')} with "
            f"{counted(sum(epochs.values()), 'epoch')} are lost"
        )
    for key in keys:
        out.delete(key)


def _epochs(out: Store, keys: list[str]) -> dict[str, int]:
    """Folder of a trial -> the epochs in its newest checkpoint."""
    found = {key.split("/")[1]: 0 for key in keys if key.startswith(f"{FOLDER}/trial_")}
    for key in keys:
        parts = key.split("/")
        if len(parts) == 4 and parts[1] in found and parts[3] == "train.json":
            found[parts[1]] = max(found[parts[1]], _epoch(out.get(key)))
    return found


def _epoch(data: bytes) -> int:
    try:
        epoch = json.loads(data)["epoch"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return epoch if isinstance(epoch, int) and 0 < epoch < 1 << 20 else 0
