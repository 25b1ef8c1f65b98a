"""Reference speeds of networks: rows that `medmamba bench --compile` stored on this machine, or a built-in table.

If a training is far slower on the same GPU, something other than the network is the bottleneck.
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

MOST_SCALED = 2.0  # larger ratios of image sides are not compared, because the cost per pixel changes


@dataclass(frozen=True)
class BenchSpeed:
    """A measured speed of compiled training on one GPU."""

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
    """The speed to expect at `side` pixels with this micro-batch; None if no row is comparable.

    Only rows with a batch of at most `micro_batch` count, because larger batches are at least as fast per image. Among
    these the nearest side wins, then the largest batch, then `remembered` rows. The speed is scaled by the pixel count.
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
    best = max(reversed(same), key=rank)  # among equals, the most recent measurement
    return BenchSpeed(gpu, network, side, precision, best.batch, best.images_per_s * (best.side / side) ** 2)


def remember(row: Any, gpu: str) -> None:
    """Stores a row of the bench (measure.Row) for trainings on this machine, if it was compiled and on a GPU."""
    case = row.case
    if case.device != "cuda" or not case.compiled or not row.train_images_per_s:
        return
    speed = BenchSpeed(gpu, case.network, case.side, case.precision, case.batch, row.train_images_per_s)
    with contextlib.suppress(OSError):  # the cache folder may be read-only
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(asdict(speed)) + "\n")


def read_remembered() -> list[BenchSpeed]:
    """The rows measured on this machine, oldest first; damaged lines are skipped."""
    found = []
    with contextlib.suppress(OSError):
        for line in _file().read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                found.append(_SPEED.validate_json(line, strict=True))
    return found


def _distance(some: int, other: int) -> float:
    return abs(math.log(some / other))


def _file() -> Path:
    return cache_folder() / "bench.jsonl"
