"""The command bench. It parses its own arguments, so its modules are imported only when it runs."""

from __future__ import annotations

from pipelines.console.command import Command, read_words


def bench(argv: list[str]) -> int:
    """Runs the benchmark that `argv` describes; returns the exit code."""
    from pipelines.bench.networks import bench as measure

    return measure(argv)


BENCH = Command(
    "bench",
    "Measure speed, memory and cost of the networks on this machine; with `bench data`, of the loader.",
    list[str],
    bench,
    read=read_words,
)
