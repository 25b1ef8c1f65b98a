"""How many turned and shifted duplicates are found, and how many pairs of other images by mistake.

    python tests/bench/turned_duplicates.py FOLDER [--copies 800] [--json FILE]

FOLDER has any of breastmnist.npz, pneumoniamnist.npz and bccd_cells.tar; phantoms are drawn in any case. Of each set,
copies of some images are turned or shifted and added to it. Prints for each value of `data.duplicates.symmetries`
the share of copies that are found, and for `all` the pairs of the set's own images per 1,000 images that are found
beyond the near ones (to be looked at: most of them are duplicates), and the time of the search per image, without
fingerprinting. The exit code is 1 if less than 99 % of the symmetries, or less than 80 % of small turns and shifts are
found. The seeds are fixed.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_shards.config import PhantomConfig
from data_shards.duplicates.clusters import clusters_of
from data_shards.duplicates.fingerprint import Fingerprints, fingerprint, joined
from data_shards.source import Row
from data_shards.source.phantoms import draw_phantoms

NEAR = 12
Change = Callable[[Image.Image, np.random.Generator], Image.Image]


class Images:
    """A reader of images in memory."""

    def __init__(self, images: list[np.ndarray]):
        self._images = images
        self.rows = [Row(str(i), i, (0,), None, None) for i in range(len(images))]

    def read(self, row: Row) -> np.ndarray:
        """The pixels of a row."""
        return self._images[row.frame]

    def inside(self, row: Row) -> str:
        """Its name."""
        return row.where

    def stamp(self, row: Row) -> str:
        """Images in memory have none."""
        return ""


def main() -> int:
    """Prints a row for each set and kind of copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--copies", type=int, default=800)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    print(f"{'set':<15}{'images':>7}  {'copies':<22}{'off':>7}{'exact':>7}{'all':>7}{'own':>7}{'ms':>6}")
    for name, images in sets(options.folder):
        prints = prints_of(images)
        chosen = np.random.default_rng(0).permutation(len(images))[: options.copies].tolist()
        for what, change in CHANGES.items():
            result = measure(name, what, prints, [images[i] for i in chosen], chosen, change)
            results.append(result)
            print(
                f"{name:<15}{len(images):>7,}  {what:<22}{result['off']:>7.3f}{result['exact']:>7.3f}"
                f"{result['all']:>7.3f}{result['own']:>7.2f}{result['ms']:>6.2f}",
                flush=True,
            )
    print("own: pairs of the set's own images per 1,000 images beyond the near ones; ms per image of `all`")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    least = {"symmetries": ("exact", 0.99), "turns and shifts": ("all", 0.8)}
    return int(
        any(each[kind] < low for each in results for what, (kind, low) in least.items() if each["copies"] == what)
    )


def measure(
    name: str, what: str, prints: Fingerprints, images: list[np.ndarray], chosen: list[int], change: Change
) -> dict[str, Any]:
    """Shares of the copies that are found, pairs of other images, and time."""
    draws = np.random.default_rng(1)
    copies = [np.asarray(change(Image.fromarray(each), draws)) for each in images]
    added, num = prints_of(copies), len(prints)
    small = np.concatenate([each.thumbnails for each in (prints, added) if each.thumbnails is not None])
    both = replace(joined([prints, added]), thumbnails=small)
    clusters_of(prints, NEAR, "exact")  # compiled
    began = time.perf_counter()
    _, near, turned, shifted = clusters_of(both, NEAR, "all")
    spent = time.perf_counter() - began
    own = num_pairs(shifted[:num]) - num_pairs(near[:num])
    found = {"off": near, "exact": turned, "all": shifted}
    return {
        "set": name,
        "images": num,
        "copies": what,
        **{kind: float((each[num:] == each[chosen]).mean()) for kind, each in found.items()},
        "own": 1000 * own / num,
        "ms": 1e3 * spent / len(both),
    }


def num_pairs(clusters: np.ndarray) -> int:
    """Pairs of images in one cluster."""
    times = np.unique(clusters, return_counts=True)[1]
    return int((times * (times - 1) // 2).sum())


def prints_of(images: list[np.ndarray]) -> Fingerprints:
    """Their fingerprints."""
    reader = Images(images)
    return fingerprint(reader, reader.rows, thumbnails=True)


def sets(folder: Path) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Name and images of each set."""
    for name in ("breastmnist", "pneumoniamnist"):
        if (folder / f"{name}.npz").exists():
            with np.load(folder / f"{name}.npz") as arrays:
                yield name, [each for split in ("train", "val", "test") for each in arrays[f"{split}_images"]]
    if (folder / "bccd_cells.tar").exists():
        with tarfile.open(folder / "bccd_cells.tar") as tar:
            files = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")]
            yield "bccd", [np.asarray(Image.open(io.BytesIO(file.read()))) for file in files if file]
    drawn = draw_phantoms(PhantomConfig(num_patients=250), 0)
    yield "phantoms", [np.squeeze(drawn.reader.read(row)) for row in drawn.rows]


def symmetry(image: Image.Image, draws: np.random.Generator) -> Image.Image:
    """One of the seven that change an image."""
    return image.transpose(Image.Transpose(int(draws.integers(7))))


def symmetry_coded(image: Image.Image, draws: np.random.Generator) -> Image.Image:
    """The same, as JPEG."""
    data = io.BytesIO()
    symmetry(image, draws).save(data, "JPEG", quality=90)
    return Image.open(data)


def turn(image: Image.Image, draws: np.random.Generator) -> Image.Image:
    """Up to 5 degrees; the edge is continued."""
    return moved(image, draws.uniform(-5, 5), (0, 0))


def shift(image: Image.Image, draws: np.random.Generator) -> Image.Image:
    """Up to 5 % of each side."""
    return moved(image, 0, draws.uniform(-0.05, 0.05, 2))


def turn_and_shift(image: Image.Image, draws: np.random.Generator) -> Image.Image:
    """Both."""
    return moved(image, draws.uniform(-5, 5), draws.uniform(-0.05, 0.05, 2))


def moved(image: Image.Image, degrees: float, shares: Any) -> Image.Image:
    """Turned, then shifted by these shares of width and height."""
    width, height = image.size
    margin = max(width, height) // 4 + 2
    pixels = np.asarray(image)
    padded = np.pad(pixels, [(margin, margin)] * 2 + [(0, 0)] * (pixels.ndim - 2), mode="edge")
    by = (shares[0] * width, shares[1] * height)
    found = Image.fromarray(padded).rotate(degrees, Image.Resampling.BICUBIC, translate=by)
    return found.crop((margin, margin, margin + width, margin + height))


CHANGES: dict[str, Change] = {
    "symmetries": symmetry,
    "symmetries, JPEG 90": symmetry_coded,
    "turns to 5 degrees": turn,
    "shifts to 5 %": shift,
    "turns and shifts": turn_and_shift,
}

if __name__ == "__main__":
    sys.exit(main())
