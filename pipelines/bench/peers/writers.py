"""What `medmamba bench data` compares at conversion: files into shards, by this project and by what else a user takes.

Each is run in a process of its own (`python -m pipelines.bench.peers.writers NAME FOLDER`) on the same images. What it
wrote is then read again: every image must be there once, with the coded bytes of its file. Only this project looks for
copies and undecodable images, splits by group, and can be killed; its time includes that.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.config import DataConfig
from data_shards.convert import convert
from data_shards.decode import stored_bytes
from data_shards.shard import read_samples
from data_shards.store import open_store
from pipelines.bench.peers.loaders import Work, processor_s, tell

_SHARD_IMAGES = 1000  # of those that count images
_SHARD_BYTES = "64MB"


def ours(work: Work, out: Path) -> None:
    """This project's conversion, with the firewall, in local processes."""
    source = f"{work.folder}/images"
    config = DataConfig(dataset="bench", layout="csv", source=source, split_column="split", leaks={"datasets": "off"})
    context = get_context("spawn")
    with ProcessPoolExecutor(work.workers, mp_context=context) as pool:
        convert(config, open_store(str(out)), run_tasks=lambda run, tasks: pool.map(run, tasks))


def webdataset_writer(work: Work, out: Path) -> None:
    """webdataset's ShardWriter, a process for each part of the files."""
    _in_parts(_webdataset_part, work, out)


def _webdataset_part(files: list[Path], out: Path, part: int) -> None:
    import webdataset as wds

    with wds.ShardWriter(f"{out}/{part}-%05d.tar", maxcount=_SHARD_IMAGES, verbose=0) as writer:
        for path in files:
            writer.write({"__key__": path.stem, path.suffix[1:]: path.read_bytes(), "cls": int(path.stem) % 2})


def img2dataset_writer(work: Work, out: Path) -> None:
    """img2dataset's writer of webdataset shards, without its downloader, a process for each part of the files."""
    import img2dataset.writer  # noqa: F401 - that it is missing is to be known before processes start

    _in_parts(_img2dataset_part, work, out)


def _img2dataset_part(files: list[Path], out: Path, part: int) -> None:
    import pyarrow as pa
    from img2dataset.writer import WebDatasetSampleWriter

    schema = pa.schema([("key", pa.string()), ("label", pa.int64())])
    for number, start in enumerate(range(0, len(files), _SHARD_IMAGES)):
        writer = WebDatasetSampleWriter(part * 1000 + number, str(out), True, 5, schema)
        for path in files[start : start + _SHARD_IMAGES]:
            label = int(path.stem) % 2
            writer.write(path.read_bytes(), path.stem, str(label), {"key": path.stem, "label": label})
        writer.close()


def ray_data(work: Work, out: Path) -> None:
    """Ray Data: files read as bytes, written with write_webdataset."""
    from pipelines.cluster.ray_session import connect

    connect(num_cpus=work.workers)
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    ending = work.ending

    def named(row: dict[str, Any]) -> dict[str, Any]:
        return {"__key__": Path(row["path"]).stem, ending: row["bytes"]}

    read = ray.data.read_binary_files([str(path) for path in work.files], include_paths=True)
    read.map(named).write_webdataset(str(out), encoder=None)


def mosaic_streaming(work: Work, out: Path) -> None:
    """MosaicML Streaming's MDSWriter, a process for each part of the files."""
    import streaming  # noqa: F401 - as above

    _in_parts(_mosaic_part, work, out)


def _mosaic_part(files: list[Path], out: Path, part: int) -> None:
    import streaming

    columns = {"key": "str", "image": "bytes", "label": "int"}
    with streaming.MDSWriter(out=f"{out}/{part}", columns=columns, hashes=["sha256"]) as writer:
        for path in files:
            writer.write({"key": path.stem, "image": path.read_bytes(), "label": int(path.stem) % 2})


def litdata_optimize(work: Work, out: Path) -> None:
    """LitData's optimize."""
    import litdata

    litdata.optimize(_litdata_row, work.files, str(out), chunk_bytes=_SHARD_BYTES, num_workers=work.workers)


def _litdata_row(path: Path) -> dict[str, Any]:
    return {"key": path.stem, "image": path.read_bytes(), "label": int(path.stem) % 2}


def _in_parts(write: Callable[[list[Path], Path, int], None], work: Work, out: Path) -> None:
    parts = [list(part) for part in np.array_split(np.array(work.files, object), work.workers)]
    with ProcessPoolExecutor(work.workers, mp_context=get_context("spawn")) as pool:
        done = [pool.submit(write, part, out, number) for number, part in enumerate(parts)]
        for each in done:
            each.result()


def _of_tars(out: Path) -> Iterator[bytes]:
    for path in sorted(out.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                if info.name.endswith((".jpg", ".png")):
                    yield tar.extractfile(info).read()  # type: ignore[union-attr]


def _of_ours(out: Path) -> Iterator[bytes]:
    for path in sorted((out / "shards").glob("train-*.tar")):
        yield from (sample["image"] for sample in read_samples(path))


def _of_mosaic(out: Path) -> Iterator[bytes]:
    import streaming

    for folder in sorted(out.iterdir()):
        yield from (row["image"] for row in streaming.LocalDataset(str(folder)))


def _of_litdata(out: Path) -> Iterator[bytes]:
    import litdata

    dataset = litdata.StreamingDataset(str(out))
    yield from (dataset[i]["image"] for i in range(len(dataset)))


WRITERS: dict[str, tuple[Callable[[Work, Path], None], Callable[[Path], Iterator[bytes]]]] = {
    "medmamba": (ours, _of_ours),
    "webdataset ShardWriter": (webdataset_writer, _of_tars),
    "img2dataset writer": (img2dataset_writer, _of_tars),
    "Ray Data": (ray_data, _of_tars),
    "LitData optimize": (litdata_optimize, _of_litdata),
    "MosaicML MDSWriter": (mosaic_streaming, _of_mosaic),
}


def measure(name: str, work: Work) -> dict[str, Any]:
    """The figures of a writer: images/s, its processor time and bytes written; or `why_not`."""
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
    except Exception as error:
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
    """What is wrong with what was written; empty where the bytes of each file are there just once.

    This project cuts metadata out of a file (`kept_as_is` False), and is held to what is left then.
    """
    digest = hashlib.sha256
    expected = Counter(
        digest(data if kept_as_is else stored_bytes(data)[0]).digest() for data in (p.read_bytes() for p in work.files)
    )
    found = Counter(digest(data).digest() for data in images)
    missing, extra = (expected - found).total(), (found - expected).total()
    return f"{missing} images are missing and {extra} are none of the files" if missing or extra else ""


def main() -> None:
    """Measures one writer on the work that lies in a folder; told as a line of JSON."""
    work = Work(**json.loads((Path(sys.argv[2]) / "work.json").read_text()))
    tell({"why_not": "", **measure(sys.argv[1], work)})


if __name__ == "__main__":
    main()
