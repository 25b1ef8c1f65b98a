"""Runs steps in the order of their inputs: skips finished ones, resumes interrupted ones, rejects drift."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from graphlib import TopologicalSorter
from typing import Literal

from pydantic import ValidationError

from data_shards.renamed import stored_values
from data_shards.store import Store, StoreError
from pipelines.faults import fault_line, has_more, kept_reason, users_mistake
from pipelines.flow.record import (
    CONFIG,
    Identity,
    Record,
    check_identity,
    read_failure,
    read_identity,
    read_record,
    to_json,
    write_failure,
    write_identity,
    write_record,
)
from pipelines.flow.step import Context, Show, Step
from pipelines.interrupt import raise_if_interrupted
from pipelines.provenance import git_commit, package_versions

State = Literal["done", "failed", "interrupted", "to do"]


class WorkflowError(RuntimeError):
    """At least one step failed: `failures` maps names to exceptions, `skipped` lists the steps that depend on them.

    `reasons` maps names to one-line reasons; the message has one line for each.
    """

    def __init__(self, failures: dict[str, Exception], reasons: dict[str, str], skipped: list[str]) -> None:
        self.failures, self.reasons, self.skipped = failures, reasons, skipped
        lines = [f"step {name} failed: {reason}" for name, reason in reasons.items()]
        if skipped:
            lines.append(f"not run because of it: {', '.join(skipped)}")
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class StepState:
    """The state of a step in a run, its record once it is done, and the reason if it failed."""

    name: str
    state: State
    record: Record | None = None
    reason: str = ""


def step_folder(store: Store, run: str, step: str) -> Store:
    """`<store>/runs/<run>/<step>`."""
    return store.at("runs", run, step)


def in_order(steps: Sequence[Step]) -> list[Step]:
    """The steps, each after all of its inputs. AssertionError for an unknown input, CycleError for a cycle."""
    by_name = {step.name: step for step in steps}
    assert len(by_name) == len(steps), "two steps have the same name"
    for step in steps:
        for needed in step.inputs.values():
            assert needed in by_name, f"step {step.name} needs {needed}, which is not in the workflow"
    graph = {step.name: list(step.inputs.values()) for step in steps}
    return [by_name[name] for name in TopologicalSorter(graph).static_order()]


def plan_steps(steps: Sequence[Step], store: Store, run: str) -> list[StepState]:
    """The state of each step, without running anything; raises DriftError as early as possible."""
    states: dict[str, StepState] = {}
    for step in in_order(steps):
        out = step_folder(store, run, step.name)
        begun, record = read_identity(out), _finished(step, out, states, run)
        failure = None if record else read_failure(out)
        state: State = "done" if record else "failed" if failure else "interrupted" if begun else "to do"
        states[step.name] = StepState(step.name, state, record, failure.reason if failure else "")
    return list(states.values())


def run_steps(
    steps: Sequence[Step], store: Store, run: str, *, open_context: Callable[[], Context], show: Show
) -> list[StepState]:
    """Runs every unfinished step and returns the states; raises WorkflowError after all steps that can run have run.

    `open_context` connects to MLflow, and to Ray if a step needs it; it is called once, and only if a step must run.
    """
    # Report drift before any work. A service that cannot be reached is not the failure of a step.
    planned = plan_steps(steps, store, run)
    context = open_context() if any(state.state != "done" for state in planned) else None
    states: dict[str, StepState] = {}
    failures: dict[str, Exception] = {}
    reasons: dict[str, str] = {}
    skipped: list[str] = []
    for step in in_order(steps):
        if any(needed in failures or needed in skipped for needed in step.inputs.values()):
            skipped.append(step.name)
            continue
        out = step_folder(store, run, step.name)
        try:
            record = _finished(step, out, states, run)
            if record is None:
                assert context is not None, f"step {step.name} lost its record while others ran"
                show.step(step.name, "resumes" if read_identity(out) else "starts")
                record = _execute(step, out, states, context)
                show.step(step.name, f"done in {record.seconds:.0f} s")
            else:
                show.step(step.name, "done")
            states[step.name] = StepState(step.name, "done", record)
        except Exception as error:  # any failure of one step: the steps that do not depend on it still run
            if has_more(error):
                show.trace("".join(traceback.format_exception(error)))
            failures[step.name] = error
            reasons[step.name] = fault_line(error, step=step.name, places=[store.uri] if store.is_local else [])
            show.step(step.name, "failed")
    if failures:
        raise WorkflowError(failures, reasons, skipped)
    return list(states.values())


def _identity(step: Step, states: dict[str, StepState]) -> Identity:
    records = {name: states[needed].record if needed in states else None for name, needed in step.inputs.items()}
    digests = {name: record.facts["digest"] if record else None for name, record in records.items()}
    return Identity(stored_values(step.config), digests)


def _finished(step: Step, out: Store, states: dict[str, StepState], run: str) -> Record | None:
    """The record of a finished step, else None; DriftError if it was started with another configuration."""
    begun = read_identity(out)
    if begun is not None:
        check_identity(step.name, begun, _identity(step, states), run=run, kind=type(step.config))
    return read_record(out)


def _execute(step: Step, out: Store, states: dict[str, StepState], context: Context) -> Record:
    identity = _identity(step, states)
    write_identity(out, identity)
    started, clock = datetime.now(UTC), time.monotonic()
    facts_of = {name: states[needed].record.facts for name, needed in step.inputs.items()}  # type: ignore[union-attr]
    try:
        with _own_interrupt():
            facts = step.run(step.config, context.placement, out, context, **facts_of)
    except Exception as error:  # a step may fail in any way; the failure is stored and raised again
        raise_if_interrupted(error)  # an interrupted step has not failed
        if _is_held(context):  # else the folder belongs to another driver by now
            places = [context.store.uri] if context.store.is_local else []
            write_failure(out, kept_reason(error, step=step.name, places=places))
            is_bound = step.binds_on_refusal or read_record(out) is not None
            if not is_bound and users_mistake(error) is not None:
                out.delete(CONFIG)  # so that the user can follow the message under the same run name
        raise
    try:
        step.facts.model_validate_json(to_json(facts))
    except ValidationError as error:
        raise AssertionError(
            f"step {step.name} returned facts that do not fit {step.facts.__name__}: {error}"
        ) from None
    record = Record(
        facts=facts,
        inputs=identity.inputs,
        seconds=round(time.monotonic() - clock, 3),
        started=started.isoformat(timespec="milliseconds"),
        finished=datetime.now(UTC).isoformat(timespec="milliseconds"),
        placement=stored_values(context.placement) if step.is_spread and context.placement else {},
        git_commit=git_commit(),
        packages=package_versions(),
    )
    context.check()
    write_record(out, record)
    # Return what a later driver will read: no step may see more of an input than its record holds.
    written = read_record(out)
    assert written is not None
    return written


def _is_held(context: Context) -> bool:
    """Whether this driver still holds the run."""
    try:
        context.check()
    except StoreError:
        return False
    return True


@contextlib.contextmanager
def _own_interrupt() -> Iterator[None]:
    """Restores the handler of Ctrl-C after a step: Ray Train leaves one that ends the process as a success."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
