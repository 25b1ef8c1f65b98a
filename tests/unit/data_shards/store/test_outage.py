"""A real S3 server that goes away and comes back: what waits, who is told, and when it ends."""

import pickle
import threading
import time

import numpy as np
import pytest
from absent_server import absent_server
from epochs import epoch_of

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.manifest import open_dataset
from data_shards.store import StoreAwayError, StoreError, open_store, outage
from data_shards.store.lease import lease
from data_shards.store.outage import Notice, listening, span
from data_shards.store.s3.store import S3Store


@pytest.fixture
def server(s3_server, s3, monkeypatch):
    """The S3 server of the tests behind a proxy that can be away; what is absent for 0.5 s is reported."""
    monkeypatch.setattr(outage, "NOTICE_S", 0.5)
    with absent_server(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.address)
        yield proxy


@pytest.fixture
def heard():
    """What is reported during the test."""
    notices: list[Notice] = []
    with listening(notices.append):
        yield notices


def away_for(server, seconds: float, *, silent: bool = False) -> threading.Timer:
    server.leave(silent=silent)
    timer = threading.Timer(seconds, server.come_back)
    timer.start()
    return timer


def test_many_threads_wait_for_the_server_with_one_report(server, s3, heard):
    store = open_store(s3, patience_s=60)
    store.put("before", b"before")
    timer = away_for(server, 3)
    began, found = time.monotonic(), []
    writers = [threading.Thread(target=store.put, args=(f"key-{n}", b"x" * n)) for n in range(4)]
    readers = [threading.Thread(target=lambda: found.append(store.get("before"))) for _ in range(4)]
    [thread.start() for thread in writers + readers]
    [thread.join() for thread in writers + readers]
    timer.join()
    assert 3 <= time.monotonic() - began < 15
    assert found == [b"before"] * 4
    assert [store.get(f"key-{n}") for n in range(4)] == [b"x" * n for n in range(4)]
    away, back = heard
    assert str(away).startswith(f"the store s3://medmamba-tests at {server.address} has not answered since ")
    assert str(away).endswith(": work that needs it waits, for at most 1 minute")
    assert "answers again after" in str(back)


def test_a_store_gone_for_good_is_waited_for_only_once(server, s3, heard):
    store = open_store(s3, patience_s=7)
    server.leave()
    began = time.monotonic()
    for _ in range(4):
        with pytest.raises(StoreAwayError, match=r"gave up after 7 s \(--placement.patience-s\); run the same"):
            store.get("key")
    assert 2 <= time.monotonic() - began < 14, "each operation waited again"
    assert [notice.over_after_s for notice in heard] == [0.0]


def test_a_server_that_was_away_long_ago_is_waited_for_again(server, s3, monkeypatch):
    monkeypatch.setattr(outage, "_FORGOTTEN_S", 0.5)
    store = open_store(s3, patience_s=2)
    server.leave()
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(StoreError):
            store.head("key")
        assert time.monotonic() - began > 0.5
        time.sleep(1)


def test_a_short_hiccup_is_not_reported(server, s3, heard, monkeypatch):
    monkeypatch.setattr(outage, "NOTICE_S", 10.0)
    store = open_store(s3, patience_s=60)
    timer = away_for(server, 1)
    store.put("key", b"data")
    timer.join()
    assert heard == []


def test_the_patience_of_a_store_goes_where_it_goes(s3):
    bucket, _, prefix = s3.removeprefix("s3://").partition("/")
    store = S3Store(bucket, prefix, patience_s=77, silence_s=3)
    made = store.at("runs", "a"), pickle.loads(pickle.dumps(store.at("runs"))), store.with_patience(60)
    assert [(each.patience_s, each.silence_s) for each in made] == [(77, 3)] * 3


@pytest.mark.parametrize("made", [lambda store: store.at("runs"), lambda store: pickle.loads(pickle.dumps(store))])
def test_what_an_impatient_store_makes_gives_up_as_soon(server, s3, made):
    store = made(open_store(s3, patience_s=60).with_patience(1))
    server.leave()
    began = time.monotonic()
    with pytest.raises(StoreError):
        store.head("key")
    assert time.monotonic() - began < 10


def test_a_lease_nobody_took_survives_a_longer_outage(open_server, s3, monkeypatch):
    """On a store without conditional writes, where the lease is an object that is kept fresh."""
    with absent_server(open_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.address)
        store = open_store(f"s3://open/{s3.rpartition('/')[2]}", patience_s=60)
        with lease(store, ".lease", "me", ttl_s=2, settle_s=0.1) as held:
            timer = away_for(proxy, 5)
            time.sleep(3)  # it has ended by now, and nobody can renew it
            held.check()
            timer.join()
            held.check()


def test_conversion_and_reading_of_shards_survive_an_outage(server, s3, heard, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = DataConfig(phantoms=PhantomConfig(num_patients=30, images_per_patient=2, side=32), samples_per_shard=10)
    whole = open_store(str(tmp_path / "undisturbed"))
    digest = convert(config, whole)["digest"]
    out, shards = open_store(s3, patience_s=60).at("datasets/phantoms/default"), []

    def leave_at_the_second_shard(done: int, total: int, unit: str) -> None:
        if unit == "shards" and done and not shards:
            shards.append(away_for(server, 3))

    assert convert(config, out, progress=leave_at_the_second_shard)["digest"] == digest
    assert len(shards) == 1
    shards[0].join()
    data = open_dataset(out)
    timer = away_for(server, 3)
    found = list(epoch_of(data, "test", batch_size=4, image_size=32, train=False))
    timer.join()
    kept = list(epoch_of(open_dataset(whole), "test", batch_size=4, image_size=32, train=False))
    assert all(np.array_equal(here.images, there.images) for here, there in zip(found, kept, strict=True))
    assert [bool(notice.over_after_s) for notice in heard] == [False, True, False, True]


@pytest.mark.parametrize(
    ("seconds", "said"), [(45, "45 s"), (60, "1 minute"), (90, "1:30 minutes"), (900, "15 minutes")]
)
def test_spans_are_said_as_users_read_them(seconds, said):
    assert span(seconds) == said
