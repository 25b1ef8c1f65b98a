from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from tiny_sets import coded, npz_config, pixels

from data_shards.config import DataConfig, DicomConfig
from data_shards.convert import convert, key_map
from data_shards.manifest import MANIFEST, open_dataset
from data_shards.shard import write_shard
from data_shards.store import open_store
from data_shards.verify import verify


def contents(store, prefixes=("shards/", "samples.parquet", "manifest.json")) -> dict[str, bytes]:
    return {key: store.get(key) for prefix in prefixes for key in store.list(prefix)}


def test_all_samples_arrive_once_with_their_labels_and_pixels(tmp_path):
    config = npz_config(tmp_path)
    store = open_store(str(tmp_path / "out"))
    facts = convert(config, store)
    dataset = open_dataset(store, digest=facts["digest"])
    arrays = np.load(config.source)
    places = {key: where for key, where, _ in key_map(config)}
    assert (facts["num_images"], facts["quarantine"], facts["made"], facts["kept"]) == (73, 0, facts["num_shards"], 0)
    for split in ("train", "val", "test"):
        index = dataset.index(split)
        numbers = [int(places[key].rpartition("/")[2]) for key in index.key]
        assert sorted(numbers) == list(range(len(arrays[f"{split}_labels"])))
        assert np.array_equal(index.labels.argmax(1), arrays[f"{split}_labels"][numbers, 0])
        assert set(index.labels.sum(1)) == {1}
        assert facts["counts"][split] == dict(
            zip(dataset.manifest.classes, np.bincount(arrays[f"{split}_labels"][:, 0]).tolist(), strict=True)
        )


def test_one_and_two_processes_write_the_same_bytes(tmp_path):
    config = npz_config(tmp_path)
    one, two = open_store(str(tmp_path / "one")), open_store(str(tmp_path / "two"))
    facts = convert(config, one)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        # Last submitted first handed over: the order of results must not matter either.
        facts_two = convert(config, two, run_tasks=lambda run, tasks: list(pool.map(run, tasks))[::-1])
    assert contents(one) == contents(two)
    assert facts_two["digest"] == facts["digest"]


def test_equal_images_under_another_name_give_equal_bytes(tmp_path):
    one, two = open_store(str(tmp_path / "one")), open_store(str(tmp_path / "two"))
    convert(npz_config(tmp_path / "here"), one)
    convert(npz_config(tmp_path / "there", name="again"), two)
    assert contents(one) == contents(two)


def test_a_second_run_makes_nothing(tmp_path):
    config, store = npz_config(tmp_path), open_store(str(tmp_path / "out"))
    first = convert(config, store)
    os.rename(config.source, tmp_path / "moved.npz")  # it need not even look at the images
    second = convert(config, store, run_tasks=lambda run, tasks: pytest.fail("made again"))
    assert second == {**first, "made": 0, "kept": first["num_shards"]}


def test_progress_counts_scanned_images_and_then_shards(tmp_path):
    config, seen = npz_config(tmp_path), []
    facts = convert(config, open_store(str(tmp_path / "out")), progress=lambda *told: seen.append(told))
    images, shards = ([told[:2] for told in seen if told[2] == unit] for unit in ("images", "shards"))
    assert images == [(0, 73), (32, 73), (64, 73), (73, 73)]
    assert shards == [(done, facts["num_shards"]) for done in range(facts["num_shards"] + 1)]


def test_killed_halfway_it_keeps_finished_shards_and_bytes(tmp_path):
    config, whole, killed = npz_config(tmp_path), open_store(str(tmp_path / "a")), open_store(str(tmp_path / "b"))
    convert(config, whole)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    script = (
        "import sys, time; from data_shards.config import DataConfig; from data_shards import convert as c\n"
        "from data_shards.store import open_store\n"
        "slow = lambda run, tasks: ((time.sleep(0.1), run(task))[1] for task in tasks)\n"
        "config = DataConfig.model_validate_json(open(sys.argv[1]).read())\n"
        "c.convert(config, open_store(sys.argv[2]), run_tasks=slow)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "config.json"), killed.uri])
    while len(list(killed.list("parts/"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert killed.head(MANIFEST) is None
    facts = convert(config, killed)
    assert facts["kept"] >= 3
    assert facts["made"] >= 1
    assert contents(killed) == contents(whole)


def test_other_settings_under_a_name_are_an_error_naming_each(tmp_path):
    config, store = npz_config(tmp_path), open_store(str(tmp_path / "out"))
    convert(config, store)
    before = contents(store)
    changed = config.model_copy(update={"samples_per_shard": 5, "salt": "secret"})
    with pytest.raises(ValueError, match=r"data\.salt: '' -> '\w+'; data\.samples_per_shard: 8 -> 5.*--data\.name"):
        convert(changed, store)
    assert contents(store) == before


def no_tasks(task, items):
    raise AssertionError("something is converted again")


def test_a_finished_set_that_moved_is_not_converted_again(tmp_path):
    config, store = folder_config(tmp_path / "set", bad=0), open_store(str(tmp_path / "out"))
    first, before = convert(config, store), contents(store)
    (tmp_path / "set").rename(tmp_path / "moved")
    moved = config.model_copy(update={"source": str(tmp_path / "moved")})
    assert convert(moved, store, run_tasks=no_tasks) == {**first, "made": 0, "kept": first["num_shards"]}
    assert contents(store) == before
    with pytest.raises(ValueError, match=r"other settings \(data\.seed: 0 -> 1\)"):
        convert(moved.model_copy(update={"seed": 1}), store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda left: left[7].unlink(), "does not have an image of the finished"),
        (lambda left: left[7].rename(left[7].with_name("renamed.png")), "does not have an image of the finished"),
        (lambda left: [path.write_bytes(coded(pixels(900 + i))) for i, path in enumerate(left)], "another image in"),
        (lambda left: [path.write_bytes(b"torn") for path in left], "another image in"),
    ],
    ids=["missing", "renamed", "other pixels", "damaged"],
)
def test_another_image_set_is_not_taken_for_one_that_moved(change, message, tmp_path):
    config, store = folder_config(tmp_path / "set", bad=0), open_store(str(tmp_path / "out"))
    convert(config, store)
    (tmp_path / "set").rename(tmp_path / "other")
    change(sorted((tmp_path / "other" / "left").iterdir()))
    with pytest.raises(ValueError, match=f"{message}.*--data.name"):
        convert(config.model_copy(update={"source": str(tmp_path / "other")}), store, run_tasks=no_tasks)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("benign", "cat", "has the classes"),
        ("0.png,benign,test", "0.png,malignant,test", "has other labels for '0.png'"),
        ("0.png,benign,test", "0.png,benign,train", "has '0.png' in train, not in test"),
    ],
    ids=["classes", "labels", "splits"],
)
def test_a_different_table_is_not_the_set_that_moved(old, new, message, tmp_path):
    (tmp_path / "set").mkdir()
    lines = []
    for i in range(40):
        (tmp_path / "set" / f"{i}.png").write_bytes(coded(pixels(i)))
        lines.append(f"{i}.png,{('benign', 'malignant')[i // 4 % 2]},{('test', 'val', 'train', 'train')[i % 4]}")
    table = tmp_path / "set" / "labels.csv"
    table.write_text("\n".join(["file,label,split", *lines, ""]))
    config = DataConfig(dataset="own", layout="table", source=str(table), split_column="split")
    store = open_store(str(tmp_path / "out"))
    first = convert(config, store)
    (tmp_path / "set").rename(tmp_path / "moved")
    table = tmp_path / "moved" / "labels.csv"
    moved = config.model_copy(update={"source": str(table)})
    assert convert(moved, store, run_tasks=no_tasks)["digest"] == first["digest"]
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(ValueError, match=f"{message}.*--data.name"):
        convert(moved, store, run_tasks=no_tasks)


def test_images_added_since_do_not_make_another_image_set(tmp_path):
    config, store = folder_config(tmp_path / "set", bad=0), open_store(str(tmp_path / "out"))
    first = convert(config, store)
    (tmp_path / "set").rename(tmp_path / "moved")
    (tmp_path / "moved" / "left" / "new.png").write_bytes(coded(pixels(900)))
    moved = config.model_copy(update={"source": str(tmp_path / "moved")})
    assert convert(moved, store, run_tasks=no_tasks)["digest"] == first["digest"]


def test_a_newer_setting_at_its_default_is_not_drift(tmp_path):
    config, store = npz_config(tmp_path), open_store(str(tmp_path / "out"))
    first = convert(config, store)
    settings = json.loads(store.get("config.json"))
    del settings["dicom.frames"]
    store.put("config.json", json.dumps(settings).encode())
    assert convert(config, store)["digest"] == first["digest"]
    with pytest.raises(ValueError, match=r"data\.dicom\.frames: 'each' -> 'first'"):
        convert(config.model_copy(update={"dicom": DicomConfig(frames="first")}), store)


def test_the_salt_is_not_written_beside_the_keys_it_hides(tmp_path):
    config, store = npz_config(tmp_path, salt="very secret salt"), open_store(str(tmp_path / "out"))
    convert(config, store)
    assert not any(b"very secret" in store.get(key) for key in store.list())


def test_an_unfinished_conversion_of_other_settings_is_made_anew(tmp_path):
    config, store, fresh = npz_config(tmp_path), open_store(str(tmp_path / "a")), open_store(str(tmp_path / "b"))

    def stopped(run, tasks):
        yield run(tasks[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(config.model_copy(update={"salt": "x"}), store, run_tasks=stopped)
    store.put("shards/train-00099.tar", b"of finer shards than now")
    facts = convert(config, store)
    assert facts["kept"] == 0
    assert facts["digest"] == convert(config, fresh)["digest"]
    assert contents(store) == contents(fresh)


def folder_config(folder: Path, *, bad: int, **changes) -> DataConfig:
    for label, name in enumerate(("left", "right")):
        (folder / name).mkdir(parents=True)
        for i in range(30):
            (folder / name / f"{i} (1).png").write_bytes(coded(pixels(100 * label + i)))
    for i in range(bad):
        (folder / "left" / f"{i} (1).png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    return DataConfig(dataset="own", layout="folders", source=str(folder), **changes)


def test_too_many_undecodable_images_fail_without_a_manifest(tmp_path):
    config, store = folder_config(tmp_path / "set", bad=2), open_store(str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"2 of 60 images \(3\.3%\).*left/0 \(1\)\.png.*max-quarantine"):
        convert(config, store)
    assert store.head(MANIFEST) is None


def test_raising_the_tolerance_keeps_the_complete_shards(tmp_path):
    config = folder_config(tmp_path / "set", bad=2, samples_per_shard=10)
    store = open_store(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="max_quarantine"):
        convert(config, store)
    facts = convert(config.model_copy(update={"max_quarantine": 0.05}), store)
    assert (facts["quarantine"], facts["num_images"]) == (2, 58)
    parts = [json.loads(store.get(key)) for key in store.list("parts/")]
    lacking = sum(bool(part["quarantine"]) for part in parts)
    assert 0 < lacking < len(parts)
    assert (facts["made"], facts["kept"]) == (lacking, len(parts) - lacking)
    assert len(open_dataset(store).manifest.quarantine) == 2
    with pytest.raises(ValueError, match="max_quarantine"):  # also when it is finished
        convert(config, store)


def test_quarantined_files_are_named_but_not_in_the_store(tmp_path, caplog):
    config = folder_config(tmp_path / "set", bad=1, max_quarantine=0.05)
    (tmp_path / "set/right/7 (1).png").unlink()
    (tmp_path / "set/right/7 (1).png").symlink_to(tmp_path / "nowhere")
    store = open_store(str(tmp_path / "out"))
    assert convert(config, store)["quarantine"] == 2
    assert "quarantined 2 images: left/0 (1).png (" in caplog.text
    assert "right/7 (1).png (cannot be read: a link to a file that is not there)" in caplog.text
    assert not any(b"7 (1).png" in store.get(key) for key in store.list())


def test_too_many_undecodable_images_name_the_listing_command(tmp_path):
    config, store = folder_config(tmp_path / "set", bad=7), open_store(str(tmp_path / "store/datasets/own/default"))
    command = f"medmamba shards quarantine own/default --names --store {tmp_path / 'store'}"
    with pytest.raises(ValueError, match=re.escape(f"and 4 more; `{command}` lists all of them")):
        convert(config, store)


def test_a_class_without_decodable_images_is_named_with_reasons(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    lines = ["file,label,split"]
    for i in range(24):
        label, split = "ab"[i % 2], ("train", "val", "test")[i // 2 % 3]
        (folder / f"{i}.png").write_bytes(b"torn" if (label, split) == ("b", "val") else coded(pixels(i)))
        lines.append(f"{i}.png,{label},{split}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    config = DataConfig(dataset="own", layout="table", source=str(folder), split_column="split", max_quarantine=0.5)
    told = r"class 'b' is gone from val: none of the 4 images of 'b' there can.*15\.png \(.*shards quarantine own"
    with pytest.raises(ValueError, match=told):
        convert(config, open_store(str(tmp_path / "out")))


def test_a_relative_source_is_found_by_a_task_in_another_folder(tmp_path, monkeypatch):
    config = folder_config(tmp_path / "set", bad=0)
    here, there = open_store(str(tmp_path / "here")), open_store(str(tmp_path / "there"))
    monkeypatch.chdir(tmp_path)
    relative = config.model_copy(update={"source": "set"})

    def run_elsewhere(run, tasks):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=os.chdir, initargs=("/",)) as pool:
            return list(pool.map(run, tasks))

    assert convert(relative, there, run_tasks=run_elsewhere)["digest"] == convert(config, here)["digest"]
    assert json.loads(there.get("config.json"))["source"] == "set"


def test_gray_and_rgb_images_together_make_three_channels(tmp_path):
    config, store = folder_config(tmp_path / "set", bad=0), open_store(str(tmp_path / "out"))
    (tmp_path / "set" / "right" / "colour.png").write_bytes(coded(pixels(7, channels=3)))
    convert(config, store)
    assert open_dataset(store).manifest.channels == 3


def test_samples_of_several_labels_and_of_none_keep_them(tmp_path):
    config = npz_config(tmp_path, task="multilabel", classes=("a", "b", "c"))
    arrays = dict(np.load(config.source))
    for split in ("train", "val", "test"):
        numbers = np.arange(len(arrays[f"{split}_labels"]))
        arrays[f"{split}_labels"] = (numbers[:, None] >> np.arange(3) & 1).astype(np.uint8)
    np.savez(config.source, **arrays)
    store = open_store(str(tmp_path / "out"))
    convert(config, store)
    dataset, places = open_dataset(store), {key: where for key, where, _ in key_map(config)}
    for split in ("train", "val", "test"):
        index = dataset.index(split)
        numbers = [int(places[key].rpartition("/")[2]) for key in index.key]
        assert np.array_equal(index.labels, arrays[f"{split}_labels"][numbers])
    assert dataset.manifest.splits["val"].classes == {"a": 4, "b": 4, "c": 4}


def test_a_shard_is_written_without_torch(tmp_path):
    script = "import sys, data_shards.convert, data_shards.loader.loader; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    assert write_shard.__module__ == "data_shards.shard"  # a worker finds it by name


def test_on_s3_the_bytes_are_those_of_a_folder(tmp_path, s3):
    config, local, remote = npz_config(tmp_path), open_store(str(tmp_path / "out")), open_store(f"{s3}/sets/tiny")
    facts = convert(config, local)
    assert convert(config, remote)["digest"] == facts["digest"]
    assert contents(local) == contents(remote)
    assert re.fullmatch(r"[0-9a-f]{64}", facts["digest"])


def test_mended_images_are_looked_at_again(tmp_path):
    config, store = folder_config(tmp_path / "set", bad=2), open_store(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="max_quarantine"):
        convert(config, store)
    for torn in ("0 (1).png", "1 (1).png"):
        (tmp_path / "set/left" / torn).write_bytes(coded(pixels(7)))
    assert convert(config, store)["quarantine"] == 0


def test_a_shard_whose_images_were_replaced_since_is_made_again(tmp_path):
    config = folder_config(tmp_path / "set", bad=2, samples_per_shard=10)
    store = open_store(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="max_quarantine"):
        convert(config, store)
    kept = [part for key in store.list("parts/") if not (part := json.loads(store.get(key)))["quarantine"]]
    places = {key: where for key, where, _ in key_map(config)}
    replaced = kept[0]["samples"][0][0]
    old = (tmp_path / "set" / places[replaced]).stat()
    (tmp_path / "set" / places[replaced]).write_bytes(coded(pixels(4711)))
    os.utime(tmp_path / "set" / places[replaced], ns=(old.st_atime_ns, old.st_mtime_ns))
    facts = convert(config.model_copy(update={"max_quarantine": 0.05}), store)
    assert facts["kept"] == len(kept) - 1
    assert verify(store).problems == []


def test_a_set_of_one_class_is_refused(tmp_path):
    (tmp_path / "set/only").mkdir(parents=True)
    for number in range(9):
        (tmp_path / f"set/only/{number}.png").write_bytes(coded(pixels(number)))
    config = DataConfig(dataset="own", layout="folders", source=str(tmp_path / "set"))
    with pytest.raises(ValueError, match="has only one class"):
        convert(config, open_store(str(tmp_path / "out")))


def test_another_concurrent_conversion_prevents_a_manifest(tmp_path):
    store = open_store(str(tmp_path / "out"))

    def meanwhile(task, items):
        store.put("config.json", b'{"seed": 1}')
        return map(task, items)

    with pytest.raises(ValueError, match=r"another conversion with different settings started .* --data\.name"):
        convert(npz_config(tmp_path), store, run_tasks=meanwhile)
    assert store.head("manifest.json") is None


def test_old_probe_files_of_a_killed_driver_are_removed(tmp_path):
    store = open_store(str(tmp_path / "out"))
    for key, age_s in ((".probe-old", 7 * 3600), (".probe-young", 0)):
        store.put(key, b"x")
        os.utime(store.path(key), (time.time() - age_s,) * 2)
    convert(npz_config(tmp_path), store)
    assert [key for key in store.list() if key.startswith(".probe-")] == [".probe-young"]
