"""A sweep of cheap trials on a real Ray Tune: `cheap_sweep.py STORE TRIALS EPOCHS AT_ONCE EPOCH_S`.

Each trial computes its figures from what it tries; its checkpoint is the list of the epochs that it has made. MLflow
keeps its runs in the current folder. Prints the ledger as JSON. Files in the current folder make something go wrong:
`lost`: another driver has taken the run; `crash-3-2`, `diverge-3-2`: trial 3 does so in epoch 2. Where there is
`waits-for-two-nodes`, trials do that.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from optuna.distributions import FloatDistribution

from data_shards.store import Store, open_store
from data_shards.store.fenced_lease import LostLeaseError
from pipelines.cluster import ray_session
from pipelines.sweep.ledger import Ledger, checkpoint_folder
from pipelines.sweep.suggestion import misfit, suggest
from pipelines.tracking import open_tracking
from pipelines.worker.engine.step_guard import TrainingError

SPACE = {"lr": FloatDistribution(1e-4, 1e-1, log=True), "drop_path": FloatDistribution(0, 0.3)}


def figures(overrides: dict[str, float], epoch: int) -> dict[str, float]:
    """Better with every epoch, and the nearer the rate is to 3e-3; the last of many epochs overfits a little."""
    auc = 1 / (1 + abs(math.log(overrides["lr"] / 3e-3)) / 4 + overrides["drop_path"]) - 0.3 / epoch
    return {"epoch": epoch, "val_auc": auc, "val_loss": 1 - auc, "val_accuracy": auc / 2}


def nodes(out: Store) -> int:
    """How many nodes trials have begun on."""
    return len({out.get(key) for key in out.list("trials/") if key.endswith("/node")})


def cheap_trial(chosen: dict, out: Store, epochs: int, epoch_s: float, wrong: Path) -> None:
    """What Tune runs for each trial."""
    import ray
    from ray import tune

    kept = checkpoint_folder(out, chosen["id"])
    made = json.loads(kept.get("made")) if kept.head("made") else []
    done = len(made)
    kept.put("node", ray.get_runtime_context().get_node_id().encode())
    until = time.monotonic() + 120
    while (wrong / "waits-for-two-nodes").exists() and nodes(out) < 2 and time.monotonic() < until:
        time.sleep(0.2)
    for epoch in range(1, epochs + 1):
        metrics = figures(chosen["overrides"], epoch)
        if epoch > done:
            time.sleep(epoch_s)
            if (wrong / f"diverge-{chosen['number']}-{epoch}").exists():
                raise TrainingError(f"the loss is nan in epoch {epoch}")
            if (wrong / f"crash-{chosen['number']}-{epoch}").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(epoch)
            kept.put("made", json.dumps(made).encode())
        if epoch > chosen["recorded"]:
            tune.report({"epoch": epoch, "val_auc": metrics["val_auc"], "reported": metrics})


def check() -> None:
    """What the lease of a run does."""
    if Path("lost").exists():
        raise LostLeaseError("another driver has taken the run")


def main() -> None:
    """Runs or resumes the sweep."""
    uri, trials, epochs, at_once = sys.argv[1], *map(int, sys.argv[2:5])
    out = open_store(uri)
    ray_session.connect(num_cpus=2 if "RAY_ADDRESS" not in os.environ else None)
    from ray import tune

    from pipelines.sweep.seams import Asha, Keeper, Search, run_trials

    ledger = Ledger(out, check=check)
    ledger.read(functools.partial(misfit, space=SPACE, trials=trials, epochs=epochs), print)
    tracking = open_tracking(open_store("."))
    parent = tracking.step_run(out, run="cheap", step="tune")
    tracking.reopen_trials(parent)
    numbers, asha = ledger.to_do(trials), Asha(epochs, 1, 2)
    asha.refill(ledger)
    search = Search(ledger, numbers, lambda number: suggest(SPACE, seed=7, number=number, over=ledger.over()))
    keeper = Keeper(ledger, tracking, parent, trials=trials, epochs=epochs)
    cpus = {"CPU": float(os.environ.get("CPUS_PER_TRIAL", "1"))}
    work = functools.partial(cheap_trial, out=out, epochs=epochs, epoch_s=float(sys.argv[5]), wrong=Path.cwd())
    run_trials(tune.with_resources(work, cpus), search, asha, keeper, trials=len(numbers), at_once=at_once)
    print(json.dumps([record.model_dump(mode="json") for record in ledger.records()]))


if __name__ == "__main__":
    main()
