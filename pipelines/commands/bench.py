"""The command bench, which reads its own arguments: its modules are loaded only when it is asked for."""

from __future__ import annotations

from pipelines.console.command import Command, read_words


def bench(argv: list[str]) -> int:
    """Measures what `argv` asks for; returns the exit code."""
    from pipelines.bench.networks import bench as measure

    return measure(argv)


BENCH = Command(
    "bench",
    "Measure speed, memory and cost of the networks on this machine; `bench data`: of the loader.",
    list[str],
    bench,
    read=read_words,
)
