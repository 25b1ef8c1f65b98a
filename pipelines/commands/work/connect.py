"""Connects to what the remaining steps of a run need: images, store, MLflow and Ray."""

from __future__ import annotations

import functools
import importlib
import os
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

from data_shards.store import Store
from medmamba.config import MedMambaConfig
from pipelines.cluster import ray_session
from pipelines.cluster.background import in_background
from pipelines.commands.work.begun import write_begun
from pipelines.commands.work.options import Resolved, TrainWork, is_profiled
from pipelines.console.terminal import Terminal
from pipelines.demand import RunDemand
from pipelines.faults import lost_ray
from pipelines.flow import Step, StepState, plan_steps
from pipelines.interrupt import HAS_REPORTED, INTERRUPTED, is_interrupted
from pipelines.placement import Placement
from pipelines.steps.context import StepContext
from pipelines.steps.shard import check_images
from pipelines.tracking import check_tracking, open_tracking

# A signal to a process group reaches its processes one after the other. An interrupted command releases what it holds
# within seconds, even if Ray is gone.
SIGNALS_WITHIN_S, ENDING_S = 1.0, 20.0
BEGAN = time.monotonic()
# Slow imports of each step's driver.
LIBRARIES = {
    "shard": (),
    "tune": ("ray.tune", "optuna"),
    "train": ("ray.train", "pipelines.worker.group.process_group"),
}


def open_context(
    work: Resolved,
    workflow: str,
    steps: Sequence[Step],
    store: Store,
    *,
    terminal: Terminal,
    check: Callable[[], None],
) -> StepContext:
    """Connects to everything that the remaining steps need; reports what cannot be reached before any work."""
    states = plan_steps(steps, store, work.run)
    to_do = {state.name for state in states if state.state != "done"}
    check_source(work, states, store)  # before anything is written under the run's name
    store.check()
    check_tracking(store)
    on_ray = any(step.is_spread for step in steps if step.name in to_do)
    opened = in_background(functools.partial(open_tracking, store))  # importing MLflow takes as long as starting Ray
    try:
        placement = _place(work, states, store, terminal, after=opened) if on_ray else None
    except BaseException:  # including Ctrl-C
        wait([opened], timeout=ENDING_S)  # a new database interrupted during its migrations could never be opened again
        raise
    if not opened.done():
        terminal.begin("opening MLflow")
    tracking = replace(opened.result(), patience_s=work.placement.patience_s)
    tracking.close_killed(store.at("runs", work.run))
    terminal.ready()
    write_begun(store, work, workflow)
    return StepContext(
        store, work.run, placement, tracking, terminal, check, profile=is_profiled(work), until=time_is_up(work)
    )


def check_source(work: Resolved, states: Sequence[StepState], store: Store) -> None:
    """Raises ValueError if the images must still be converted and were not found."""
    if any(state.name == "shard" and state.state != "done" for state in states):
        check_images(work.values.data, store)


def time_is_up(work: Resolved) -> float:
    """When the time of --max-minutes is up, in seconds of the monotonic clock; 0: never."""
    minutes = work.max_minutes if isinstance(work, TrainWork) else 0.0
    return BEGAN + 60 * minutes if minutes > 0 else 0.0


def _preload(to_do: Collection[str], after: Future[Any]) -> None:
    """Once MLflow is imported, imports what the first Ray step needs, while Ray is still starting."""
    wait([after])
    first = next((name for name in LIBRARIES if name in to_do), None)
    for module in LIBRARIES[first] if first else ():
        importlib.import_module(module)


def _place(
    work: Resolved, states: Sequence[StepState], store: Store, terminal: Terminal, *, after: Future[Any]
) -> Placement:
    """Connects to Ray and resolves the placement on it; imports what the first step needs when `after` is done."""
    ray_session.prepare()
    in_background(functools.partial(_preload, [state.name for state in states if state.state != "done"], after))
    address = os.environ.get("RAY_ADDRESS")
    terminal.begin(f"connecting to Ray at {address}" if address else "starting Ray on this machine")
    choice = ray_session.begin_choice(work.placement, *_scans(work, states))
    ray_session.connect(lost=functools.partial(end_without_ray, terminal))
    terminal.ready()
    demand = RunDemand(work.values, states, store, work.run)
    terminal.begin("detecting CPUs, GPUs and a scan backend")
    placement = ray_session.place(work.placement, store, demand.for_placement(), say=terminal.say, choice=choice)
    terminal.ready()
    terminal.say(f"placement: {placement.summary}")
    demand.check(placement)
    return placement


def _scans(work: Resolved, states: Sequence[StepState]) -> tuple[Sequence[tuple[int, int, int]], list[str]]:
    """Sizes of the scans that the remaining steps will run, and their dtypes, the training's first."""
    to_do, values = {state.name for state in states if state.state != "done"}, work.values
    trained = "bfloat16" if values.train.precision == "bfloat16" else "float32"
    dtypes = {trained} if to_do & {"tune", "train"} else set()
    if "evaluate" in to_do:
        dtypes.add("float32")
    sizes = values.model.scan_sizes if isinstance(values.model, MedMambaConfig) else ()
    return sizes, sorted(dtypes, key=lambda dtype: dtype != trained)


def end_without_ray(terminal: Terminal, server: str) -> None:
    """Ends this process: calls into a Ray that is gone would wait for minutes or forever.

    If a signal is already ending this process (and has ended Ray), it first gets time to release what it holds.
    """
    try:
        if not is_interrupted(wait_s=SIGNALS_WITHIN_S):
            terminal.close()
            terminal.say(f"medmamba: {lost_ray(server)}{terminal.details()}")
        elif not HAS_REPORTED.wait(ENDING_S):
            terminal.close()
            terminal.say(f"medmamba: {INTERRUPTED}")
    finally:  # standard error may be closed
        os._exit(1)
