"""Loaders of other projects for `medmamba bench data`; each library is imported only when it is measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.plan import sample_key
from pipelines.bench.work import DATASET, SEED, Delivered, Work


def torch_loader(work: Work) -> Callable[[int], Delivered]:
    """torch's DataLoader over files that PIL decodes, as an ImageFolder is read."""
    import torch

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return work.num

        def __getitem__(self, number: int) -> tuple[int, torch.Tensor]:
            return number, torch.from_numpy(work.picture(number, work.files[number]).copy())

    loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
        Files(), work.batch, shuffle=True, num_workers=work.workers, persistent_workers=work.workers > 0
    )
    return lambda epoch: ((numbers.tolist(), images.numpy()) for numbers, images in loader)


def webdataset_pipeline(work: Work) -> Callable[[int], Delivered]:
    """webdataset's own pipeline over the same shards, with its buffer shuffle."""
    import webdataset as wds

    numbers = {sample_key(DATASET, "", path.name, 0): number for number, path in enumerate(work.files)}

    def made(sample: dict[str, Any]) -> tuple[int, np.ndarray]:
        number = numbers[sample["__key__"]]
        return number, work.picture(number, sample[work.ending])

    urls = sorted(str(path) for path in Path(work.folder, "shards", "shards").glob("train-*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=len(urls), seed=SEED).shuffle(1000).map(made)
    loader = wds.WebLoader(
        dataset.batched(work.batch), batch_size=None, num_workers=work.workers, persistent_workers=work.workers > 0
    )
    return lambda epoch: ((list(map(int, numbers)), np.asarray(images)) for numbers, images in loader)


def ray_data(work: Work) -> Callable[[int], Delivered]:
    """Ray Data over the files."""
    from pipelines.cluster.ray_session import connect

    connect(num_cpus=work.workers)
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False

    def made(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        numbers = [int(Path(path).stem) for path in rows["path"]]
        pictures = [work.picture(*pair) for pair in zip(numbers, rows["bytes"].tolist(), strict=True)]
        return {"number": np.array(numbers), "image": np.stack(pictures)}

    def epoch(number: int) -> Delivered:
        paths = [str(path) for path in work.files]
        read = ray.data.read_binary_files(paths, include_paths=True, shuffle="files")
        for rows in read.map_batches(made, batch_size=work.batch).iter_batches(batch_size=work.batch):
            yield rows["number"].tolist(), rows["image"]

    return epoch


def litdata_loader(work: Work) -> Callable[[int], Delivered]:
    """LitData over a copy in its own format."""
    import litdata

    out = f"{work.folder}/litdata"
    litdata.optimize(partial(_litdata_row, work.files), list(range(work.num)), out, chunk_bytes="64MB", num_workers=1)

    dataset = litdata.StreamingDataset(out, shuffle=True, drop_last=False, transform=partial(_litdata_picture, work))
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=work.batch, num_workers=work.workers, persistent_workers=work.workers > 0
    )
    return lambda epoch: ((numbers.tolist(), images.numpy()) for numbers, images in loader)


def _litdata_row(files: list[Path], number: int) -> dict[str, Any]:
    return {"number": number, "image": files[number].read_bytes()}


def _litdata_picture(work: Work, row: dict[str, Any]) -> tuple[int, np.ndarray]:
    return row["number"], work.picture(row["number"], row["image"])


def mosaic_streaming(work: Work) -> Callable[[int], Delivered]:
    """MosaicML Streaming over a copy in its own format."""
    import streaming
    import torch

    out = f"{work.folder}/mosaic"
    with streaming.MDSWriter(out=out, columns={"number": "int", "image": "bytes"}) as writer:
        for number, path in enumerate(work.files):
            writer.write({"number": number, "image": path.read_bytes()})

    class Pictures(streaming.StreamingDataset):
        def __getitem__(self, at: int) -> tuple[int, torch.Tensor]:
            row = super().__getitem__(at)
            return row["number"], torch.from_numpy(work.picture(row["number"], row["image"]).copy())

    dataset = Pictures(local=out, shuffle=True, batch_size=work.batch)
    loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
        dataset, batch_size=work.batch, num_workers=work.workers, persistent_workers=work.workers > 0
    )
    return lambda epoch: ((numbers.tolist(), images.numpy()) for numbers, images in loader)
