"""What a conversion that did not finish leaves of its look at the images, and what the next try takes from it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny_sets import coded, npz_config, pixels

from data_shards.config import DataConfig, DuplicatesConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.duplicates.scan import FOLDER, scan_rows
from data_shards.store import Store, open_store


class Looks:
    """Runs tasks as `map` does, and counts the images that are looked at."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, run, tasks):
        self.images += sum(len(task.rows) for task in tasks) if run is scan_rows else 0
        return map(run, tasks)


def looked_at(config: DataConfig, out: Store, *, refused: bool = False) -> int:
    looks = Looks()
    if refused:
        with pytest.raises(ValueError):
            convert(config, out, run_tasks=looks)
    else:
        convert(config, out, run_tasks=looks)
    return looks.images


def write_leaking(folder: Path, num: int = 24) -> DataConfig:
    """A table of two classes whose splits share one image, so that a conversion is refused."""
    folder.mkdir(parents=True)
    lines = ["file,label,split"]
    for i in range(num):
        number = 0 if i == 1 else i  # 0 is in train and in val
        (folder / f"{i}.png").write_bytes(coded(pixels(number)))
        lines.append(f"{i}.png,{'ab'[i // 3 % 2]},{('train', 'val', 'test')[i % 3]}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return DataConfig(dataset="own", layout="table", source=str(folder), split_column="split")


@pytest.fixture
def refused(tmp_path) -> tuple[DataConfig, Store]:
    config, out = write_leaking(tmp_path / "set"), open_store(str(tmp_path / "datasets/own/default"))
    assert looked_at(config, out, refused=True) == 24
    return config, out


@pytest.mark.parametrize(
    "changes",
    [
        {"duplicates": DuplicatesConfig(across="drop")},
        {"duplicates": DuplicatesConfig(across="move", near=0)},
        {"split_column": "", "seed": 7, "val_fraction": 0.3},
        {"duplicates": DuplicatesConfig(across="report"), "max_quarantine": 0.5, "samples_per_shard": 5},
        {"duplicates": DuplicatesConfig(across="report"), "classes": ("b", "a")},
    ],
    ids=["drop", "move", "drawn splits", "other shards", "other order of classes"],
)
def test_a_retry_with_other_settings_scans_no_image_again(refused, changes):
    config, out = refused
    again = config.model_copy(update=changes)
    fresh = open_store(f"{out.uri}-fresh")
    assert looked_at(again, out) == 0
    assert looked_at(again, fresh) == 24
    for key in ("manifest.json", "samples.parquet", "fingerprints.parquet", "leakage.json"):
        assert out.get(key) == fresh.get(key)
    assert list(out.list(FOLDER)) == []


def test_a_try_under_another_name_finds_the_fingerprints_too(refused):
    config, out = refused
    again = config.model_copy(update={"name": "second", "duplicates": DuplicatesConfig(across="drop")})
    assert looked_at(again, open_store(out.uri.removesuffix("default") + "second")) == 0


@pytest.mark.parametrize("changes", [{"max_side": 8}, {"salt": "s"}], ids=["smaller images", "salt"])
def test_settings_of_fingerprints_or_names_rescan_all_images(refused, changes):
    config, out = refused
    again = config.model_copy(update={"duplicates": DuplicatesConfig(across="report"), **changes})
    assert looked_at(again, out) == 24


def test_only_replaced_or_added_images_are_scanned_again(refused):
    config, out = refused
    folder = Path(config.source)
    old = (folder / "1.png").stat()
    (folder / "1.png").write_bytes(coded(pixels(500)))
    os.utime(folder / "1.png", ns=(old.st_atime_ns, old.st_mtime_ns))  # as `cp -p` sets it
    (folder / "24.png").write_bytes(coded(pixels(24)))
    with (folder / "labels.csv").open("a") as table:
        table.write("24.png,a,train\n")
    assert looked_at(config, out) == 2


def test_a_removed_duplicate_rescans_no_other_image(refused):
    config, out = refused
    table = Path(config.source, "labels.csv")
    table.write_text("".join(line for line in table.read_text().splitlines(True) if not line.startswith("1.png")))
    (Path(config.source) / "1.png").unlink()
    assert looked_at(config, out) == 0


def test_an_image_that_could_not_be_decoded_is_looked_at_again(tmp_path):
    config = write_leaking(tmp_path / "set")
    Path(config.source, "1.png").write_bytes(b"torn")
    out = open_store(str(tmp_path / "out"))
    assert looked_at(config, out, refused=True) == 24  # one of 24 is above max_quarantine
    assert looked_at(config, out, refused=True) == 1
    assert looked_at(config.model_copy(update={"max_quarantine": 0.1}), out) == 1


def test_tables_naming_different_files_alike_share_nothing(tmp_path):
    write_leaking(tmp_path / "set/one")
    two = write_leaking(tmp_path / "set/two")
    for i in range(24):
        Path(two.source, f"{i}.png").write_bytes(coded(pixels(100 + i)))
    config = two.model_copy(update={"source": str(tmp_path / "set"), "csv": "one/labels.csv"})
    out = open_store(str(tmp_path / "out"))
    assert looked_at(config, out, refused=True) == 24
    assert looked_at(config.model_copy(update={"csv": "two/labels.csv"}), out) == 24


@pytest.mark.parametrize("kind", ["zip", "npz", "s3"])
def test_archive_and_object_fingerprints_last_until_replaced(tmp_path, request, kind):
    config, out = write_leaking(tmp_path / "set"), open_store(str(tmp_path / "out"))
    remote = open_store(f"{request.getfixturevalue('s3')}/set") if kind == "s3" else None

    def publish(number: int) -> DataConfig:
        """The set with another image in place of its second."""
        Path(config.source, "1.png").write_bytes(coded(pixels(number)))
        files = sorted(Path(config.source).iterdir())
        if kind == "zip":
            with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
                for path in files:
                    archive.write(path, path.name)
            return config.model_copy(update={"source": str(tmp_path / "set.zip")})
        if kind == "npz":
            source = npz_config(tmp_path / "npz", num={"train": 10, "val": 7, "test": 7})
            arrays = dict(np.load(source.source))
            arrays["train_images"][0] = arrays["val_images"][0] if number == 0 else number
            np.savez(source.source, **arrays)
            return source.model_copy(update={"duplicates": DuplicatesConfig(across="refuse")})
        for path in files:
            remote.put(path.name, path)
        return config.model_copy(update={"source": remote.uri})

    first = publish(0)
    assert looked_at(first, out, refused=True) == 24
    assert looked_at(first, out, refused=True) == 0
    # Of an .npz a part cannot be replaced alone.
    assert looked_at(publish(77), out) == (24 if kind == "npz" else 1)


def test_phantoms_of_another_seed_are_other_images(tmp_path):
    phantoms = PhantomConfig(num_patients=12, images_per_patient=2, side=32)
    out = open_store(str(tmp_path / "out"))

    def stopped(run, tasks):
        yield from map(run, tasks)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(DataConfig(phantoms=phantoms), out, run_tasks=stopped)
    assert looked_at(DataConfig(phantoms=phantoms, seed=1), out) == 24


def test_ctrl_c_keeps_what_was_looked_at_until_then(tmp_path):
    config, out = npz_config(tmp_path), open_store(str(tmp_path / "out"))

    def stopped(run, tasks):
        yield run(tasks[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(config, out, run_tasks=stopped)
    assert looked_at(config, out) == 73 - 32


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-40], lambda data: b"", lambda data: b"no archive"], ids=["cut", "empty", "other"]
)
def test_damaged_fingerprints_are_made_again(refused, damage):
    config, out = refused
    for key in list(out.list(FOLDER)):
        out.put(key, damage(out.get(key)))
    assert looked_at(config.model_copy(update={"duplicates": DuplicatesConfig(across="drop")}), out) == 24


def test_no_file_name_is_kept_with_the_fingerprints(refused):
    _, out = refused
    kept = [out.get(key) for key in out.list(FOLDER)]
    assert kept
    assert not any(b".png" in data for data in kept)
