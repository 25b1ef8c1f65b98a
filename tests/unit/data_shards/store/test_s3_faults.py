"""An S3 server behind a proxy that breaks what passes: what the store survives, and how it says what it cannot."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fault_proxy import BURST, KINDS, Schedule, fault_proxy

from data_shards.store import StoreError, open_store
from data_shards.store.s3 import client as s3_client
from data_shards.store.s3 import store as s3_store
from data_shards.store.s3 import upload as s3_upload
from data_shards.store.s3.client import Pace
from data_shards.store.s3.errors import Trouble
from data_shards.store.s3.store import S3Store

DATA = bytes(range(256)) * 1200  # several pieces of a body


@pytest.fixture
def faults(s3, s3_server, monkeypatch):
    """The schedule of a proxy that this process's S3 calls go through; without faults until told."""
    schedule = Schedule(stall_s=0.15)
    with fault_proxy(s3_server.endpoint, schedule) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        yield schedule


@pytest.fixture
def small_parts(monkeypatch):
    """Objects of more than 5 MiB go in parts of 5 MiB, the least that S3 allows; they come in windows of 4 MiB."""
    monkeypatch.setattr(s3_store, "_WINDOW_BYTES", 4 << 20)
    monkeypatch.setattr(s3_store, "MULTIPART_BYTES", 5 << 20)
    monkeypatch.setattr(s3_upload, "_PART_BYTES", 5 << 20)
    return os.urandom(12 << 20)


def hasty(uri: str, **changes) -> S3Store:
    """A store that gives up after a second."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return S3Store(bucket, prefix, **{"patience_s": 1.0, "silence_s": 2.0, **changes})


def uploads(store: S3Store) -> list[str]:
    page = store.client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)
    return [upload["Key"] for upload in page.get("Uploads", ())]


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_survives_one_fault_of_every_kind(s3, faults, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Pace, "MOST_S", 0.05)  # the pace has a test of its own
    store = open_store(s3)
    (tmp_path / "file").write_bytes(DATA)
    operations = [
        lambda: store.put("a", DATA),
        lambda: store.put("b", tmp_path / "file"),
        lambda: store.put("c", DATA, if_absent=True),
        lambda: not store.put("c", b"other", if_absent=True),
        lambda: store.ensure("c", DATA) in (True, False),
        lambda: store.get("b") == DATA,
        lambda: store.get("c", start=1000, length=200_000) == DATA[1000:201_000] or kind == "flipped_get",
        lambda: store.get("a", start=1000) == DATA[1000:] or kind == "flipped_get",
        lambda: store.fetch("a", tmp_path / "copy") is None and (tmp_path / "copy").read_bytes() == DATA,
        lambda: store.head("a") == len(DATA) and store.head("gone") is None,
        lambda: store.holds("a", DATA) and not store.holds("a", DATA[::-1]),
        lambda: list(store.list()) == ["a", "b", "c"],
        lambda: store.delete("a") is None and store.head("a") is None,
    ]
    injected = 0
    for number, operation in enumerate(operations):
        faults._next.clear()
        faults.once(kind)
        assert operation(), number
        injected += faults.is_spent
    assert faults.counts == {kind: injected}
    assert injected >= 3


def test_a_burst_of_refusals_is_waited_out_by_many_at_once(s3, faults):
    store = open_store(s3)
    faults.once(*["slow_down"] * 4 * BURST)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: store.put(f"{i}", b"%d" % i, if_absent=True), range(16)))
    assert [store.get(f"{i}") for i in range(16)] == [b"%d" % i for i in range(16)]
    assert faults.counts["slow_down"] == 4 * BURST


def test_a_broken_body_goes_on_at_the_byte_where_it_stopped(s3, faults):
    store = open_store(s3)
    store.put("k", DATA)
    faults.requests.clear()
    faults.once("truncated", "reset_response")
    assert store.get("k") == DATA
    first, *more = [request.range for request in faults.requests]
    starts = [int(text.removeprefix("bytes=").rstrip("-")) for text in more]
    assert first == ""
    assert len(starts) == 2
    assert 0 < starts[0] <= starts[1]


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("without", [(), ("If-Match",)], ids=["If-Match", "If-Match ignored"])
def test_an_object_replaced_while_read_is_never_spliced(open_server, monkeypatch, tmp_path, without):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", open_server)
    direct, new = open_store("s3://open/spliced"), DATA[::-1]
    assert direct.client  # of this address; the proxy's is another
    schedule = Schedule()

    def replace(request):
        if request.range and not request.range.startswith("bytes=0-"):  # someone asks for the rest
            schedule.meanwhile = lambda request: None
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", open_server)
            direct.put("k", new)

    with fault_proxy(open_server, schedule, without=without) as address:
        for read in (lambda store: store.get("k"), lambda store: copied(store, tmp_path)):
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
            store = open_store("s3://open/spliced")
            store.put("k", DATA)
            schedule.meanwhile = replace
            schedule.once("truncated")
            assert read(store) == new


def copied(store, folder) -> bytes:
    store.fetch("k", folder / "copy")
    return (folder / "copy").read_bytes()


def test_a_write_whose_answer_was_lost_counts_if_bytes_are_ours(s3, faults):
    store = open_store(s3)
    faults.once("lost_answer")
    assert store.put("k", b"ours", if_absent=True)
    faults.once("internal_error")  # unsure as well, but another's object is there
    assert not store.put("k", b"mine", if_absent=True)
    faults.once("lost_answer")
    assert not store.put("k", b"mine", if_absent=True)
    assert store.get("k") == b"ours"
    assert faults.counts == {"lost_answer": 2, "internal_error": 1}


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("slow_down", "keeps asking to slow down .*fewer workers"),
        ("internal_error", "keeps failing .*its log"),
        ("reset_before", "cannot be reached"),
        ("stall", "cannot be reached .*[Tt]imeout"),
        ("expired", "credentials have expired .*renew them"),
        ("flipped_put", "damages the data"),
    ],
)
def test_what_never_ends_is_told_in_bounded_time(s3, faults, monkeypatch, kind, sentence):
    monkeypatch.setitem(s3_client.PATIENCE_OF, Trouble.EXPIRED, 0.5)
    store = hasty(s3, silence_s=0.1)
    store.put("k", b"0123456789")
    faults.always, begin = kind, time.monotonic()
    with pytest.raises(StoreError, match=sentence):
        store.put("k", DATA) if kind == "flipped_put" else store.get("k")
    assert time.monotonic() - begin < 5


def test_expired_keys_are_read_again_from_a_rewritten_file(s3, faults, monkeypatch, tmp_path):
    good = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    for name in good:
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = old\naws_secret_access_key = old\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    faults.always = "expired"

    def rewrite():
        while not faults.counts["expired"]:
            time.sleep(0.02)
        file.write_text("[default]\n" + "".join(f"{name.lower()} = {value}\n" for name, value in good.items()))
        faults.always = ""

    thread = threading.Thread(target=rewrite)
    thread.start()
    assert open_store(s3).put("k", b"written with the new keys")  # the server itself would refuse the old ones
    thread.join()


def test_a_fixed_key_in_a_file_is_found_by_the_next_operation(s3, monkeypatch, tmp_path):
    good = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    for name in good:
        monkeypatch.delenv(name)
    file, store = tmp_path / "credentials", open_store(s3)
    file.write_text("[default]\naws_access_key_id = old\naws_secret_access_key = old\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    with pytest.raises(StoreError, match="wrong credentials"):
        store.head("k")
    file.write_text("[default]\n" + "".join(f"{name.lower()} = {value}\n" for name, value in good.items()))
    assert store.head("k") is None


def test_a_reader_told_to_slow_down_is_soon_as_fast_again():
    now = [0.0]
    pace = Pace(clock=lambda: now[0], sleep=lambda wait_s: now.__setitem__(0, now[0] + wait_s))

    def seconds_for(requests: int) -> float:
        begin = now[0]
        for _ in range(requests):
            pace.wait()
        return now[0] - begin

    assert seconds_for(100) == 0
    for _ in range(10):  # a burst of answers to requests sent together counts once
        pace.slower()
    assert seconds_for(10) == pytest.approx(9 * Pace.FIRST_S, rel=0.3)
    for _ in range(10):
        now[0] += 1
        pace.slower()
    assert 1 < seconds_for(10) < 9 * Pace.MOST_S
    now[0] += 20
    assert seconds_for(100) == 0


def test_two_writers_of_equal_objects_succeed_through_faults(s3, faults):
    faults.rate, faults.stall_s = 0.4, 0.05
    objects = {f"shards/{i}.tar": bytes([i]) * 5000 for i in range(12)}

    def write_all(_):
        store = open_store(s3)
        return sum(store.ensure(key, data) for key, data in objects.items())

    with ThreadPoolExecutor(2) as pool:
        written = list(pool.map(write_all, range(2)))
    faults.rate = 0.0
    assert sum(written) >= len(objects)  # both may have written one whose answer was lost
    assert {key: open_store(s3).get(key) for key in open_store(s3).list()} == objects
    assert faults.counts.total() > 10


@pytest.mark.parametrize("kind", ["flipped_put", "lost_answer"])
def test_a_large_object_goes_in_parts_through_faults(s3, faults, small_parts, tmp_path, kind):
    store = open_store(s3)
    (tmp_path / "file").write_bytes(small_parts)
    faults.once(*[kind] * 4)  # of six requests: begin, three parts, complete, and a look before
    assert store.put("k", tmp_path / "file" if kind == "flipped_put" else small_parts, if_absent=True)
    assert faults.counts[kind] >= 3
    assert store.client.head_object(Bucket=store.bucket, Key=f"{store.prefix}/k")["ETag"].endswith('-3"')
    faults._next.clear()
    faults.once("truncated", "flipped_get", "shortened")
    store.fetch("k", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == small_parts
    store.clean(older_than_s=0)  # what was begun without that we heard of it
    assert uploads(store) == []


@pytest.mark.parametrize("new_bytes", [3 << 20, 12 << 20], ids=["shorter", "as long"])
def test_an_object_replaced_between_two_windows_is_fetched_again(s3, faults, small_parts, tmp_path, new_bytes):
    store, new = open_store(s3), small_parts[::-1][:new_bytes]
    store.put("k", small_parts)

    def replace(request):
        if request.range.startswith(f"bytes={4 << 20}-"):
            faults.meanwhile = lambda request: None
            store.put("k", new)

    faults.meanwhile = replace
    assert copied(store, tmp_path) == new


def test_a_large_object_is_written_only_where_nothing_is(s3, faults, small_parts):
    store = open_store(s3)

    def overtake(request):
        if request.method == "POST" and "uploadId" in request.path:
            faults.meanwhile = lambda request: None
            store.put("k", b"theirs", if_absent=True)

    faults.meanwhile = overtake
    assert not store.put("k", small_parts, if_absent=True)
    assert store.get("k") == b"theirs"
    faults.requests.clear()
    assert not store.put("k", small_parts, if_absent=True)
    assert len(faults.requests) == 1  # nothing was sent in vain
    assert uploads(store) == []


def test_an_upload_that_fails_leaves_no_parts(s3, faults, small_parts):
    store = hasty(s3, patience_s=5)  # time for the second attempt also on a busy machine
    faults.once("internal_error")
    faults.always = "flipped_put"
    with pytest.raises(StoreError, match="damages the data"):
        store.put("k", small_parts)
    assert faults.counts["flipped_put"] > 1
    assert uploads(store) == []
    assert store.head("k") is None


def test_old_parts_of_killed_processes_are_aborted_in_our_prefix(s3, faults, small_parts):
    ours, other = open_store(f"{s3}/ours"), open_store(f"{s3}/other")
    faults.stall_s = 30
    script = (
        "import os, sys; from data_shards.store.s3 import store as s3_store; from data_shards.store import open_store\n"
        "s3_store.MULTIPART_BYTES = 5 << 20; open_store(sys.argv[1]).put('big.tar', os.urandom(40 << 20))"
    )
    for store in (ours, other):
        faults._next.clear()
        process = subprocess.Popen([sys.executable, "-c", script, store.uri])
        while not uploads(store):
            assert process.poll() is None
            time.sleep(0.05)
        faults.once("stall", "stall")
        process.send_signal(signal.SIGKILL)
        process.wait()
    faults._next.clear()
    assert ours.clean(older_than_s=1e9) == ()  # this server dates every upload to 2010
    assert ours.clean(older_than_s=24 * 3600) == ("big.tar",)
    assert uploads(ours) == []
    assert uploads(other) != []


@pytest.mark.usefixtures("s3")
def test_a_server_ignoring_conditions_is_probed_once(open_server, monkeypatch, caplog):
    schedule = Schedule()
    with fault_proxy(open_server, schedule, without=("If-None-Match", "If-Match")) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        store = open_store("s3://open/asked-for-conditions")
        with caplog.at_level(logging.WARNING):
            store.check()
            asked = len(schedule.requests)
            assert not store.conditional
            assert not store.at("below").conditional
        assert len(schedule.requests) == asked
        assert len([record for record in caplog.records if "If-None-Match" in record.message]) == 1
        assert list(store.list()) == []
        assert store.put("k", b"one", if_absent=True)
        assert not store.put("k", b"two", if_absent=True)  # as far as one can see by looking first
        assert store.ensure("k", b"two")
        assert store.get("k") == b"two"


def test_a_good_server_heeds_conditions_also_through_faults(s3, faults):
    faults.once("lost_answer", "lost_answer", "slow_down")
    assert open_store(s3).conditional
    assert list(open_store(s3).list()) == []


def test_a_briefly_refused_look_is_answered_by_asking_why(s3, faults):
    store = open_store(s3)
    store.put("a", DATA)
    for key, size in (("a", len(DATA)), ("gone", None)):
        faults.once("expired")
        assert store.head(key) == size
        assert faults.is_spent
