"""The lease over conditional writes: one holder at a time, who replaces a dead one, and what a paused one learns."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
from absent_server import absent_server
from fault_proxy import Schedule, fault_proxy

from data_shards.store import StoreError, open_store
from data_shards.store.claims import Claim, Claims
from data_shards.store.fenced_lease import FencedLease, LostLeaseError, fenced_lease, is_lost
from data_shards.store.holder import Holder, this_process
from data_shards.store.lease import LeaseError

ELSEWHERE = Holder("another-host", 7, "another boot pid:[1]", 12345)
HOLD = """
import sys, time
from data_shards.store.fenced_lease import fenced_lease
from data_shards.store.lease import LeaseError
from data_shards.store import open_store
store = open_store(sys.argv[1])
with fenced_lease(store, "leases/x", what="run 'x'", remedy="-", wait_s=0, ttl_s=float(sys.argv[2])) as held:
    print("held", held.number, flush=True)
    sys.stdin.readline()
    try:
        held.check()
        print("still held", flush=True)
    except LeaseError as error:
        print(error, flush=True)
"""


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    return open_store(str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3"))


@pytest.fixture
def folder(tmp_path):
    return open_store(str(tmp_path / "store"))


def lease(store, *, wait_s: float = 0, ttl_s: float = 45, **more):
    return fenced_lease(store, "leases/x", what="run 'x'", remedy="wait for it", wait_s=wait_s, ttl_s=ttl_s, **more)


def holder(store, ttl_s: float) -> subprocess.Popen:
    """Another process that holds the lease until it reads a line."""
    command = [sys.executable, "-c", HOLD, store.uri, str(ttl_s)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("held")
    return process


def claims(store) -> dict[str, dict]:
    return {key: json.loads(store.get(key)) for key in store.list("leases/")}


def leave(store, number: int, **changes) -> None:
    """The claim of a holder that has gone without giving it back."""
    claim = replace(Claim("token", ELSEWHERE, "2026-01-01T00:00:00+00:00", 45.0), **changes)
    store.put(f"leases/x/{number:08d}.json", json.dumps(asdict(claim)).encode())


def test_of_many_at_once_one_works_at_a_time_and_none_is_left(store):
    at_work, most, numbers = [0], [0], []
    lock = threading.Lock()

    def work():
        with lease(store, wait_s=60) as held:
            with lock:
                at_work[0] += 1
                most[0] = max(most[0], at_work[0])
            time.sleep(0.02)
            held.check()
            numbers.append(held.number)
            with lock:
                at_work[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most == [1]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 8
    assert [claim["is_over"] for claim in claims(store).values()] == [True]


def test_the_loser_learns_who_holds_it_since_when_and_what_to_do(folder):
    with lease(folder):
        said = []
        with pytest.raises(LeaseError) as refused, lease(folder, say=said.append, wait_s=0.3):
            pass
    assert str(refused.value).startswith(f"run 'x' has been held by process {os.getpid()} on ")
    assert " since 20" in str(refused.value)
    assert str(refused.value).endswith(": wait for it")
    assert len(said) == 1


def test_a_killed_local_holder_is_replaced_even_before_reaping(folder):
    process = holder(folder, ttl_s=45)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its parent has not asked for it
    began = time.monotonic()
    with lease(folder, wait_s=0) as held:
        assert time.monotonic() - began < 2
        assert held.before.holder.pid == process.pid
        assert held.number == 2
    process.communicate()


def test_a_reused_process_id_is_not_taken_for_the_dead_holder(folder):
    leave(folder, 3, holder=replace(this_process(), started=this_process().started - 1))
    with lease(folder) as held:
        assert held.number == 4


def test_an_equal_process_id_in_another_container_is_ignored(folder):
    another = replace(this_process(), place="this boot pid:[another]", pid=2**22 + 1)
    assert not another.is_dead
    assert replace(another, place=this_process().place).is_dead


def test_a_living_process_of_another_user_is_not_taken_for_dead():
    assert not replace(this_process(), pid=1, started=_started(1)).is_dead


def _started(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def test_a_remote_holder_that_stopped_renewing_is_replaced(store):
    leave(store, 5, ttl_s=2.0)
    began = time.monotonic()
    with lease(store, wait_s=0) as held:  # however short one would wait for a living one
        waited_s = time.monotonic() - began
        assert held.number == 6
        assert held.before.holder == ELSEWHERE
    assert 1.5 < waited_s < 10


def test_a_dead_holder_elsewhere_is_replaced_within_a_minute():
    from data_shards.store.fenced_lease import GRAIN_S, TTL_S, WATCH_S

    assert TTL_S + WATCH_S + GRAIN_S + 2 < 60  # two looks, a second each


def test_a_remote_holder_that_renews_is_reported_once_seen(folder):
    leave(folder, 1)
    stop = threading.Event()

    def renew():
        renewals = 0
        while not stop.wait(0.2):
            renewals += 1
            leave(folder, 1, renewals=renewals)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        began = time.monotonic()
        with pytest.raises(LeaseError, match="process 7 on another-host since 2026-01-01"), lease(folder):
            pass
        assert time.monotonic() - began < 5
    finally:
        stop.set()
        thread.join()


def test_a_living_holder_keeps_its_lease_beyond_its_time(folder):
    with lease(folder, ttl_s=2) as held:
        time.sleep(3)
        with pytest.raises(LeaseError, match="run 'x' has been held"), lease(folder, wait_s=1):
            pass
        held.check(for_s=1)


def test_a_paused_holder_that_continues_learns_its_successor(folder):
    process = holder(folder, ttl_s=2)
    process.send_signal(signal.SIGSTOP)
    try:
        with lease(folder, wait_s=30) as held:
            process.send_signal(signal.SIGCONT)
            print("go", file=process.stdin, flush=True)
            said = process.stdout.readline()
            process.wait()
            held.check()
    finally:
        process.kill()
        process.communicate()
    assert f"run 'x' was taken over by process {os.getpid()} on " in said
    assert "rerun the command" in said
    assert [claim["token"] for claim in claims(folder).values()] != []
    assert max(claims(folder)) == f"leases/x/{held.number:08d}.json"


def test_a_paused_holder_whose_lease_nobody_took_keeps_it(folder):
    process = holder(folder, ttl_s=2)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate("go\n", timeout=30)
    assert said == "still held\n"


def test_a_loss_is_reported_at_once(folder):
    lost = threading.Event()
    with lease(folder, ttl_s=2, on_lost=lost.set) as held:
        leave(folder, held.number + 1)
        assert lost.wait(5)
        with pytest.raises(LeaseError, match="taken over by process 7 on another-host"):
            held.check()
    assert claims(folder)[f"leases/x/{held.number + 1:08d}.json"]["token"] == "token", "the successor's claim is left"


def test_a_number_below_the_highest_holds_nothing(folder):
    """What a slow process sees whose list was old: it wins a number that was removed after others had gone on."""
    leave(folder, 9)
    slow = FencedLease(folder, "leases/x", what="-", ttl_s=45, on_lost=None)
    assert not slow.claim(4, None)
    assert list(claims(folder)) == ["leases/x/00000009.json"]


def test_a_holder_that_renewed_while_presumed_dead_keeps_it(folder):
    leave(folder, 1)
    seen = Claims(folder, "leases/x").read(1)
    leave(folder, 1, renewals=1)
    late = FencedLease(folder, "leases/x", what="-", ttl_s=45, on_lost=None)
    assert not late.claim(2, seen)
    assert list(claims(folder)) == ["leases/x/00000001.json"]


def test_a_holders_notes_reach_its_successor_if_it_died(folder):
    with lease(folder) as held:
        held.note(mlflow_run="abc")
        assert claims(folder)["leases/x/00000001.json"]["about"] == {"mlflow_run": "abc"}
    with lease(folder) as held:
        assert held.before is None
    leave(folder, 3, holder=replace(this_process(), pid=2**22 + 1), about={"mlflow_run": "abc"})
    with lease(folder) as held:
        assert held.before.about == {"mlflow_run": "abc"}


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"token": "x"}', b"\xff\xfe"])
def test_a_damaged_lease_object_does_not_block_for_ever(folder, damage):
    folder.put("leases/x/00000007.json", damage)
    with lease(folder) as held:
        assert held.number == 8


def test_it_is_given_back_when_the_block_is_interrupted(folder):
    with pytest.raises(KeyboardInterrupt), lease(folder):
        raise KeyboardInterrupt
    assert [claim["is_over"] for claim in claims(folder).values()] == [True]


@pytest.mark.usefixtures("s3")
def test_without_conditional_writes_one_still_works_at_a_time(open_server, monkeypatch):
    with fault_proxy(open_server, Schedule(), without=("If-None-Match", "If-Match")) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        store = open_store("s3://open/unconditional")
        held, order = [], []

        def work(name):
            with lease(store, wait_s=60):
                held.append(name)
                order.append(len(held))
                time.sleep(0.2)
                held.remove(name)

        threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert order == [1, 1]


@pytest.mark.usefixtures("s3")
def test_lost_answers_and_refusals_make_no_second_holder(open_server, monkeypatch):
    schedule = Schedule(rate=0.15, kinds=("internal_error", "lost_answer"), seed=3)
    with fault_proxy(open_server, schedule) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        store = open_store("s3://open/faults")
        inside, most = [], []

        def work(name):
            with lease(store, wait_s=60) as held:
                inside.append(name)
                most.append(len(inside))
                held.check()
                inside.remove(name)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert most == [1] * 4


def test_an_outage_longer_than_the_lease_keeps_it_and_is_said(s3_server, s3, monkeypatch, caplog):
    with absent_server(s3_server.endpoint) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.address)
        with lease(open_store(s3, patience_s=60), ttl_s=6) as held:
            server.leave()
            time.sleep(9)
            threading.Timer(2, server.come_back).start()
            held.check()  # waits for the store
            held.check(for_s=1)
    told = [record.message for record in caplog.records if record.name == "data_shards.store.fenced_lease"]
    assert len(told) == 1
    assert told[0].startswith("the lease of run 'x' could not be renewed, and another process may take it: ")


def test_a_lease_that_cannot_be_looked_at_does_not_count_as_lost():
    def unreachable() -> None:
        raise StoreError("the store is away")

    def taken() -> None:
        raise LostLeaseError("another has it")

    assert not is_lost(unreachable)
    assert is_lost(taken)
