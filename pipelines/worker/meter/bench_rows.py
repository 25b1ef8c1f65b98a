"""What a network benches at: rows that `medmamba bench --compile` left on this machine, else a table of measured ones.

A training that is far slower on the same GPU is held back by something else than the network.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from medmamba.ops.build_cache import cache_folder

MOST_SCALED = 2.0  # sides that differ by more are not compared: the cost of a pixel is then another


@dataclass(frozen=True)
class BenchSpeed:
    """A measured speed in training, compiled, on one GPU."""

    gpu: str
    network: str
    side: int
    precision: str
    batch: int
    images_per_s: float


_SPEED = TypeAdapter(BenchSpeed)

# Measured on one H200 with torch 2.11 in November 2026: medmamba bench --compile.
MEASURED = (
    BenchSpeed("NVIDIA H200", "T", 224, "bfloat16", 128, 3131),
    BenchSpeed("NVIDIA H200", "T", 224, "bfloat16", 32, 2243),
    BenchSpeed("NVIDIA H200", "S", 224, "bfloat16", 128, 2503),
    BenchSpeed("NVIDIA H200", "B", 224, "bfloat16", 128, 1669),
)


def find_reference(
    gpu: str, network: str, *, side: int, precision: str, micro_batch: int, remembered: Sequence[BenchSpeed] = ()
) -> BenchSpeed | None:
    """The speed at `side` pixels that a micro-batch of so many images should come near; None where nothing compares.

    Only rows with a batch of at most `micro_batch` count: a larger batch is as fast per image or faster. Of these
    the nearest side wins, then the largest batch, then `remembered` before the table. The speed is scaled by pixels.
    """

    def rank(each: BenchSpeed) -> tuple[float, int, bool]:
        return -_distance(each.side, side), each.batch, each in remembered

    same = [
        each
        for each in (*MEASURED, *remembered)
        if (each.gpu, each.network, each.precision) == (gpu, network, precision)
        and each.batch <= micro_batch
        and _distance(each.side, side) <= math.log(MOST_SCALED)
    ]
    if not same:
        return None
    best = max(reversed(same), key=rank)  # of equal ones the last that was measured
    return BenchSpeed(gpu, network, side, precision, best.batch, best.images_per_s * (best.side / side) ** 2)


def remember(row: Any, gpu: str) -> None:
    """Keeps a row of the bench (measure.Row) for trainings on this machine; only compiled ones on a GPU."""
    case = row.case
    if case.device != "cuda" or not case.compiled or not row.train_images_per_s:
        return
    speed = BenchSpeed(gpu, case.network, case.side, case.precision, case.batch, row.train_images_per_s)
    with contextlib.suppress(OSError):  # a home that cannot be written to
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(asdict(speed)) + "\n")


def read_remembered() -> list[BenchSpeed]:
    """What was measured on this machine, oldest first; a damaged line is left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in _file().read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # pydantic's, JSON's and UTF-8's
                found.append(_SPEED.validate_json(line, strict=True))
    return found


def _distance(some: int, other: int) -> float:
    return abs(math.log(some / other))


def _file() -> Path:
    return cache_folder() / "bench.jsonl"
