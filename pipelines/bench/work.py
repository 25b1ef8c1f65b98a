"""What `medmamba bench data` measures with: the images, what is checked of them, and how processes report.

Those that are measured, of this project and of others, share this and nothing else.
"""

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
from PIL import Image

from data_shards.config import DataConfig
from data_shards.convert import convert
from data_shards.loader.pixels import Crop, crop_boxes
from data_shards.manifest import open_dataset
from data_shards.plan import sample_key
from data_shards.store import open_store

SEED = 0
DATASET = "bench"
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
        return np.array([at[sample_key(DATASET, "", path.name, 0)] for path in self.files])

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
        dataset=DATASET,
        layout="table",
        source=f"{work.folder}/images",
        split_column="split",
        samples_per_shard=max(1, work.num // 8),
    )
    convert(config, open_store(f"{work.folder}/shards"))
    return sum(path.stat().st_size for path in work.files)


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


def tell(values: dict[str, Any]) -> None:
    """A line for whoever started this process."""
    print(_MARK + json.dumps(values), flush=True)


def told_in(line: str) -> dict[str, Any] | None:
    """What a line of `tell` says; None for what a library printed."""
    return json.loads(line.removeprefix(_MARK)) if line.startswith(_MARK) else None


def save_work(work: Work) -> None:
    """Writes down what `main` reads."""
    (Path(work.folder) / "work.json").write_text(json.dumps(asdict(work)))


def read_work(folder: str) -> Work:
    """The work that `save_work` wrote down in this folder."""
    return Work(**json.loads((Path(folder) / "work.json").read_text()))
