"""A finished dataset read again: whole ones pass, and every kind of damage is told with its place."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from tiny_sets import coded, npz_config, pixels

from data_shards.contact_sheet import chosen, sheet
from data_shards.convert import convert
from data_shards.duplicates.scan import FINGERPRINTS
from data_shards.manifest import INDEX, MANIFEST, Manifest, manifest_digest, open_dataset
from data_shards.shard import tar_key
from data_shards.store import open_store
from data_shards.verify import verify


@pytest.fixture
def store(tmp_path):
    out = open_store(str(tmp_path / "out"))
    convert(npz_config(tmp_path), out)
    return out


def rewritten(store, name: str, change) -> None:
    """The shard with every member changed by `change(name, data)`, under a manifest that promises just these bytes."""
    buffer = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(store.get(tar_key(name)))) as old,
        tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as new,
    ):
        for position, info in enumerate(old):
            data = change(position, info.name, old.extractfile(info).read())
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()
    store.put(tar_key(name), data)
    manifest = Manifest.model_validate_json(store.get(MANIFEST))
    entries = tuple(
        e.model_copy(update={"bytes": len(data), "sha256": manifest_digest(data)}) if e.name == name else e
        for e in manifest.shards
    )
    store.put(MANIFEST, manifest.model_copy(update={"shards": entries}).model_dump_json().encode())


def test_a_whole_dataset_is_as_its_manifest_says(store):
    found = verify(store)
    manifest = open_dataset(store).manifest
    assert (found.problems, found.strays) == ([], [])
    assert (found.shards, found.samples) == (len(manifest.shards), 73)
    assert found.bytes == sum(shard.bytes for shard in manifest.shards)


def test_mean_and_std_are_those_of_the_train_splits_pixels(store, tmp_path):
    manifest = open_dataset(store).manifest
    images = np.load(tmp_path / "tiny.npz")["train_images"] / 255
    assert manifest.mean == pytest.approx([images.mean()])
    assert manifest.std == pytest.approx([images.std()])


def test_a_flipped_bit_a_missing_shard_and_a_stray_are_told(store):
    data = bytearray(store.get("shards/train-00001.tar"))
    data[-1] ^= 1
    store.put("shards/train-00001.tar", bytes(data))
    store.put("shards/val-00000.tar", store.get("shards/val-00000.tar")[:-512])
    store.delete("shards/test-00000.tar")
    strays = ["parts/train-00099.json", "scan/000000000.npz", "shards/train-00099.tar"]
    for key in strays:
        store.put(key, b"of an earlier conversion")
    found = verify(store)
    assert "shards/train-00001.tar has a different sha256 than the manifest" in found.problems
    assert "shards/test-00000.tar is missing" in found.problems
    assert any(problem.startswith("shards/val-00000.tar has ") for problem in found.problems)
    assert found.strays == strays


@pytest.mark.parametrize(
    ("ending", "new", "told"),
    [
        ("cls", b"7", "a different class than the index"),
        ("json", b"{}", "different labels, group or split"),
        ("json", b"{", "a .json that is not JSON"),
        ("png", b"no image", "a different position or size"),
    ],
    ids=["class", "labels", "json", "size"],
)
def test_a_sample_that_is_not_what_the_index_says_is_named(store, ending, new, told):
    key = open_dataset(store).index("train").key[0]
    rewritten(store, "train-00000", lambda i, name, data: new if name == f"{key}.{ending}" else data)
    problems = verify(store).problems
    assert [p for p in problems if p.startswith(f"shards/train-00000.tar: sample {key} ") and told in p]


def test_other_pixels_of_the_same_size_are_found_by_their_digest(store):
    key = str(open_dataset(store).index("train").key[0])
    size = len(tar_member(store, "train-00000", f"{key}.png"))

    def change(position: int, name: str, data: bytes) -> bytes:
        return same_size_png(size) if name == f"{key}.png" else data

    rewritten(store, "train-00000", change)
    problem = f"shards/train-00000.tar: sample {key} has different pixels than in {FINGERPRINTS}"
    assert verify(store).problems == [problem]


def tar_member(store, shard: str, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(store.get(tar_key(shard)))) as tar:
        return tar.extractfile(name).read()


def same_size_png(size: int) -> bytes:
    """Another image of 12 x 12 whose PNG has just as many bytes."""
    return next(data for seed in range(5000, 9000) if len(data := coded(pixels(seed, 12, 12))) == size)


@pytest.mark.parametrize("key", [MANIFEST, INDEX, FINGERPRINTS, "leakage.json"])
def test_a_dataset_without_one_of_its_tables_is_told(store, key):
    store.delete(key)
    (problem,) = verify(store).problems
    assert key in problem


def test_a_contact_sheet_shows_each_class_and_reads_no_more(store):
    dataset = open_dataset(store)
    rows = list(chosen(dataset, "train", per_class=3))
    assert [(name, len(images)) for name, images in rows] == [("0", 3), ("1", 3), ("2", 3)]
    first = dataset.index("train").labels[:, 1].argmax()
    assert rows[1][1][0].shape == (12, 12, 1)
    drawn = np.asarray(sheet(rows, side=24))
    assert drawn.shape[1] >= 3 * 24
    grey = rows[1][1][0][:, :, 0].repeat(2, 0).repeat(2, 1)  # enlarged by whole pixels
    assert any(np.array_equal(drawn[top : top + 24, 6:30, 0], grey) for top in range(drawn.shape[0] - 24)), (
        f"the image at {first} is on the sheet"
    )
