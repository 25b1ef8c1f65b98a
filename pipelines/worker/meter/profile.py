"""Profiles a few training steps with torch's profiler: a JSON summary and a trace.

Profiling draws no random numbers and changes no tensors, so a profiled training gives the same weights.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from pipelines.scratch import scratch

FIRST, STEPS = 20, 5  # in earlier steps torch may still compile, capture graphs and fill caches
LARGEST = 10
WAIT = "medmamba: waiting for data"
TRACE = "trace.json.gz"
Interval = tuple[float, float]


class StepProfiler:
    """Profiles steps of the first epoch that this process trains; does nothing afterwards.

    `keep` is called with the summary (see `summarize`) and the path of a gzipped trace in Chrome's format.
    """

    def __init__(self, device: torch.device, keep: Callable[[dict[str, Any], Path], None]) -> None:
        self._device, self._keep = device, keep
        self._profile: Any = None
        self._done = False

    def begin_epoch(self, steps: int) -> None:
        """Chooses which of the epoch's `steps` to profile; earlier and fewer ones in a short epoch."""
        self._active = min(STEPS, max(1, steps - 1))
        self._first = min(FIRST, max(0, steps - self._active))
        self._step = 0
        if self._first <= 1:
            self._start()

    def waiting(self) -> contextlib.AbstractContextManager[Any]:
        """Context around fetching a batch: marks it in the trace."""
        return record_function(WAIT) if self._profile else contextlib.nullcontext()

    def step(self) -> None:
        """Called after each optimizer step."""
        self._step += 1
        if self._profile is None:
            if self._step == self._first - 1:
                self._start()
            return
        if self._step < self._first + self._active:
            if self._step == self._first:
                self._wait()  # otherwise kernels of the warm-up step would run in a measured one
            self._profile.step()
            if self._step == self._first:
                self._began_s = time.perf_counter()
        else:
            self._finish()

    def _start(self) -> None:
        """Starts with a warm-up step if possible, because the profiler itself has start-up costs."""
        if self._done:
            return
        self._wait()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        when = schedule(wait=0, warmup=min(self._first, 1), active=self._active, repeat=1)
        self._profile = profile(activities=activities, schedule=when)
        self._profile.start()
        self._began_s = time.perf_counter()

    def _finish(self) -> None:
        self._wait()
        wall_s = time.perf_counter() - self._began_s
        traced, self._profile, self._done = self._profile, None, True
        traced.step()
        traced.stop()
        summary = {"first_step": self._first + 1, **summarize(traced, self._active, wall_s, self._device.type)}
        with scratch("profile") as folder:
            traced.export_chrome_trace(str(folder / TRACE))
            self._keep(summary, folder / TRACE)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def summarize(traced: Any, steps: int, wall_s: float, device: str) -> dict[str, Any]:
    """Summarizes `steps` profiled steps that took `wall_s` seconds.

    Returns step_ms; calls (kernels on a GPU, operators on a CPU) per step; largest: the ten with the most time, each
    with name, ms and calls per step; and shares of the wall time: busy_share (a kernel or operator runs), data_share
    (waiting for a batch while, on a GPU, nothing runs), host_share (the rest: Python, launches).
    """
    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    events = [event for event in traced.events() if not _is_mark(event)]
    busy = _union([_interval(event) for event in events if event.device_type == kind])
    waits = _union([_interval(event) for event in traced.events() if event.name == WAIT])
    both_us = _overlap_us(busy, waits)
    busy_us, data_us = _length_us(busy), _length_us(waits)
    if device == "cuda":
        data_us -= both_us  # waiting costs nothing while the GPU computes
    else:
        busy_us -= both_us
    busy_share, data_share = (min(1.0, each / (1e6 * wall_s)) for each in (busy_us, data_us))
    rows = _rows(traced, kind, steps)
    return {
        "device": device,
        "steps": steps,
        "step_ms": 1e3 * wall_s / steps,
        "busy_share": busy_share,
        "data_share": data_share,
        "host_share": max(0.0, 1.0 - busy_share - data_share),
        "calls": sum(row["calls"] for row in rows),
        "largest": rows[:LARGEST],
    }


def _rows(traced: Any, kind: DeviceType, steps: int) -> list[dict[str, Any]]:
    """Every kernel or operator by its own time (without what it calls), largest first."""
    found = []
    for event in traced.key_averages():
        if event.device_type == kind and not _is_mark(event):
            own_us = event.self_device_time_total if kind == DeviceType.CUDA else event.self_cpu_time_total
            found.append({"name": event.key, "ms": own_us / 1e3 / steps, "calls": event.count / steps})
    return sorted(found, key=lambda row: -row["ms"])


def _is_mark(event: Any) -> bool:
    """Whether the event is an annotation rather than work."""
    return bool(event.is_user_annotation) or event.key in (WAIT, "ProfilerStep*")


def _interval(event: Any) -> Interval:
    return event.time_range.start, event.time_range.end


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Sorted disjoint intervals that cover the same time."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def _length_us(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _overlap_us(some: list[Interval], others: list[Interval]) -> float:
    """Time covered by both lists; the intervals of each list must be disjoint."""
    return _length_us(some) + _length_us(others) - _length_us(_union([*some, *others]))
