"""The runs of a store: the state of each step, and a few words about it."""

from __future__ import annotations

from data_shards.store import Store
from data_shards.store.fenced_lease import current_holder
from pipelines.flow.record import CONFIG, FAILURE, RECORD, Record, read_failure, read_record
from pipelines.steps.facts import read_facts
from pipelines.tracking.leases import run_lease_key
from pipelines.tracking.promotions import abandoned_moves
from pipelines.wording import counted
from pipelines.worker.checkpoint.stored import Checkpoints


def read_status(store: Store, run: str = "") -> list[dict]:
    """Rows {run, step, state, finished, seconds, told}, of one run or of all, sorted by run and finishing time."""
    begun: dict[tuple[str, str], set[str]] = {}
    for key in store.list(f"runs/{run}/" if run else "runs/"):
        parts = key.split("/")
        if len(parts) == 4 and parts[3] in (CONFIG, RECORD, FAILURE):
            begun.setdefault((parts[1], parts[2]), set()).add(parts[3])
    rows, abandoned = [], abandoned_moves(store)
    held = {name: current_holder(store, run_lease_key(name)) for name, _ in begun}
    for (name, step), files in begun.items():
        out = store.at("runs", name, step)
        record = read_record(out) if RECORD in files else None
        failure = read_failure(out) if record is None and FAILURE in files else None
        rows.append(
            {
                "run": name,
                "step": step,
                "state": "done" if record else "failed" if failure else "running" if held[name] else "interrupted",
                "finished": record.finished if record else None,
                "seconds": record.seconds if record else None,
                "told": failure.reason
                if failure
                else _line(step, record) or abandoned.get(f"runs/{name}/{step}", "") or _progress(out),
            }
        )
    return sorted(rows, key=lambda row: (row["run"], row["finished"] or "9"))


def _line(step: str, record: Record | None) -> str:
    if record is None:
        return ""
    try:
        return read_facts(step, record).line()
    except ValueError as error:  # one damaged record must not hide the other runs
        return str(error)


def _progress(out: Store) -> str:
    """How far the newest checkpoint of an unfinished training is; empty for other steps or without one."""
    state = Checkpoints(out).newest_state()
    if state is None:
        return ""
    into = f" and {counted(len(state['losses']), 'step')}" if state["losses"] else ""
    minutes = Checkpoints(out).age_s() / 60
    return f"checkpoint after {counted(state['epoch'], 'epoch')}{into}, {minutes:.0f} min ago"
