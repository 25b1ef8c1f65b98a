from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny_sets import coded, in_memory_set, pixels

from data_shards.config import DataConfig
from data_shards.plan import plan_shards
from data_shards.shard import ShardTask, find_shard, part_key, pixel_histogram, read_samples, tar_key, write_shard
from data_shards.store import open_store

CONFIG = DataConfig(dataset="tiny", layout="folders", source="/somewhere", samples_per_shard=100)


@pytest.fixture
def written(tmp_path):
    images, store = in_memory_set(), open_store(str(tmp_path))
    (plan,) = plan_shards(images.rows, ["train"] * len(images.rows), CONFIG)
    part = write_shard(ShardTask(images, plan, CONFIG, images.task, store))
    return images, store, plan, part, store.get(tar_key(plan.name))


def test_offset_and_size_cut_each_image_out_of_the_tar(written):
    images, _, plan, part, tar = written
    for planned, sample in zip(plan.rows, part.samples, strict=True):
        image = np.asarray(Image.open(io.BytesIO(tar[sample.offset : sample.offset + sample.size])))
        assert image.shape[:2] == (sample.height, sample.width)
        assert (1 if image.ndim == 2 else image.shape[2]) == sample.channels
        original = images.images[planned.row.where]
        if isinstance(original, bytes):
            original = np.asarray(Image.open(io.BytesIO(original)))
        assert np.array_equal(image, original)


@pytest.mark.filterwarnings("ignore:unclosed file")  # webdataset leaves the shard open
def test_a_stock_webdataset_reads_the_shard(written):
    import webdataset

    _, store, plan, _, _ = written
    found = list(webdataset.WebDataset(str(store.path(tar_key(plan.name))), shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in found] == [planned.key for planned in plan.rows]
    for sample, planned in zip(found, plan.rows, strict=True):
        assert sample["cls"] == planned.row.labels[0]
        assert sample["json"] == {
            "key": planned.key,
            "labels": list(planned.row.labels),
            "group": planned.group,
            "split": "train",
        }
        assert "png" in sample or "jpg" in sample


def test_the_bytes_are_those_of_webdatasets_own_writer(written):
    from webdataset.writer import TarWriter

    _, _, _, _, tar = written
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, mtime=0, user="", group="", mode=0o444) as writer:
        for sample in read_samples(tar):
            facts = {name: sample[name] for name in ("group", "key", "labels", "split")}
            writer.write(
                {
                    "__key__": sample["key"],
                    sample["member"]: sample["image"],
                    "cls": str(sample["labels"][0]).encode(),
                    "json": json.dumps(facts, separators=(",", ":")).encode(),
                }
            )
    assert buffer.getvalue() == tar


def test_no_source_name_is_in_the_shard_or_its_part(written):
    _, store, plan, _, tar = written
    for text in (tar, store.get(part_key(plan.name))):
        assert not any(word in text for word in (b"folder", b"image (", b"patient", b"somewhere"))


def test_the_part_tells_size_and_digest_of_the_tar(written):
    *_, part, tar = written
    assert (part.bytes, part.sha256) == (len(tar), hashlib.sha256(tar).hexdigest())


def test_only_a_finished_shard_of_this_plan_and_size_is_found(written):
    images, store, plan, part, tar = written
    task = ShardTask(images, plan, CONFIG, images.task, store)
    assert find_shard(task) == part
    assert find_shard(replace(task, config=CONFIG.model_copy(update={"max_side": 10}))) is None
    store.put(tar_key(plan.name), tar[:-1])
    assert find_shard(task) is None
    store.put(tar_key(plan.name), tar)
    store.put(part_key(plan.name), b'{"name": "train-0')
    assert find_shard(task) is None


def test_an_undecodable_image_is_quarantined_and_others_stay(tmp_path):
    images, store = in_memory_set(), open_store(str(tmp_path))
    bad = images.rows[4].where
    images.images[bad] = coded(pixels(4))[:40]
    (plan,) = plan_shards(images.rows, ["train"] * len(images.rows), CONFIG)
    part = write_shard(ShardTask(images, plan, CONFIG, images.task, store))
    (entry,) = part.quarantine
    assert entry.key == next(planned.key for planned in plan.rows if planned.row.where == bad)
    assert entry.reason
    assert len(part.samples) == len(images.rows) - 1
    assert len(list(read_samples(store.get(tar_key(plan.name))))) == len(images.rows) - 1


def test_a_multilabel_shard_has_label_lists_and_no_class(tmp_path):
    images, store = in_memory_set(3), open_store(str(tmp_path))
    images.task = "multilabel"
    labels = [(0, 1), (), (1,)]
    images.rows = [type(row)(row.where, 0, label, None, None) for row, label in zip(images.rows, labels, strict=True)]
    (plan,) = plan_shards(images.rows, ["test"] * 3, CONFIG)
    write_shard(ShardTask(images, plan, CONFIG, images.task, store))
    tar = store.get(tar_key(plan.name))
    assert b".cls" not in tar
    assert sorted(tuple(sample["labels"]) for sample in read_samples(tar)) == sorted(labels)


def test_what_is_no_whole_shard_says_so(tmp_path):
    images, store = in_memory_set(3), open_store(str(tmp_path))
    (plan,) = plan_shards(images.rows, ["test"] * 3, CONFIG)
    write_shard(ShardTask(images, plan, CONFIG, images.task, store))
    tar = store.get(tar_key(plan.name))
    for damaged in (b"", tar[:700], tar.replace(b".json", b".jsom"), tar.replace(b'"key"', b"'key'"), b"\xff" * 2000):
        with pytest.raises(ValueError, match=r"not a complete tar file|not one image and a \.json"):
            list(read_samples(damaged))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [12, 200])
def test_the_histogram_counts_every_pixel_of_every_channel(side, channels):
    image = pixels(1, side, side, channels).reshape(side, side, channels)
    found = pixel_histogram(image)
    assert found.shape == (channels, 256)
    for channel in range(channels):
        for value in (0, 7, 255):
            assert found[channel, value] == (image[:, :, channel] == value).sum()
