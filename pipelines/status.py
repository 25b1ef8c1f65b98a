"""What stands in a store: runs, their steps, and one clause about each."""

from __future__ import annotations

from data_shards.store import Store
from pipelines.flow.record import CONFIG, RECORD, Record, read_record


def read_status(store: Store, run: str = "") -> list[dict]:
    """Rows {run, step, state, finished, seconds, told}, of one run or of all, in the order in which steps finished."""
    begun: dict[tuple[str, str], bool] = {}
    for key in store.list(f"runs/{run}/" if run else "runs/"):
        parts = key.split("/")
        if len(parts) == 4 and parts[3] in (CONFIG, RECORD):
            place = (parts[1], parts[2])
            begun[place] = begun.get(place, False) or parts[3] == RECORD
    rows = []
    for (name, step), finished in begun.items():
        record = read_record(store.at("runs", name, step)) if finished else None
        rows.append(
            {
                "run": name,
                "step": step,
                "state": "done" if record else "interrupted",
                "finished": record.finished if record else None,
                "seconds": record.seconds if record else None,
                "told": _told(record),
            }
        )
    return sorted(rows, key=lambda row: (row["run"], row["finished"] or "9"))


def _told(record: Record | None) -> str:
    facts = record.facts if record else {}
    if "num_shards" in facts:
        classes = {name for counts in facts["counts"].values() for name in counts}
        return f"{facts['num_images']} images of {len(classes)} classes in {facts['num_shards']} shards"
    if "trials" in facts:
        return f"{len(facts['trials'])} trials, winner {facts['winner_trial']}"
    if "best_epoch" in facts:
        return f"epoch {facts['best_epoch']}, val AUC {facts['metrics']['val_auc']:.4f}"
    if "predictions" in facts:
        return f"test AUC {facts['metrics']['auc']:.4f} over {facts['num_samples']} images"
    if "verdict" in facts:
        return f"{facts['verdict']}: {facts['reason']}"
    if "version" in facts:
        return f"{facts['model']} version {facts['version']}"
    return ""
