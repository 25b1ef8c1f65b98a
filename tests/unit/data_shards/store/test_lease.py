"""The lease over a store that ignores conditional writes: one driver at a time, and what ends it."""

import json
import re
import subprocess
import sys
import threading
import time

import pytest
from fault_proxy import Schedule, fault_proxy

from data_shards.store import StoreError, open_store
from data_shards.store.lease import LeaseError, lease, one_driver
from data_shards.store.s3.store import S3Store


@pytest.fixture
def store(open_server, s3, monkeypatch):
    """On a server that ignores conditions, through a proxy that breaks some of what passes."""
    schedule = Schedule(rate=0.1, kinds=("internal_error", "lost_answer", "truncated", "flipped_put"), seed=1)
    with fault_proxy(open_server, schedule, without=("If-None-Match", "If-Match")) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        yield open_store(f"s3://open/{s3.rpartition('/')[2]}")


def test_of_concurrent_drivers_one_works_and_others_are_told(store):
    held, refused, together = [], [], threading.Barrier(4)

    def drive(name):
        together.wait()
        try:
            with lease(store, ".lease", name, settle_s=1.5):
                held.append(name)
                time.sleep(2)  # longer than the others look
        except LeaseError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=drive, args=(f"driver {i}",)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(held) == 1
    assert len(refused) == 3
    assert all(re.search(r"driver \d is working", text) for text in refused)
    assert store.head(".lease") is None


def test_a_second_driver_waits_until_the_first_has_finished(store):
    order = []

    def second():
        with lease(store, ".lease", "second", settle_s=0.1, wait_s=20):
            order.append("second")

    with lease(store, ".lease", "first", settle_s=0.1):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.5)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.slow
def test_a_killed_drivers_lease_ends_and_a_living_ones_does_not(store):
    script = (
        "import sys, time; from data_shards.store.lease import lease; from data_shards.store import open_store\n"
        "with lease(open_store(sys.argv[1]), '.lease', 'the killed one', ttl_s=3, settle_s=0.1):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, store.uri], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(LeaseError, match=r"the killed one is working .* ends 3 s after"), lease(store, ".lease", "me"):
        pass
    time.sleep(4)
    with pytest.raises(LeaseError, match="the killed one"), lease(store, ".lease", "me"):
        pass
    process.kill()
    process.communicate()
    with lease(store, ".lease", "me", settle_s=0.1, wait_s=20) as held:
        held.check()


def test_a_lease_that_was_taken_away_is_noticed(store):
    with lease(store, ".lease", "first", ttl_s=6, settle_s=0.1) as held:
        held.check()
        store.put(".lease", json.dumps({"owner": "thief", "ttl_s": 60, "token": "x"}).encode())
        (keeper,) = (thread for thread in threading.enumerate() if thread.name == "lease .lease")
        keeper.join(30)
        with pytest.raises(LeaseError, match="another driver has taken it"):
            held.check()
    assert b"thief" in store.get(".lease")


@pytest.mark.usefixtures("s3")
def test_an_unreachable_store_is_not_a_store_without_a_lease(open_server, monkeypatch):
    schedule = Schedule(always="internal_error")
    with fault_proxy(open_server, schedule) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        with (
            pytest.raises(StoreError, match="keeps failing"),
            lease(S3Store("open", "leased", patience_s=0.3), ".lease", "me"),
        ):
            pass
    assert {request.method for request in schedule.requests} == {"GET"}


def test_a_store_with_conditional_writes_needs_no_lease(tmp_path, store):
    folder = open_store(str(tmp_path))
    with one_driver(folder, ".lease", "a") as first, one_driver(folder, ".lease", "b") as second:
        assert (first, second) == (None, None)
    with one_driver(store, ".lease", "a") as held:
        held.check()
        with pytest.raises(LeaseError, match="a is working"), one_driver(store, ".lease", "b"):
            pass
