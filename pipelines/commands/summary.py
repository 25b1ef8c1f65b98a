"""The tables at the end of a run: what each step produced, metrics and baselines, where it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from data_shards.store import Store
from pipelines.commands.class_table import completed, print_classes
from pipelines.commands.study.stored import find_study
from pipelines.commands.study.tables import print_study
from pipelines.console.terminal import console, table
from pipelines.evaluation.parts import Study
from pipelines.flow import Facts, Record, StepState
from pipelines.steps.baselines import BASELINES
from pipelines.steps.facts import EvaluateFacts, ShardFacts, read_facts
from pipelines.wording import counted

FEW_TEST_IMAGES = 500


def print_plan(states: Sequence[StepState]) -> None:
    """Prints the steps of a dry run and their states."""
    rows = [(state.name, f"{state.state}: {state.reason}" if state.reason else state.state) for state in states]
    table("Steps", ("step", "state"), rows)


def print_summary(states: Sequence[StepState], store: Store, run: str) -> None:
    """Prints tables of the steps, of the metrics compared with baselines, and of where the results are stored."""
    made = {state.name: (state, _facts(state.name, state.record, store)) for state in states if state.record}
    rows = [
        (name, state.state, f"{state.record.seconds:.0f}", "\n".join(facts.lines(state.record.finished)))
        for name, (state, facts) in made.items()
        if state.record
    ]
    table(f"Run {run}", ("step", "state", "s", "what it made"), rows)
    found = [facts for _, facts in made.values()]
    for each in found:
        if isinstance(each, ShardFacts):
            print_classes(each.model_dump())
        elif isinstance(each, EvaluateFacts):
            _print_evaluation(each, store)
    # The last promotion counts: a forced one comes after the gate's.
    places = dict(place for each in found for place in each.places(store.uri))
    where = [("store", store.uri), ("records", f"{store.uri}/runs/{run}"), *places.items()]
    table("Where it is stored", ("what", "where"), where)


def _facts(step: str, record: Record, store: Store) -> Facts:
    if step == "shard":
        record = replace(record, facts=completed(record.facts, store))
    return read_facts(step, record)


def print_profile(states: Sequence[StepState]) -> None:
    """Prints where a training step's time went and the largest kernels, 80 columns wide."""
    found = next((s.record.facts.get("profile") for s in states if s.name == "train" and s.record), None)
    if found is None:
        return
    on_gpu = found["device"] == "cuda"
    what = "kernel" if on_gpu else "operator"
    first, steps = found["first_step"], found["steps"]
    which = f"Steps {first} to {first + steps - 1}" if steps > 1 else f"Step {first}"
    title = f"{which}, {found['step_ms']:.1f} ms{' each' if steps > 1 else ''}"
    shares = [
        (f"busy: a{'' if on_gpu else 'n'} {what} runs", found["busy_share"]),
        ("data: waiting for a batch", found["data_share"]),
        ("host: Python and launches", found["host_share"]),
    ]
    rows = [(name, f"{found['step_ms'] * share:.2f}", f"{100 * share:.1f}") for name, share in shares]
    numeric: tuple[str, ...] = ("ms a step", "%")
    table(title, ("", *numeric), rows, numeric=numeric, width=80)
    largest = [
        (_clipped(row["name"]), f"{row['calls']:g}", f"{row['ms']:.3f}", f"{100 * row['ms'] / found['step_ms']:.1f}")
        for row in found["largest"]
    ]
    title, numeric = f"The largest {what}s of {found['calls']:,.0f} calls a step", ("calls", *numeric)
    table(title, (what, *numeric), largest, numeric=numeric, width=80)
    console().print("A trace of these steps, for ui.perfetto.dev or chrome://tracing:")
    console().print(found["trace"], soft_wrap=True)


def _clipped(name: str, limit: int = 46) -> str:
    """Shortens the name of a kernel in the middle: the ends of its template arguments tell most."""
    return name if len(name) <= limit else f"{name[: limit - 15]}…{name[-14:]}"


def _print_evaluation(facts: EvaluateFacts, store: Store) -> None:
    """Prints the metrics, then the study; evaluations of earlier releases have none."""
    study, reason = find_study(store, facts.model_dump())
    _print_metrics(facts, study)
    if study is not None:
        print_study(study)
    elif reason:
        console().print(reason, soft_wrap=True)


def _print_metrics(facts: EvaluateFacts, study: Study | None) -> None:
    """Prints the network's metrics next to the baselines'; says so if the split is too small for small gaps."""
    columns = {
        "auc": "AUC",
        "accuracy": "accuracy",
        "balanced_accuracy": "balanced",
        "sensitivity": "sens.",
        "specificity": "spec.",
        "f1": "F1",
    }
    if study is not None and study.task != "multilabel":
        del columns["sensitivity"]  # the same number as the balanced accuracy
    names = tuple(columns)
    title = f"Test split, {counted(facts.num_samples, 'image')}, compared with logistic regression and chance"
    rows = [("network", *(f"{facts.metrics[name]:.4f}" for name in names))]
    # Short, so that the table fits 80 columns.
    for key, name in {"pixels": "logistic, pixels", "size": "logistic, size", "chance": "largest class"}.items():
        if key in facts.baselines:
            found = facts.baselines[key]
            rows.append((name, *(f"{found[metric]:.4f}" if metric in found else "" for metric in names)))
    table(title, ("", *columns.values()), rows)
    interval = facts.intervals.get("auc")
    for key, reason in facts.absent_baselines.items():
        console().print(f"{BASELINES.get(key, 'baselines')}: not available ({reason})", soft_wrap=True)
    if interval and study is None:
        console().print(f"95 % interval of the network's AUC, by group: {interval[0]:.3f} to {interval[1]:.3f}")
    if facts.num_samples < FEW_TEST_IMAGES:
        step = 100 / facts.num_samples
        console().print(
            f"Only {counted(facts.num_samples, 'test image')}: each is worth {step:.2f} points of accuracy, so small "
            "differences say little."
        )
