"""What `medmamba bench data` compares at loading: this project's loader and what else a user would take.

Each is run in a process of its own (`main`) on the same images and, in its first epoch, the same random parts of them.
That epoch starts the workers and is checked: every image delivered exactly
once, and as the picture that PIL makes of it. A loader that fails has no speed, but a reason.
"""

from __future__ import annotations

import io
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_shards.config import DataConfig
from data_shards.convert import convert
from data_shards.loader.pixels import Crop, crop_boxes
from data_shards.manifest import open_dataset
from data_shards.plan import sample_key
from data_shards.store import open_store

SEED = 0
_DATASET = "bench"
_MARK = "medmamba bench: "
_TOLERANCE = 3.0  # of the mean of an image, in levels of 255: decoding at reduced scale rounds differently
Delivered = Iterator[tuple[list[int], np.ndarray]]  # numbers of the images, and their pixels (B, H, W, 3)


@dataclass(frozen=True)
class Work:
    """The images in a folder, and what is to be made of them."""

    folder: str
    num: int
    side: int
    ending: str
    target: int
    min_area: float
    batch: int
    workers: int
    repeats: int

    @cached_property
    def files(self) -> list[Path]:
        """The images by their number."""
        return [Path(self.folder) / "images" / f"{number:06}.{self.ending}" for number in range(self.num)]

    @cached_property
    def boxes(self) -> list[tuple[int, int, int, int]] | None:
        """The part of each image in the first epoch; None where whole images are wanted."""
        if not self.min_area:
            return None
        side = np.full(self.num, self.side)
        found = crop_boxes(Crop(self.min_area), side, side, seed=SEED, epoch=0, sample=self.positions)
        return [tuple(box) for box in found.tolist()]

    @cached_property
    def positions(self) -> np.ndarray:
        """Where each image stands in the index of the shards."""
        at = {key: position for position, key in enumerate(self.dataset.index("train").key.tolist())}
        return np.array([at[sample_key(_DATASET, "", path.name, 0)] for path in self.files])

    def of_whole(self) -> Work:
        """The same images, of which no part is taken."""
        return replace(self, min_area=0.0)

    @property
    def dataset(self):
        """The images as shards."""
        return open_dataset(f"{self.folder}/shards")

    def picture(self, number: int, data: bytes | Path) -> np.ndarray:
        """What PIL makes of an image: the pixels (H, W, 3)."""
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data).convert("RGB")
        if self.boxes is not None:
            image = image.crop(self.boxes[number])
        if image.size != (self.target, self.target):
            image = image.resize((self.target, self.target), Image.Resampling.BILINEAR)
        return np.asarray(image)


def make_images(work: Work) -> int:
    """Draws the images, writes them as files and as shards; returns their coded bytes.

    Smooth colours with a little noise: at quality 90 about 1.6 bits a pixel, like the photographs of BCCD (1.57).
    """
    (Path(work.folder) / "images").mkdir(parents=True)
    chance = np.random.default_rng(SEED)
    # A dataset must have the other splits, too.
    others = [f"{split}{number}.{work.ending}" for split in ("val", "test") for number in range(2)]
    rows = []
    for number, path in enumerate([*work.files, *(work.files[0].with_name(name) for name in others)]):
        rough = Image.fromarray(chance.integers(0, 256, (work.side // 21 + 7,) * 2 + (3,), dtype=np.uint8))
        smooth = np.asarray(rough.resize((work.side, work.side), Image.Resampling.BICUBIC), np.float32)
        pixels = np.clip(smooth + chance.normal(0, 2.5, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=90)
        split = "train" if number < work.num else path.stem.rstrip("01")
        rows.append(f"{path.name},{number % 2},{split}")
    (Path(work.folder) / "images" / "images.csv").write_text("\n".join(["file,label,split", *rows]) + "\n")
    config = DataConfig(
        dataset=_DATASET,
        layout="csv",
        source=f"{work.folder}/images",
        split_column="split",
        samples_per_shard=max(1, work.num // 8),
    )
    convert(config, open_store(f"{work.folder}/shards"))
    return sum(path.stat().st_size for path in work.files)


def ours(work: Work) -> Callable[[int], Delivered]:
    """This project's loader, from shards, nothing kept in memory."""
    from data_shards.loader import BatchPlan
    from data_shards.loader import Loader as ShardLoader

    loader = ShardLoader(work.dataset, workers=work.workers, processes=True, cache_bytes=0)
    number_at = np.empty(work.num, np.int64)
    number_at[work.positions] = np.arange(work.num)
    crop = Crop(work.min_area) if work.min_area else None
    plan = BatchPlan("train", work.batch, work.target, train=True, seed=SEED, crop=crop)

    def epoch(number: int) -> Delivered:
        for batch in loader.epoch(plan, number):
            yield number_at[batch.index].tolist(), batch.images

    return epoch


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

    numbers = {sample_key(_DATASET, "", path.name, 0): number for number, path in enumerate(work.files)}

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


LOADERS: dict[str, Callable[[Work], Callable[[int], Delivered]]] = {
    "medmamba": ours,
    "DataLoader over PIL": torch_loader,
    "webdataset": webdataset_pipeline,
    "Ray Data": ray_data,
    "LitData": litdata_loader,
    "MosaicML Streaming": mosaic_streaming,
}


class Loader:
    """A loader that has started its workers and delivered a first, right epoch; or `why_not`."""

    def __init__(self, name: str, work: Work):
        self.why_not = ""
        try:
            self._epoch = LOADERS[name](work)
        except ImportError as error:
            self.why_not = f"cannot be imported: {error}"
        except RuntimeError as error:  # torchvision beside a torch it was not built for
            self.why_not = f"cannot be imported: {' '.join(str(error).split())}"
        else:
            if wrong := check(self._epoch(0), work):
                self.why_not = f"wrong: {wrong}"
        self._next = 1

    def time_epoch(self) -> dict[str, float]:
        """Reads one more epoch: its images, seconds, and seconds of processor time of all its processes."""
        began, before = time.perf_counter(), processor_s()
        delivered = sum(len(numbers) for numbers, _ in self._epoch(self._next))
        self._next += 1
        found = {"images": delivered, "seconds": time.perf_counter() - began}
        return {**found, "processor_s": processor_s() - before}


def summarise(epochs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The figures of a loader from its timed epochs; the median of their speeds counts."""
    speeds = [epoch["images"] / epoch["seconds"] for epoch in epochs]
    images = sum(epoch["images"] for epoch in epochs)
    return {
        "images_per_s": statistics.median(speeds),
        "images_per_s_of_epochs": speeds,
        "processor_s_per_1000": 1000 * sum(epoch["processor_s"] for epoch in epochs) / images,
    }


def check(delivered: Delivered, work: Work) -> str:
    """What is wrong with an epoch; empty where each image came once and is the picture that PIL makes."""
    times = np.zeros(work.num, np.int64)
    means = np.zeros(work.num)
    for numbers, images in delivered:
        np.add.at(times, numbers, 1)
        means[numbers] = images.reshape(len(images), -1).mean(1)
    if (times != 1).any():
        return f"{(times == 0).sum()} images never came and {(times > 1).sum()} more than once"
    looked_at = range(0, work.num, max(1, work.num // 64))
    off = max(abs(work.picture(number, work.files[number]).mean() - means[number]) for number in looked_at)
    return f"an image is {off:.1f} of 255 brighter or darker than PIL's" if off > _TOLERANCE else ""


def processor_s() -> float:
    """Processor time of this process, of all that it started and that has ended, and of what still runs (Ray's)."""
    import psutil

    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def main() -> None:
    """The loader argv[1] on the work in the folder argv[2]: a line of JSON when it is ready, and one for each epoch.

    An epoch is read for each line of standard input, so that loaders that are compared can take turns.
    """
    work = Work(**json.loads((Path(sys.argv[2]) / "work.json").read_text()))
    loader = Loader(sys.argv[1], work)
    tell({"why_not": loader.why_not})
    if not loader.why_not:
        for _ in sys.stdin:
            tell(loader.time_epoch())


def tell(values: dict[str, Any]) -> None:
    """A line for whoever started this process."""
    print(_MARK + json.dumps(values), flush=True)


def told_in(line: str) -> dict[str, Any] | None:
    """What a line of `tell` says; None for what a library printed."""
    return json.loads(line.removeprefix(_MARK)) if line.startswith(_MARK) else None


def save_work(work: Work) -> None:
    """Writes down what `main` reads."""
    (Path(work.folder) / "work.json").write_text(json.dumps(asdict(work)))
