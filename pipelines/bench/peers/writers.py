"""Writers of other projects for `medmamba bench data`; each library is imported only when it is measured."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.bench.work import Work

_SHARD_IMAGES = 1000  # for writers that count images
_SHARD_BYTES = "64MB"


def webdataset_writer(work: Work, out: Path) -> None:
    """webdataset's ShardWriter, one process per part of the files."""
    _in_parts(_webdataset_part, work, out)


def _webdataset_part(files: list[Path], out: Path, part: int) -> None:
    import webdataset as wds

    with wds.ShardWriter(f"{out}/{part}-%05d.tar", maxcount=_SHARD_IMAGES, verbose=0) as writer:
        for path in files:
            writer.write({"__key__": path.stem, path.suffix[1:]: path.read_bytes(), "cls": int(path.stem) % 2})


def img2dataset_writer(work: Work, out: Path) -> None:
    """img2dataset's writer of webdataset shards, without its downloader, one process per part of the files."""
    import img2dataset.writer  # noqa: F401 - raises here if it is missing, before processes start

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
    """MosaicML Streaming's MDSWriter, one process per part of the files."""
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


def of_tars(out: Path) -> Iterator[bytes]:
    """The encoded images in tars of webdataset samples."""
    for path in sorted(out.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                if info.name.endswith((".jpg", ".png")):
                    yield tar.extractfile(info).read()  # type: ignore[union-attr]


def of_mosaic(out: Path) -> Iterator[bytes]:
    """The encoded images in shards of MosaicML Streaming."""
    import streaming

    for folder in sorted(out.iterdir()):
        yield from (row["image"] for row in streaming.LocalDataset(str(folder)))


def of_litdata(out: Path) -> Iterator[bytes]:
    """The encoded images in chunks of LitData."""
    import litdata

    dataset = litdata.StreamingDataset(str(out))
    yield from (dataset[i]["image"] for i in range(len(dataset)))
