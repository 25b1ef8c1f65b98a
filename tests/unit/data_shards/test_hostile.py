"""Files of a dataset that were made to do harm: each field that becomes a path, a size or a shape is refused first."""

from __future__ import annotations

import functools
import io
import json
import struct
import tempfile
import time
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_sets import InMemorySet, coded, in_memory_set, npz_config, pixels

from data_shards.config import DataConfig
from data_shards.convert import convert
from data_shards.duplicates import REPORT, read_report
from data_shards.duplicates.fingerprint import fingerprint
from data_shards.duplicates.scan import FINGERPRINTS, FOLDER, Scan, stored_digests
from data_shards.index import index_bytes
from data_shards.loader.local_shard import LocalShards, ShardError
from data_shards.loader.node_cache import NodeCache
from data_shards.loader.pixels import cropped, stretched
from data_shards.manifest import INDEX, MANIFEST, ManifestError, manifest_digest, open_dataset
from data_shards.plan import plan_shards
from data_shards.shard import ShardTask, find_shard, part_key, read_samples, tar_key, write_shard
from data_shards.store import StoreError, checked_key, open_store


@functools.cache
def written() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"{folder}/out")
        convert(npz_config(Path(folder), num={"train": 9, "val": 3, "test": 6}), store)
        return {key: store.get(key) for key in store.list()}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for key, data in written().items():
        path = tmp_path / "out" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return open_store(str(tmp_path / "out"))


def edit(store, key, place, value) -> None:
    """Puts `value` at the dotted `place` of a JSON object of the store."""
    document = json.loads(store.get(key))
    *parents, last = place.split(".")
    at = document
    for name in parents:
        at = at[int(name) if name.isdigit() else name]
    at[int(last) if last.isdigit() else last] = value
    store.put(key, json.dumps(document).encode())


def with_index(store, **columns) -> None:
    """An index whose first row has other values, under a manifest that promises exactly its bytes."""
    table = pq.read_table(io.BytesIO(written()[INDEX]))
    for name, value in columns.items():
        field = open_schema().field(name)
        values = [value, *table[name].to_pylist()[1:]]
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    put_index(store, index_bytes(table.cast(open_schema())))


def open_schema() -> pa.Schema:
    return pq.read_metadata(io.BytesIO(written()[INDEX])).schema.to_arrow_schema()


def put_index(store, data: bytes) -> None:
    store.put(INDEX, data)
    edit(store, MANIFEST, "index", {"name": INDEX, "bytes": len(data), "sha256": manifest_digest(data)})


def read_all(store):
    dataset = open_dataset(store)
    shards = LocalShards([(store, entry) for entry in dataset.manifest.shards])
    return {split: shards.read_many(*(getattr(dataset.index(split), c) for c in ("shard", "offset", "size")))
            for split in dataset.manifest.splits}  # fmt: skip


def test_the_untouched_dataset_is_read(store):
    assert sum(map(len, read_all(store).values())) == 18


@pytest.mark.parametrize("name", ["VICTIM", "../../../victim", "..%2fvictim", ""])
def test_a_sha256_that_is_a_path_truncates_no_file(store, tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    edit(store, MANIFEST, "shards.0.sha256", name.replace("VICTIM", str(victim)))
    with pytest.raises(ManifestError, match=r"shards\.0\.sha256 = .*should match .*\{64\}.*delete it"):
        read_all(store)
    assert victim.read_text() == "precious"


def test_the_cache_opens_no_file_by_what_is_not_a_sha256(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with pytest.raises(AssertionError, match="not a sha256"):
        NodeCache().verified(victim, str(victim))
    assert victim.read_text() == "precious"


HEX = "0" * 64
MANIFEST_FIELDS = {
    "shards.0.name": ["../x", "/x", "a/b", "..", "", "dev-00000", "train-0", "train-00000.tar", "\0", 7],
    "shards.0.bytes": [-1, 10**18, 2**64, 10**4000, 1.5, "many", None],
    "shards.0.count": [-1, 2**63, "1"],
    "shards.0.sha256": [HEX[:-1], HEX + "0", "G" * 64, HEX + "\n", None, 0],
    "shards.1.name": ["train-00000"],
    "dataset": ["../x", "a/b", "", "..", "\x1b[2J", "a" * 300],
    "classes": [[], ["a", "a", "b"], ["", "a", "b"], "abc", {"a": 1}],
    "config_sha256": ["x", ""],
    "channels": [0, 2, 4, 10**9],
    "mean": [[], [0.5] * 3, [float("nan")], [float("inf")], [-1.0], [1.5], ["x"]],
    "std": [[], [float("nan")], [-0.1], [2.0]],
    "splits.train.samples": [-1, 2**63],
    "splits.train.groups": [-5],
    "splits": [{"dev": {}}, []],
    "quarantine": [[{"key": "../x", "reason": ""}], [{"key": "0" * 20, "reason": "a"}] * 2],
    "index.sha256": ["/dev/zero"],
    "index.bytes": [-1, 10**19],
    "index.name": ["/etc/passwd"],
    "format": [99, "1", None],
    "task": ["regression"],
    "extra": [1],
}


@pytest.mark.parametrize(("place", "value"), [(place, v) for place, values in MANIFEST_FIELDS.items() for v in values])
def test_an_impossible_manifest_field_is_refused_with_a_remedy(store, place, value):
    edit(store, MANIFEST, place, value)
    began = time.monotonic()
    with pytest.raises(ManifestError) as refused:
        open_dataset(store)
    told = str(refused.value)
    assert "is not a manifest of format 1" in told
    assert "rebuild the dataset" in told
    assert len(told) < 700
    assert told.isprintable()
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("columns", "rule"),
    [
        ({"key": "../../../../etc/pass"}, "key of sample 0 is not 20 hex digits"),
        ({"key": "x" * 5000}, "key has a text of 5000 bytes"),
        ({"group": "A" * 20}, "group of sample 0 is not 20 hex digits"),
        ({"split": "dev"}, "split of sample 0 differs from that of its shard"),
        ({"split": "test"}, "split of sample 0 differs from that of its shard"),
        ({"offset": -1}, "offset of sample 0 is not within its shard"),
        ({"offset": 0}, "offset of sample 0 is not within its shard"),
        ({"offset": 2**62}, "offset of sample 0 is not within its shard"),
        ({"offset": 2**63 - 1, "size": 2**63 - 1}, "size of sample 0 is not within its shard"),
        ({"size": 0}, "size of sample 0 is not within its shard"),
        ({"size": -(2**63)}, "size of sample 0 is not within its shard"),
        ({"height": 0}, "height of sample 0"),
        ({"height": 2**62, "width": 2**62}, "height of sample 0"),
        ({"height": 20_000, "width": 20_000}, "width of sample 0"),
        ({"width": -3}, "width of sample 0"),
        ({"channels": 3}, "channels of sample 0 is not 1 or 3, or above the manifest's 1"),
        ({"channels": 2**40}, "channels of sample 0"),
        ({"labels": [0, 1]}, "labels of sample 0 are not exactly one"),
        ({"labels": []}, "labels of sample 0 are not exactly one"),
    ],
)
def test_an_impossible_index_row_is_refused_despite_its_digest(store, columns, rule):
    with_index(store, **columns)
    with pytest.raises(ManifestError, match=r"is not an index of format 1") as refused:
        open_dataset(store)
    assert rule in str(refused.value)


@pytest.mark.parametrize("label", [-1, 3, 2**31 - 1])
def test_a_label_beyond_the_classes_is_refused_without_counting(store, label):
    with_index(store, labels=[label])
    with pytest.raises(ManifestError, match="and its index have different sample counts"):
        open_dataset(store)


def test_a_key_twice_is_refused(store):
    second = pq.read_table(io.BytesIO(written()[INDEX]))["key"][1].as_py()
    with_index(store, key=second)
    with pytest.raises(ManifestError, match="a key is listed twice"):
        open_dataset(store)


def test_an_index_unpacking_far_beyond_its_size_is_refused(store):
    num = 1_000_000
    table = pa.table({field.name: repeated(field, num) for field in open_schema()}, schema=open_schema())
    data = index_bytes(table)
    assert len(data) < 100_000
    del table
    put_index(store, data)
    with pytest.raises(ManifestError, match=f"claims {num} rows in {len(data)} bytes"):
        open_dataset(store)


def repeated(field, num):
    one = {"labels": [0], "split": "train", "shard": "train-00000", "key": "0" * 20, "group": "0" * 20}
    values = pa.array([one.get(field.name, 1000)], field.type)
    return (
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(num, np.int32)), values).cast(field.type)
        if not (pa.types.is_list(field.type))
        else pa.ListArray.from_arrays(np.arange(num + 1, dtype=np.int32), np.zeros(num, np.int32)).cast(field.type)
    )


def test_a_shard_of_another_size_is_refused_before_it_is_read(store):
    key = tar_key("train-00000")
    with (store.folder / key).open("r+b") as file:
        file.truncate(1 << 40)  # sparse: takes nothing on the disk, and hours to read
    began = time.monotonic()
    with pytest.raises(ShardError, match=rf"has {1 << 40} bytes instead of"):
        read_all(store)
    assert time.monotonic() - began < 5


def test_others_copies_stay_if_a_shard_would_never_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache, others = NodeCache(limit_bytes=1000), b"x" * 900
    entry = shard_entry("train-00000", others)
    assert cache.copy(entry, lambda: iter([others]), mine=()) is not None
    huge = shard_entry("train-00001", b"y").model_copy(update={"bytes": 5 << 40})
    assert cache.copy(huge, lambda: iter(()), mine=()) is None
    assert (tmp_path / "medmamba" / "shards" / f"{entry.sha256}.tar").is_file()


def shard_entry(name, data):
    from data_shards.manifest import ShardEntry

    return ShardEntry(name=name, bytes=len(data), sha256=manifest_digest(data), count=1)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("images", -1), ("near", "12"), ("counts", []), ("counts", {"x": -1}), ("dropped", ["../x"]),
        ("findings", [{"kind": "exact", "where": "across datasets", "conflict": False, "copies": []}]),
        ("findings", [{"kind": "exact", "where": "across datasets", "conflict": False, "copies": [
            {"key": "0" * 20, "split": "train", "labels": [0], "dataset": "../../x"}] * 2}]),
        ("findings", [{"kind": "near", "where": "within a split", "conflict": False, "copies": [
            {"key": "\x1b[2J", "split": "train", "labels": [0]}] * 2}]),
        ("more", 2**64), ("format", 2),
    ],
)  # fmt: skip
def test_a_report_that_cannot_be_is_refused(store, place, value):
    edit(store, REPORT, place, value)
    with pytest.raises(ManifestError, match=r"has no complete leakage\.json") as refused:
        read_report(store)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("key", ["../x"] * 18), ("split", ["dev"] * 18), ("labels", [[-1]] * 18), ("state", [7] * 18),
        ("pixels", [b"short"] * 18), ("labels", ["a"] * 18), ("key", [None] * 18),
    ],
)  # fmt: skip
def test_fingerprints_that_cannot_be_are_refused(store, column, values):
    table = pq.read_table(io.BytesIO(store.get(FINGERPRINTS)))
    kind = table.schema.field(column).type if column not in ("pixels", "labels") else None
    table = table.set_column(table.schema.get_field_index(column), column, pa.array(values, kind))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, store_schema=False)
    store.put(FINGERPRINTS, buffer.getvalue())
    with pytest.raises(ManifestError, match=r"has no complete fingerprints\.parquet"):
        stored_digests(store)


@pytest.mark.parametrize("settings", [b"[]", b"7", b"null", b"\xff\xfe", b"{", b"[" * 100_000])
def test_unreadable_settings_next_to_a_dataset_cost_no_more(tmp_path, settings):
    config, store = npz_config(tmp_path, num={"train": 9, "val": 3, "test": 6}), open_store(str(tmp_path / "out"))
    digest = convert(config, store)["digest"]
    store.put("config.json", settings)
    assert convert(config, store)["digest"] == digest
    with pytest.raises(ValueError, match="made with other settings"):
        convert(config.model_copy(update={"seed": 5}), store)


# --- an unfinished conversion


@functools.cache
def half_made():
    images = in_memory_set(6)
    config = DataConfig(dataset="tiny", layout="folders", source="/x")
    (plan,) = plan_shards(images.rows, ["train"] * 6, config)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        write_shard(ShardTask(images, plan, config, images.task, store))
        return ShardTask(images, plan, config, images.task, store), {key: store.get(key) for key in store.list()}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("name", "train-00001"), ("name", "../../x"), ("split", "test"), ("sha256", "/etc/passwd"), ("bytes", -1),
        ("samples", []), ("samples.0.0", "0" * 20), ("samples.0.1", [1, 1]), ("samples.0.2", "1" * 20),
        ("samples.0.3", 0), ("samples.0.3", 10**9), ("samples.0.4", 10**9), ("samples.0.4", 0), ("samples.0.5", 0),
        ("samples.0.5", 10**8), ("samples.0.7", 2), ("histogram", []), ("histogram.0", [0] * 255),
        ("histogram.0.0", -1), ("histogram.0.0", 10**30), ("quarantine", [{"key": "0" * 20, "reason": "x"}]),
    ],
)  # fmt: skip
def test_a_commit_mark_that_cannot_be_its_shards_is_none(tmp_path, place, value):
    task, objects = half_made()
    store = open_store(str(tmp_path))
    task = replace(task, out=store)
    for key, data in objects.items():
        store.put(key, data)
    assert find_shard(task) is not None
    edit(store, part_key(task.plan.name), place, value)
    assert find_shard(task) is None


@pytest.mark.parametrize("kept", ["huge shape", "huge ids", "other type", "pickle", "too short", "state"])
def test_kept_fingerprints_that_cannot_be_are_made_again(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(InMemorySet, "stamp", lambda self, row: row.where)  # as images of files have one
    images, store = in_memory_set(6), open_store(str(tmp_path))
    config = DataConfig(dataset="tiny", layout="folders", source="/x")
    scan = Scan(images, config, store)
    scan.add(scan.missing, fingerprint(images, images.rows))
    scan.keep(store)
    assert not len(Scan(images, config, store).missing), "kept fingerprints are used"
    (key,) = store.list(FOLDER)
    with np.load(io.BytesIO(store.get(key))) as stored:
        ids = stored["ids"]
    right = fingerprint(images, images.rows)
    arrays = {name: getattr(right, name) for name in ("state", "pixels", "bits", "size")}
    arrays["bits"] = {
        "other type": arrays["bits"].astype(float), "pickle": np.array([None] * 6), "too short": arrays["bits"][:, :2],
    }.get(kept, arrays["bits"])  # fmt: skip
    arrays["state"] = arrays["state"] + 3 * (kept == "state")
    buffer = io.BytesIO()
    np.savez(buffer, ids=ids, **arrays)
    data = buffer.getvalue()
    if kept in ("huge shape", "huge ids"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        if kept == "huge ids":
            members["ids.npy"] = members["ids.npy"].replace(b"(6, 16), }        ", b"(9999999999,16)}")
        members["size.npy"] = members["size.npy"].replace(b"(6,), }        ", b"(9999999999,),}")
        with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
            for name, member in members.items():
                archive.writestr(name, member)
        data = buffer.getvalue()
    store.put(key, data)
    assert len(Scan(images, config, store).missing) == 6


@pytest.mark.parametrize("kind", ["link to itself", "hard link", "sparse", "device"])
def test_a_member_of_a_shard_that_is_not_a_plain_file_is_refused(kind):
    import tarfile

    info = tarfile.TarInfo("0.png")
    info.type = {"link to itself": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}.get(
        kind, tarfile.REGTYPE
    )
    info.linkname = "0.png" if kind != "sparse" else ""
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w", format=tarfile.PAX_FORMAT) as tar:
        if kind == "sparse":
            info.pax_headers = {
                "GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0",
                "GNU.sparse.size": str(1 << 40), "GNU.sparse.name": "0.png",
            }  # fmt: skip
        tar.addfile(info)
    with pytest.raises(ValueError, match="not a regular file"):
        list(read_samples(buffer.getvalue()))


@pytest.mark.parametrize("key", ["a\0b", "", "..", "a/../b", "/a", 7, None, ["a"]])
def test_what_is_no_key_is_named(key):
    with pytest.raises(StoreError, match="is not a key"):
        checked_key(key)


def huge_png() -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def huge_jpeg() -> bytes:
    data = coded(pixels(1, 16, 16), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 60_000, 60_000) + data[at + 4 :]


@pytest.mark.parametrize("image", [huge_png(), huge_jpeg()], ids=["png", "jpeg"])
@pytest.mark.parametrize("box", [None, (0, 0, 60_000, 60_000)], ids=["stretched", "cropped"])
def test_an_image_claiming_impossible_pixels_is_not_decoded(image, box):
    with pytest.raises(ValueError, match="60000 x 60000 pixels"):
        stretched(image, 32, 32, 1) if box is None else cropped(image, box, 32, 32, 1)
