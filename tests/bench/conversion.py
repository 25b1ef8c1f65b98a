"""A set of the size of the paper's, 411,007 images of 28 px, into shards on a local Ray: time, memory, what was found.

    python tests/bench/conversion.py --real breastmnist.npz pneumoniamnist.npz [--images 41100 411007] [--workers 1 2]
        [--stores file s3] [--folder /tmp/conversion] [--json]

Every image is a seeded crop of a real one, turned over by chance and with noise, so that no two are copies; then 1,000
(of 411,007; fewer of fewer) are replaced by exact copies of others. Each case runs in a process of its own, with a Ray
of its own; `s3` is moto over HTTP on the same machine, whose CPU is shared with the workers. A second run follows each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np

SIDE = 28


def main() -> None:
    """Runs the cases and prints a table, or JSON."""
    asked = _arguments()
    if asked.case:
        print(json.dumps(_case(json.loads(asked.case))))
        return
    asked.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for num in asked.images:
        source = asked.folder / f"{num}.npz"
        if not source.exists():
            make_set([str(path) for path in asked.real], num, source)
        for store in asked.stores:
            for workers in asked.workers:
                rows.append(_in_a_process(source, num, store, workers, asked.folder))
                print(_told(rows[-1]), file=sys.stderr, flush=True)
    if asked.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(_told(row))


def make_set(real: list[str], num: int, target: Path) -> None:
    """Writes `num` images in the layout of MedMNIST, with num // 411 planted copies (1,000 of 411,007)."""
    arrays = [np.load(path) for path in real]
    sources = np.concatenate([a[f"{split}_images"] for a in arrays for split in ("train", "val", "test")])
    rng = np.random.default_rng(0)
    images = np.concatenate([_altered(sources, min(8192, num - i), rng) for i in range(0, num, 8192)])
    copies = rng.choice(num, 2 * (num // 411), replace=False).reshape(2, -1)
    images[copies[0]] = images[copies[1]]
    labels = rng.integers(0, 2, (num, 1)).astype(np.uint8)
    labels[copies[0]] = labels[copies[1]]
    ends = np.split(np.arange(num), [int(0.7 * num), int(0.8 * num)])
    names = ("train", "val", "test")
    parts = {f"{name}_images": images[part] for name, part in zip(names, ends, strict=True)}
    np.savez(target, **parts, **{f"{n}_labels": labels[part] for n, part in zip(names, ends, strict=True)})


def _altered(sources: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """Crops of 18 to 26 of 28 px, enlarged to 28 px bilinearly, half of them turned over, noise of 6 grey levels."""
    images = sources[rng.integers(0, len(sources), num)].astype(np.float32)
    side = rng.integers(18, 27, num)
    step = (np.arange(SIDE)[None] + 0.5) / SIDE * side[:, None] - 0.5
    rows, columns = (
        np.clip(step + (rng.random(num) * (SIDE - side + 1)).astype(int)[:, None], 0, SIDE - 1) for _ in range(2)
    )
    turned = rng.random(num) < 0.5
    columns[turned] = columns[turned][:, ::-1]
    low_y, low_x = np.floor(rows).astype(int), np.floor(columns).astype(int)
    high_y, high_x = np.minimum(low_y + 1, SIDE - 1), np.minimum(low_x + 1, SIDE - 1)
    y, x = (rows - low_y)[:, :, None], (columns - low_x)[:, None]
    i = np.arange(num)[:, None, None]

    def between(at_y: np.ndarray) -> np.ndarray:
        left, right = (images[i, at_y[:, :, None], at_x[:, None]] for at_x in (low_x, high_x))
        return left * (1 - x) + right * x

    found = between(low_y) * (1 - y) + between(high_y) * y + rng.normal(0, 6, images.shape)
    return np.clip(np.rint(found), 0, 255).astype(np.uint8)


def _in_a_process(source: Path, num: int, store: str, workers: int, folder: Path) -> dict:
    env, server, uri = dict(os.environ), None, str(folder / "store")
    if store == "s3":
        server, endpoint = _s3_server()
        env |= {
            **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "bench"),
            "AWS_ENDPOINT_URL_S3": endpoint, "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        uri = "s3://bench"
    shutil.rmtree(folder / "store", ignore_errors=True)
    case = {"source": str(source), "images": num, "store": store, "workers": workers, "uri": uri}
    try:
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        if server is not None:
            server.terminate()
            server.wait()


def _s3_server() -> tuple[subprocess.Popen, str]:
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(sys.executable).parent / "moto_server")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], **quiet)  # type: ignore[call-overload]
    endpoint = f"http://127.0.0.1:{port}"
    for _ in range(100):
        try:
            urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=2)
            break
        except OSError:
            time.sleep(0.2)
    keys = {"aws_access_key_id": "bench", "aws_secret_access_key": "bench", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=endpoint, **keys).create_bucket(Bucket="bench")
    return server, endpoint


def _case(case: dict) -> dict:
    """One conversion, and a second run of it."""
    from data_shards.config import DataConfig, DuplicatesConfig
    from data_shards.convert import convert
    from data_shards.store import open_store
    from pipelines.cluster import ray_session
    from pipelines.steps.shard import ray_map

    # Copies stand in different splits by chance, and the set's splits are its own: reported, not refused.
    config = DataConfig(
        dataset="large", layout="npz", source=case["source"], duplicates=DuplicatesConfig(across="report")
    )
    out = open_store(case["uri"]).at("datasets/large/default")
    began = time.monotonic()
    ray_session.connect(num_cpus=case["workers"])
    ray_start_s = time.monotonic() - began
    marks: dict[str, float] = {}

    def progress(done: int, total: int, unit: str) -> None:
        marks.setdefault(unit, time.monotonic())

    cpu, began = _cpu_s(), time.monotonic()
    facts = convert(config, out, run_tasks=ray_map, progress=progress)
    ended = time.monotonic()
    again_began = time.monotonic()
    again = convert(config, out, run_tasks=ray_map)
    assert again == {**facts, "made": 0, "kept": facts["num_shards"]}, "a second run finds what the first one made"
    looked, planned = marks["images"], marks["shards"]
    return {
        **{name: case[name] for name in ("images", "store", "workers")},
        "ray_start_s": ray_start_s,
        "seconds": ended - began,
        "open_s": looked - began,
        "scan_and_plan_s": planned - looked,
        "shards_s": ended - planned,
        "second_run_s": time.monotonic() - again_began,
        "us_per_image": 1e6 * (ended - began) / case["images"],
        "driver_cpu_s": _cpu_s() - cpu,
        "driver_peak_mib": _peak_mib(os.getpid()),
        "worker_peak_mib": max((_peak_mib(pid) for pid in _workers()), default=0.0),
        "megabytes": facts["bytes"] / 1e6,
        "shards": facts["num_shards"],
        "leaks": facts["leaks"],
    }


def _cpu_s() -> float:
    return time.process_time()


def _workers() -> list[int]:
    """Processes that ran our tasks on this machine under this driver's Ray."""
    import ray

    session = ray._private.worker._global_node.get_session_dir_path()
    logs = list(Path(session, "logs").glob("worker-*.out"))
    pids = {int(log.stem.rpartition("-")[2]) for log in logs}
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def _peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(line.split()[1]) / 1024


def _told(row: dict) -> str:
    return (
        f"{row['images']:,} images, {row['store']}, {row['workers']} workers: {row['seconds']:.1f} s "
        f"({row['us_per_image']:.0f} us an image; open {row['open_s']:.1f}, look {row['scan_and_plan_s']:.1f}, shards "
        f"{row['shards_s']:.1f}), again {row['second_run_s']:.1f} s, driver {row['driver_peak_mib']:.0f} MiB and "
        f"{row['driver_cpu_s']:.0f} CPU s, worker {row['worker_peak_mib']:.0f} MiB, {row['megabytes']:.0f} MB in "
        f"{row['shards']} shards, copies {row['leaks']}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, nargs="+", default=[], help=".npz files with real images of 28 px")
    parser.add_argument("--images", type=int, nargs="+", default=[41_100, 411_007])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stores", nargs="+", choices=("file", "s3"), default=["file", "s3"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/medmamba-conversion"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if not asked.case and not asked.real:
        parser.error("--real names no file: give MedMNIST .npz files of 28 px")
    return asked


if __name__ == "__main__":
    main()
