"""Shared by everything that `medmamba bench data` measures: the images, their checks, and the reports of processes."""

from __future__ import annotations

import io
import json
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from data_shards.config import DataConfig
from data_shards.convert import convert
from data_shards.loader.pixels import Crop, crop_boxes
from data_shards.manifest import Dataset, open_dataset
from data_shards.plan import sample_key
from data_shards.store import open_store

SEED = 0
DATASET = "bench"
_MARK = "medmamba bench: "
_TOLERANCE = 3.0  # for an image's mean, of 255 levels: decoding at reduced scale rounds differently
Delivered = Iterator[tuple[list[int], np.ndarray]]  # image numbers, and their pixels (B, H, W, 3)


@dataclass(frozen=True)
class Work:
    """The images in a folder, and how to load them."""

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
        """The image files by number."""
        return [Path(self.folder) / "images" / f"{number:06}.{self.ending}" for number in range(self.num)]

    @cached_property
    def boxes(self) -> list[tuple[int, int, int, int]] | None:
        """The crop of each image in the first epoch; None for uncropped images."""
        if not self.min_area:
            return None
        side = np.full(self.num, self.side)
        found = crop_boxes(Crop(self.min_area), side, side, seed=SEED, epoch=0, sample=self.positions)
        return [tuple(box) for box in found.tolist()]

    @cached_property
    def positions(self) -> np.ndarray:
        """The position of each image in the index of the shards: (num,) int64."""
        at = {key: position for position, key in enumerate(self.dataset.index("train").key.tolist())}
        return np.array([at[sample_key(DATASET, "", path.name, 0)] for path in self.files])

    def of_whole(self) -> Work:
        """A copy for uncropped images."""
        return replace(self, min_area=0.0)

    @property
    def dataset(self) -> Dataset:
        """The images as shards."""
        return open_dataset(f"{self.folder}/shards")

    def picture(self, number: int, data: bytes | Path) -> np.ndarray:
        """An image decoded by PIL, cropped and resized: (H, W, 3) uint8."""
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data).convert("RGB")
        if self.boxes is not None:
            image = image.crop(self.boxes[number])
        if image.size != (self.target, self.target):
            image = image.resize((self.target, self.target), Image.Resampling.BILINEAR)
        return np.asarray(image)


def make_images(work: Work) -> int:
    """Generates the images, writes them as files and as shards; returns the total size of the files in bytes.

    Smooth colors with a little noise: about 1.6 bits per pixel at quality 90, like the photographs of BCCD (1.57).
    """
    (Path(work.folder) / "images").mkdir(parents=True)
    chance = np.random.default_rng(SEED)
    # A dataset needs the other splits, too.
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
        dataset=DATASET,
        layout="table",
        source=f"{work.folder}/images",
        split_column="split",
        samples_per_shard=max(1, work.num // 8),
    )
    convert(config, open_store(f"{work.folder}/shards"))
    return sum(path.stat().st_size for path in work.files)


def summarize(epochs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The figures of a loader from its timed epochs; images_per_s is the median of their speeds."""
    speeds = [epoch["images"] / epoch["seconds"] for epoch in epochs]
    images = sum(epoch["images"] for epoch in epochs)
    return {
        "images_per_s": statistics.median(speeds),
        "images_per_s_of_epochs": speeds,
        "processor_s_per_1000": 1000 * sum(epoch["processor_s"] for epoch in epochs) / images,
    }


def check(delivered: Delivered, work: Work) -> str:
    """What is wrong with an epoch; empty if each image arrived exactly once and matches PIL's decoding."""
    times = np.zeros(work.num, np.int64)
    means = np.zeros(work.num)
    for numbers, images in delivered:
        np.add.at(times, numbers, 1)
        means[numbers] = images.reshape(len(images), -1).mean(1)
    if (times != 1).any():
        return f"{(times == 0).sum()} images never arrived and {(times > 1).sum()} arrived more than once"
    looked_at = range(0, work.num, max(1, work.num // 64))
    off = max(abs(work.picture(number, work.files[number]).mean() - means[number]) for number in looked_at)
    return f"an image is {off:.1f} of 255 brighter or darker than PIL's" if off > _TOLERANCE else ""


def processor_s() -> float:
    """Processor seconds of this process, its ended children, and its running descendants (such as Ray's)."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def send(values: dict[str, Any]) -> None:
    """Prints a line of JSON for the process that started this one."""
    print(_MARK + json.dumps(values), flush=True)


def received(line: str) -> dict[str, Any] | None:
    """The values in a line of `send`; None for output of a library."""
    if not line.startswith(_MARK):
        return None
    values: dict[str, Any] = json.loads(line.removeprefix(_MARK))
    return values


def save_work(work: Work) -> None:
    """Writes `work` to its folder, for `read_work`."""
    (Path(work.folder) / "work.json").write_text(json.dumps(asdict(work)))


def read_work(folder: str) -> Work:
    """The work that `save_work` wrote to this folder."""
    return Work(**json.loads((Path(folder) / "work.json").read_text()))
