"""Handles sweeps interrupted under an earlier version, whose state in the store is pickles that are never read."""

from __future__ import annotations

import json
from collections.abc import Callable

from data_shards.store import Store
from pipelines.sweep.ledger import Ledger
from pipelines.wording import counted

FOLDER = "ray"


def drop_pickled(out: Store, ledger: Ledger, say: Callable[[str], None]) -> None:
    """Deletes the state that an earlier version left, and reports what is lost unless the ledger has records."""
    keys = list(out.list(f"{FOLDER}/"))
    if keys and not ledger.records():
        epochs = _epochs(out, keys)
        say(
            f"an earlier version interrupted this sweep and left its state as pickles. Pickles can execute code, so "
            f"they are deleted unread and the sweep starts again; {counted(len(epochs), 'trial')} with "
            f"{counted(sum(epochs.values()), 'epoch')} are lost"
        )
    for key in keys:
        out.delete(key)


def _epochs(out: Store, keys: list[str]) -> dict[str, int]:
    """Trial folder -> epochs in its newest checkpoint."""
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
