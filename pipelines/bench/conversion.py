"""The conversion half of `medmamba bench data`: writing files into shards, with this project and with alternatives.

Each writer runs in its own process (`main`) on the same images. The output is read back: every image must be there
exactly once, with the encoded bytes of its file. Only this project checks for duplicates and undecodable images, splits
by group, and survives a kill; its time includes that.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_shards.config import DataConfig
from data_shards.convert import convert
from data_shards.decode import stored_bytes
from data_shards.shard import read_samples
from data_shards.store import open_store
from pipelines.bench.work import Work, processor_s, read_work, send


def ours(work: Work, out: Path) -> None:
    """This project's conversion with duplicate checks, in local processes."""
    source = f"{work.folder}/images"
    config = DataConfig(
        dataset="bench", layout="table", source=source, split_column="split", duplicates={"datasets": "off"}
    )
    context = get_context("spawn")
    with ProcessPoolExecutor(work.workers, mp_context=context) as pool:
        convert(config, open_store(str(out)), run_tasks=lambda run, tasks: pool.map(run, tasks))


def _of_ours(out: Path) -> Iterator[bytes]:
    for path in sorted((out / "shards").glob("train-*.tar")):
        yield from (sample["image"] for sample in read_samples(path))


def _peer(name: str, *arguments: Any) -> Any:
    """Calls a function of peers/writers.py. Its imports may be missing, and so may peers/, which `submit` skips."""
    return getattr(importlib.import_module("pipelines.bench.peers.writers"), name)(*arguments)


WRITERS: dict[str, tuple[Callable[[Work, Path], None], Callable[[Path], Iterator[bytes]]]] = {
    "medmamba": (ours, _of_ours),
    "webdataset ShardWriter": (partial(_peer, "webdataset_writer"), partial(_peer, "of_tars")),
    "img2dataset writer": (partial(_peer, "img2dataset_writer"), partial(_peer, "of_tars")),
    "Ray Data": (partial(_peer, "ray_data"), partial(_peer, "of_tars")),
    "LitData optimize": (partial(_peer, "litdata_optimize"), partial(_peer, "of_litdata")),
    "MosaicML MDSWriter": (partial(_peer, "mosaic_streaming"), partial(_peer, "of_mosaic")),
}


def measure(name: str, work: Work) -> dict[str, Any]:
    """The figures of a writer: images_per_s, processor_s_per_1000 and bytes_written; or `why_not`."""
    write, read = WRITERS[name]
    with tempfile.TemporaryDirectory(dir=work.folder) as folder:
        return _measured(write, read, work, Path(folder), kept_as_is=name != "medmamba")


def _measured(
    write: Callable[[Work, Path], None],
    read: Callable[[Path], Iterator[bytes]],
    work: Work,
    out: Path,
    *,
    kept_as_is: bool,
) -> dict[str, Any]:
    began, before = time.perf_counter(), processor_s()
    try:
        write(work, out)
    except ImportError as error:
        return {"why_not": f"cannot be imported: {error}"}
    except Exception as error:  # broad: a writer of another project may raise anything; the others are still measured
        return {"why_not": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    seconds, used = time.perf_counter() - began, processor_s() - before
    if wrong := check(read(out), work, kept_as_is=kept_as_is):
        return {"why_not": f"wrong: {wrong}"}
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {
        "images_per_s": work.num / seconds,
        "processor_s_per_1000": 1000 * used / work.num,
        "bytes_written": written,
    }


def check(images: Iterator[bytes], work: Work, *, kept_as_is: bool) -> str:
    """What is wrong with the output; empty if it contains the bytes of each file exactly once.

    This project strips metadata from a file (`kept_as_is` False); its output is compared with the stripped bytes.
    """
    digest = hashlib.sha256
    expected = Counter(
        digest(data if kept_as_is else stored_bytes(data)[0]).digest() for data in (p.read_bytes() for p in work.files)
    )
    found = Counter(digest(data).digest() for data in images)
    missing, extra = (expected - found).total(), (found - expected).total()
    return f"{missing} images are missing and {extra} do not match any file" if missing or extra else ""


def main() -> None:
    """Measures the writer argv[1] on the work in the folder argv[2]; prints its figures as a line of JSON."""
    work = read_work(sys.argv[2])
    send({"why_not": "", **measure(sys.argv[1], work)})
