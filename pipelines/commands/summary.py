"""The tables at the end of a run: what was made, how good it is beside simpler means, where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_shards.split import SPLITS
from data_shards.store import Store
from pipelines.commands.class_table import completed, print_classes
from pipelines.commands.status import winner_name
from pipelines.commands.terminal import console, table
from pipelines.flow import StepState
from pipelines.steps.evaluate import BASELINES

FEW_TEST_IMAGES = 500


def print_plan(states: Sequence[StepState]) -> None:
    """The steps of a dry run and their states."""
    rows = [(state.name, f"{state.state}: {state.reason}" if state.reason else state.state) for state in states]
    table("Steps", ("step", "state"), rows)


def print_summary(states: Sequence[StepState], store: Store, run: str) -> None:
    """Tables of the steps, of the metrics beside the yardsticks, and of where things lie."""
    facts = {state.name: state.record.facts for state in states if state.record}
    if "shard" in facts:
        facts["shard"] = completed(facts["shard"], store)
    rows = [
        (
            state.name,
            state.state,
            f"{state.record.seconds:.0f}",
            "\n".join(_made(state.name, facts[state.name], state.record.finished)),
        )
        for state in states
        if state.record
    ]
    table(f"Run {run}", ("step", "state", "s", "what it made"), rows)
    if "shard" in facts:
        print_classes(facts["shard"])
    if "evaluate" in facts:
        _print_metrics(facts["evaluate"])
    _print_places(facts, store, run)


def print_profile(states: Sequence[StepState]) -> None:
    """Tables of where a training step's time went and of the largest kernels, 80 columns wide."""
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
    """Names of kernels list their template's arguments: their beginning and end tell most."""
    return name if len(name) <= limit else f"{name[: limit - 15]}…{name[-14:]}"


def _made(step: str, facts: dict[str, Any], finished: str) -> list[str]:
    if step == "shard":
        samples = facts.get("samples", {})
        split = ", ".join(f"{name} {samples[name]}" for name in SPLITS if name in samples)
        lines = [f"{facts['num_images']} images in {facts['num_shards']} shards{f' ({split})' if split else ''}"]
        if facts["quarantine"]:
            where = facts["data"].removeprefix("datasets/")
            lines.append(
                f"{facts['quarantine']} images could not be decoded (medmamba shards quarantine {where} --names)"
            )
        copies = [f"{count} {what}" for what, count in facts.get("leaks", {}).items() if count]
        if copies:
            where = facts["data"].removeprefix("datasets/")
            left_out = f"; {facts['dropped']} left out" if facts["dropped"] else ""
            lines.append(f"copies: {', '.join(copies)}{left_out} (medmamba shards leaks {where})")
        return [*lines, f"manifest {facts['digest'][:12]}"]
    if step == "tune":
        stopped = sum(row["stopped_early"] for row in facts["trials"])
        failed = sum(row["error"] is not None for row in facts["trials"])
        lines = [f"{len(facts['trials'])} trials, {stopped - failed} stopped early, {failed} failed"]
        lines.append(f"winner: {winner_name(facts)}")
        return lines + [f"winner: {key} = {_short(value)}" for key, value in facts["winner"].items()]
    if step == "train":
        lines = [f"best of {facts['epochs']} epochs: {facts['best_epoch']}, val AUC {facts['metrics']['val_auc']:.4f}"]
        return lines + ([f"started from {facts['init']['uri']}"] if "init" in facts else [])
    if step == "evaluate":
        return [f"test AUC {facts['metrics']['auc']:.4f} over {facts['num_samples']} images"]
    if step == "register":
        return [f"{facts['model']} version {facts['version']}"]
    if "verdict" in facts:
        # The reason speaks of the champion of that moment, which may have been replaced since.
        return [f"{facts['verdict']}: {facts['reason']}", f"decided on {finished[:16].replace('T', ' ')} UTC"]
    return []


def _print_metrics(facts: dict[str, Any]) -> None:
    """The network beside what simpler means reach on the same split; says where a split is too small to tell much."""
    names = ("auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1")
    title = f"Test split, {facts['num_samples']} images; for comparison logistic regression and chance"
    rows = [("network", *(f"{facts['metrics'][name]:.4f}" for name in names))]
    # Short, so that the table fits 80 columns.
    for key, name in {"pixels": "logistic, pixels", "size": "logistic, size", "chance": "largest class"}.items():
        if key in facts["baselines"]:
            found = facts["baselines"][key]
            rows.append((name, *(f"{found[metric]:.4f}" if metric in found else "" for metric in names)))
    table(title, ("", "AUC", "accuracy", "balanced", "sensitivity", "specificity", "F1"), rows)
    interval = facts.get("intervals", {}).get("auc")
    for key, reason in facts.get("absent_baselines", {}).items():
        console().print(f"{BASELINES.get(key, 'baselines')}: not to be had ({reason})")
    if interval:
        console().print(f"95 % interval of the network's AUC, by group: {interval[0]:.3f} to {interval[1]:.3f}")
    if facts["num_samples"] < FEW_TEST_IMAGES:
        step = 100 / facts["num_samples"]
        console().print(
            f"Only {facts['num_samples']} test images: one is {step:.2f} points of accuracy, so small gaps say little."
        )


def _print_places(facts: dict[str, dict], store: Store, run: str) -> None:
    rows = [("store", store.uri)]
    if "shard" in facts:
        rows.append(("shards", f"{store.uri}/{facts['shard']['data']}"))
    if "train" in facts:
        rows.append(("weights", f"{store.uri}/{facts['train']['model']}"))
    if "evaluate" in facts:
        rows.append(("predictions", f"{store.uri}/{facts['evaluate']['predictions']}"))
    rows.append(("records", f"{store.uri}/runs/{run}"))
    if "register" in facts:
        rows.append(("model", f"models:/{facts['register']['model']}/{facts['register']['version']}"))
    # The last one that was asked: a forced promotion comes after the gate's.
    promoted = next((made for made in reversed(facts.values()) if "verdict" in made), None)
    if promoted and promoted["verdict"] == "yes":
        rows.append(("champion", f"models:/{facts['register']['model']}@{promoted['alias']}"))
    table("Where it lies", ("what", "where"), rows)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
