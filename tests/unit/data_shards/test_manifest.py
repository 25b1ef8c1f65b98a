from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from tiny_sets import npz_config

from data_shards.convert import convert
from data_shards.index import index_bytes
from data_shards.manifest import INDEX, MANIFEST, ManifestError, manifest_digest, open_dataset
from data_shards.split import LeakError
from data_shards.store import open_store


@pytest.fixture
def store(tmp_path):
    store = open_store(str(tmp_path / "out"))
    convert(npz_config(tmp_path), store)
    return store


def edit(store, **changes) -> None:
    store.put(MANIFEST, json.dumps({**json.loads(store.get(MANIFEST)), **changes}).encode())


def test_the_manifest_says_what_the_dataset_is(store):
    dataset = open_dataset(store)
    manifest = dataset.manifest
    assert (manifest.format, manifest.dataset, manifest.task, manifest.channels) == (1, "tiny", "multiclass", 1)
    assert {split: counts.samples for split, counts in manifest.splits.items()} == {"train": 50, "val": 9, "test": 14}
    assert sum(shard.count for shard in manifest.shards) == 73
    assert dataset.digest == manifest_digest(store.get(MANIFEST))
    assert store.uri not in store.get(MANIFEST).decode()


def test_the_index_lists_a_splits_samples_in_shard_order(store):
    dataset = open_dataset(store)
    index = dataset.index("train")
    assert len(index) == len(set(index.key.tolist())) == 50
    assert (np.diff(index.shard) >= 0).all()
    assert {dataset.manifest.shards[i].name.split("-")[0] for i in index.shard} == {"train"}
    assert set(index.height.tolist()) == set(index.width.tolist()) == {12}
    with pytest.raises(ValueError, match=r"has no split 'dev'; it has train, val, test"):
        dataset.index("dev")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_torn_manifest_is_refused(store, part):
    data = store.get(MANIFEST)
    store.put(MANIFEST, data[: int(len(data) * part)])
    with pytest.raises(ManifestError, match=r"manifest\.json is not a manifest of format 1.* under another --run"):
        open_dataset(store)


def test_a_missing_manifest_is_named(store):
    store.delete(MANIFEST)
    with pytest.raises(ManifestError, match=r"has no manifest\.json, .*run the shard step"):
        open_dataset(store)


def test_a_manifest_of_another_format_is_refused(store):
    edit(store, format=2)
    with pytest.raises(ManifestError, match="format"):
        open_dataset(store)


def test_an_edited_count_is_refused(store):
    splits = json.loads(store.get(MANIFEST))["splits"]
    splits["test"]["samples"] += 1
    edit(store, splits=splits)
    with pytest.raises(ManifestError, match="have different sample counts"):
        open_dataset(store)


def test_another_version_than_the_wanted_one_is_refused(store):
    wanted = open_dataset(store).digest
    edit(store, licence="mine")
    with pytest.raises(ManifestError, match=wanted):
        open_dataset(store, digest=wanted)


@pytest.mark.parametrize("damage", ["flip", "tear", "remove"])
def test_a_damaged_index_is_refused(store, damage):
    data = bytearray(store.get(INDEX))
    if damage == "remove":
        store.delete(INDEX)
    else:
        data[len(data) // 2] ^= 1
        store.put(INDEX, bytes(data if damage == "flip" else data[:-10]))
    with pytest.raises(ManifestError, match=r"samples\.parquet"):
        open_dataset(store)


def test_a_group_in_two_splits_is_refused_even_if_digests_agree(store):
    table = open_dataset(store).table
    groups, splits = table["group"].to_pylist(), table["split"].to_pylist()
    groups[splits.index("test")] = groups[splits.index("train")]
    place = table.schema.get_field_index("group")
    data = index_bytes(table.set_column(place, table.schema.field("group"), pa.array(groups)))
    store.put(INDEX, data)
    edit(store, index={"name": INDEX, "bytes": len(data), "sha256": manifest_digest(data)})
    with pytest.raises(LeakError, match="is in the splits train and test"):
        open_dataset(store)


def test_the_same_index_gives_the_same_bytes(store):
    table = open_dataset(store).table
    assert index_bytes(table) == index_bytes(table) == store.get(INDEX)


@pytest.mark.parametrize("change", ["torn", "other columns", "other types", "no list of labels"])
def test_a_file_that_is_not_an_index_is_refused_by_itself(store, change):
    data = store.get(INDEX)
    table = open_dataset(store).table
    if change == "torn":
        data = data[:200] + bytes(200) + data[400:]
    elif change == "other columns":
        data = index_bytes(table.drop_columns(["group"]))
    elif change == "other types":
        data = index_bytes(table.set_column(5, "offset", table["offset"].cast(pa.float64())))
    else:
        data = index_bytes(table.set_column(1, "labels", table["offset"]))
    store.put(INDEX, data)
    edit(store, index={"name": INDEX, "bytes": len(data), "sha256": manifest_digest(data)})
    with pytest.raises(ManifestError, match=r"samples\.parquet is not an index of format 1"):
        open_dataset(store)


@pytest.mark.parametrize("changes", [{"shards": []}, {"classes": ["a", "b"]}, {"classes": ["a", "b", "c", "d"]}])
def test_a_manifest_with_other_shards_than_its_index_is_refused(store, changes):
    edit(store, **changes)
    with pytest.raises(ManifestError, match="and its index have different sample counts"):
        open_dataset(store)
