"""What a shard worker needs before its first image: CPU seconds and memory, on a table of many rows.

    python tests/bench/shard_worker.py [--rows 100000] [--files 200] [--shard 10000] [--folder /tmp/worker] [--json]

The set is a CSV whose rows name links to few generated images of 16 px. A new process imports what a worker imports
(its base), unpickles the task of one shard and runs it up to the first image; `read` is what reading and coding all
images of the shard takes after that. It also runs on code before `ShardTask`, whose workers read the set themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MOST_CPU_S, MOST_MIB = 0.3, 40.0


def main() -> None:
    """Runs the measurement in a process of its own and prints one line, or JSON."""
    asked = _arguments()
    if asked.case:
        print(json.dumps(_worker(Path(asked.case))))
        return
    write_set(asked.folder / "set", asked.rows, asked.files)
    task = asked.folder / "task.pickle"
    _plan(asked.folder, asked.shard, task)
    done = subprocess.run(
        [sys.executable, __file__, "--case", str(task)], stdout=subprocess.PIPE, text=True, check=True
    )
    row = {"rows": asked.rows, "shard": asked.shard, "task_mib": task.stat().st_size / 2**20, **json.loads(done.stdout)}
    row["within_limits"] = row["cpu_s"] <= MOST_CPU_S and row["mib"] <= MOST_MIB
    if asked.json:
        print(json.dumps(row, indent=1))
        return
    print(
        f"{row['rows']:,} rows, a shard of {row['shard']:,}: {row['cpu_s']:.2f} CPU s and {row['mib']:.0f} MiB above "
        f"the base of {row['base_mib']:.0f} MiB before the first image (limits {MOST_CPU_S} s, {MOST_MIB:.0f} MiB); "
        f"task of {row['task_mib']:.1f} MiB; the shard then took {row['read_cpu_s']:.2f} CPU s"
    )


def write_set(folder: Path, num_rows: int, num_files: int) -> None:
    """A table of two classes whose rows name links to `num_files` images."""
    if (folder / "labels.csv").exists():
        return
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["file,label,patient"]
    for i in range(num_rows):
        path = folder / "images" / f"{i:06d}.png"
        if i < num_files:
            Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
        else:
            os.link(folder / "images" / f"{i % num_files:06d}.png", path)
        lines.append(f"images/{i:06d}.png,{'ab'[i % 2]},p{i // 4}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


def _plan(folder: Path, shard: int, target: Path) -> None:
    from data_shards import shard as shards
    from data_shards.config import DataConfig
    from data_shards.plan import plan_shards
    from data_shards.source import open_source
    from data_shards.store import open_store

    config = DataConfig(
        dataset="bench", layout="table", source=str(folder / "set"), group_column="patient", samples_per_shard=shard
    )
    images, out = open_source(config), open_store(str(folder / "store"))
    plan = plan_shards(images.rows, ["train"] * len(images.rows), config)[0]
    if hasattr(shards, "ShardTask"):
        task: Any = shards.ShardTask(images.reader, plan, config, images.task, out)
    else:
        task = (config, plan, out)
    target.write_bytes(pickle.dumps(task))


def _worker(path: Path) -> dict[str, float]:
    """Figures of one task; its first image is stopped at, by the decoder that all of them go through."""
    import data_shards.convert
    from data_shards import shard

    run: Callable[[Any], Any] = getattr(data_shards.convert, "write_one", shard.write_shard)
    data = path.read_bytes()
    marks: list[tuple[float, float]] = []
    decode = shard.stored

    def marked(*given: Any, **named: Any) -> Any:
        if not marks:
            marks.append((time.process_time(), _peak_mib()))
        return decode(*given, **named)

    shard.stored = marked  # type: ignore[assignment]
    base_mib, began = _peak_mib(), time.process_time()
    part = run(pickle.loads(data))
    (first, mib), ended = marks[0], time.process_time()
    assert len(part.samples), "the shard holds its images"
    return {"cpu_s": first - began, "mib": mib - base_mib, "base_mib": base_mib, "read_cpu_s": ended - first}


def _peak_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=200, help="images that the rows share")
    parser.add_argument("--shard", type=int, default=10_000, help="images of the shard")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/medmamba-shard-worker"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
