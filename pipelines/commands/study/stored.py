"""The study of a run, where its evaluation has one."""

from __future__ import annotations

from typing import Any

from data_shards.store import Store, StoreError
from pipelines.evaluation.parts import Study, read_study


def find_study(store: Store, evaluate: dict[str, Any]) -> tuple[Study | None, str]:
    """The study that the facts of an evaluate step name, or None with the reason.

    Evaluations of earlier releases have no study, which is not worth a reason.
    """
    key = evaluate.get("study", "")
    if not key:
        return None, ""
    try:
        return read_study(store.get(key)), ""
    except (StoreError, ValueError) as error:
        return None, f"no study to show: {error}"


def with_study(store: Store, evaluate: dict[str, Any]) -> dict[str, Any]:
    """The facts of an evaluate step for `--json`: with the complete study as `evaluation`, where there is one."""
    found, _ = find_study(store, evaluate)
    return evaluate if found is None else {**evaluate, "evaluation": found.model_dump(mode="json")}
