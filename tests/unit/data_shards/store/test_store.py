"""The store: a folder and a real S3 server behave alike, and every failure names itself."""

import os
import pickle
import socket
import threading
import time
from urllib.parse import urlsplit

import pyarrow.fs
import pytest

from data_shards.store import StoreError, StoreKeyError, StorePathError, open_store


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    return open_store(request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path / "store"))


def test_objects_come_back_whole_and_by_range(store, tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    assert store.put("a/b.bin", b"0123456789")
    assert store.put("a/c.bin", tmp_path / "file")
    for key in ("a/b.bin", "a/c.bin"):
        assert store.get(key) == b"0123456789"
        assert store.get(key, start=3, length=4) == b"3456"
        assert store.get(key, start=7) == b"789"
        assert store.get(key, start=8, length=100) == b"89"
        assert store.get(key, start=50, length=2) == b""
        assert store.get(key, length=0) == b""
        assert store.head(key) == 10


def test_put_if_absent_lets_the_first_writer_win(store):
    assert store.put("k", b"first", if_absent=True)
    assert not store.put("k", b"second", if_absent=True)
    assert store.get("k") == b"first"
    assert store.put("k", b"third")
    assert store.get("k") == b"third"


def test_exactly_one_of_many_writers_wins(store):
    won = []
    threads = [
        threading.Thread(target=lambda i=i: won.append(i) if store.put("k", b"%d" % i, if_absent=True) else None)
        for i in range(6)
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(won) == 1
    assert store.get("k") == b"%d" % won[0]


def test_equal_concurrent_writes_succeed_and_other_bytes_replace(store):
    assert store.ensure("k", b"same")
    assert not store.ensure("k", b"same")
    assert store.ensure("k", b"else")
    assert store.get("k") == b"else"


def test_a_store_knows_whether_it_holds_these_bytes(store, tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    store.put("k", b"0123456789")
    assert store.holds("k", b"0123456789")
    assert store.holds("k", tmp_path / "file")
    assert not any(store.holds("k", data) for data in (b"", b"012345678", b"0123456780"))
    assert not store.holds("gone", b"")


def test_an_object_is_fetched_into_a_file(store, tmp_path):
    for data in (b"", b"0123456789"):
        store.put("k", data)
        store.fetch("k", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data
    with pytest.raises(StoreKeyError, match="has no object gone"):
        store.fetch("gone", tmp_path / "copy")


def test_an_object_has_an_age(store):
    store.put("k", b"")
    first = store.age_s("k")
    time.sleep(1.1)
    assert 1 <= store.age_s("k") - first < 60
    with pytest.raises(StoreKeyError, match="has no object gone"):
        store.age_s("gone")


def test_leftovers_of_killed_writers_are_removed_once_old(tmp_path):
    store = open_store(str(tmp_path))
    store.put("a/k", b"whole")
    for name, age_s in (("a/.tmp-old", 7200), (".tmp-new", 0)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    assert store.clean(older_than_s=3600) == ("a/.tmp-old",)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [".tmp-new", "k"]


def test_a_listing_is_sorted_relative_and_by_prefix(store):
    for key in ("x/b", "x/a.tar", "x.y", "z"):
        store.put(key, b"")
    assert list(store.list()) == ["x.y", "x/a.tar", "x/b", "z"]
    assert list(store.list("x/")) == ["x/a.tar", "x/b"]
    assert list(store.list("x/a")) == ["x/a.tar"]
    assert list(store.list("nothing/")) == []
    assert list(store.at("x").list()) == ["a.tar", "b"]


def test_a_missing_object_is_a_key_error_and_has_no_size(store):
    with pytest.raises(StoreKeyError, match="has no object gone"):
        store.get("gone")
    assert issubclass(StoreKeyError, KeyError)
    assert store.head("gone") is None
    store.delete("gone")


def test_deleted_objects_are_gone(store):
    store.put("a", b"1")
    store.delete("a")
    assert store.head("a") is None


def test_a_store_is_picklable_and_equal_by_uri(store):
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert copy.at("x", "y").uri == store.uri + "/x/y"


def test_a_good_store_passes_its_check_and_keeps_no_probe(store):
    store.check()
    assert list(store.list()) == []


def test_a_store_holds_no_key_where_it_is_pickled(s3, s3_server):
    pickled = pickle.dumps(open_store(s3))
    assert s3_server.env["AWS_SECRET_ACCESS_KEY"].encode() not in pickled
    assert s3_server.env["AWS_ACCESS_KEY_ID"].encode() not in pickled


def test_folder_markers_of_consoles_and_pyarrow_are_no_objects(s3, s3_server):
    store = open_store(s3)
    filesystem = pyarrow.fs.S3FileSystem(endpoint_override=urlsplit(s3_server.endpoint).netloc, scheme="http")
    filesystem.create_dir(f"{store.bucket}/{store.prefix}/made/by-arrow")
    store.put("made/x", b"")
    assert list(store.list()) == ["made/x"]
    assert "made/by-arrow/" in set(store.raw_keys())


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/../b", "a/", ".tmp-x"])
def test_an_unusable_key_is_refused(store, key):
    with pytest.raises(StoreError, match="is not a key"):
        store.put(key, b"")


def test_a_folder_can_be_written_in_every_usual_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uris = {open_store(uri).uri for uri in ("s", "./s/", str(tmp_path / "s"), f"file://{tmp_path}/s")}
    assert uris == {str(tmp_path / "s")}
    assert open_store("s3://bucket//a/").uri == "s3://bucket/a"


@pytest.mark.parametrize("uri", ["", "s3://", "gs://bucket", "file://host/x"])
def test_what_is_no_store_says_so(uri):
    with pytest.raises(StoreError, match=r"not a store|no bucket|no folder"):
        open_store(uri)


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(StoreError, match="found a file instead of a folder"):
        open_store(str(tmp_path / "taken" / "store")).check()


def test_a_folder_where_the_file_should_be_is_named(tmp_path):
    (tmp_path / "store" / "taken").mkdir(parents=True)
    with pytest.raises(StorePathError, match=r"found a folder instead of a file .*taken"):
        open_store(str(tmp_path / "store")).put("taken", b"")


def test_a_write_that_fails_halfway_leaves_nothing(tmp_path):
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(StoreError):
        store.put("a", tmp_path / "no such file")
    assert list((tmp_path / "store").iterdir()) == []


def test_wrong_credentials_are_named(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="wrong credentials"):
        open_store(s3).check()


def test_no_credentials_are_named(s3, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreError, match="no credentials"):
        open_store(s3).check()


def test_a_missing_bucket_is_named(s3):
    with pytest.raises(StoreError, match="bucket 'not-made' does not exist"):
        open_store("s3://not-made/x").check()


@pytest.mark.parametrize("listening", [False, True], ids=["refused", "silent"])
def test_an_unreachable_server_is_named_within_15_seconds(s3, monkeypatch, listening):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()  # the kernel accepts, nobody answers
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(StoreError, match="cannot be reached"):
            open_store(s3).check()
    assert time.monotonic() - begin < 15
