"""What the board knows of the ranks: who has stalled, what a loss costs, what is asked of them."""

from __future__ import annotations

import pytest

from pipelines.cluster.monitor import (
    INTERRUPTED,
    PREEMPTED,
    RESIZED,
    SLOW_S,
    TIME_UP,
    Beat,
    Limits,
    Loss,
    Member,
    Monitor,
    Orders,
    loss_line,
)

LIMIT_S = 60.0
LIMITS = Limits(LIMIT_S)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def monitor(clock):
    monitor = Monitor(clock)
    monitor.begin_group([Member(0, "10.0.0.1", 100), Member(1, "10.0.0.2", 200)])
    return monitor


def work(monitor, clock, seconds: int, beats) -> None:
    """Lets so many seconds pass; `beats(second)` are the beats of each, by rank."""
    for second in range(seconds):
        clock.now += 1
        for rank, beat in beats(second).items():
            monitor.beat(rank, beat)


def both(second: int) -> dict[int, Beat]:
    return {0: Beat(100, 2 * second, second, "training"), 1: Beat(200, 2 * second, second, "training")}


def test_ranks_that_make_steps_do_not_stand_still(monitor, clock):
    work(monitor, clock, 200, both)
    assert monitor.stalled(LIMITS) == ""


def test_a_rank_without_a_sign_of_life_is_named_with_its_node(monitor, clock):
    work(monitor, clock, 10, both)
    work(monitor, clock, 59, lambda second: {0: Beat(100, 20, 99, "training")})
    assert monitor.stalled(LIMITS) == ""
    work(monitor, clock, 1, lambda second: {0: Beat(100, 20, 99, "training")})
    assert monitor.stalled(LIMITS) == "rank 1 (process 200 on node 10.0.0.2) sent no heartbeat for 60 s"


def test_a_rank_waiting_for_a_busy_one_is_not_stalled(monitor, clock):
    work(monitor, clock, 10, both)
    slow = {0: Beat(100, 20, 99, "validating", True), 1: Beat(200, 20, 99, "training")}
    work(monitor, clock, int(SLOW_S), lambda second: slow)
    assert monitor.stalled(LIMITS) == ""
    work(monitor, clock, 61, lambda second: slow)
    assert monitor.stalled(LIMITS) == (
        f"rank 0 (process 100 on node 10.0.0.1) made no progress for {SLOW_S + 60:.0f} s (validating)"
    )


def test_where_all_wait_the_rank_one_step_behind_is_named(monitor, clock):
    work(monitor, clock, 10, both)
    work(monitor, clock, 61, lambda second: {0: Beat(100, 21, 9, "training"), 1: Beat(200, 20, 9, "training")})
    assert monitor.stalled(LIMITS).startswith("rank 1 (process 200 on node 10.0.0.2) made no progress for 60 s")


def test_slow_micro_batches_allow_a_few_times_as_long(monitor, clock):
    work(monitor, clock, 120, lambda second: {r: Beat(100 * r + 100, second // 40, second // 40) for r in (0, 1)})
    work(monitor, clock, 150, lambda second: {r: Beat(100 * r + 100, 3, 3) for r in (0, 1)})
    assert monitor.stalled(LIMITS) == ""


def test_processes_that_import_have_time_and_then_are_named(monitor, clock):
    clock.now += SLOW_S + LIMIT_S - 1
    assert monitor.stalled(LIMITS) == ""
    clock.now += 1
    assert "rank 0" in monitor.stalled(LIMITS)
    assert "rank 1" in monitor.stalled(LIMITS)


def test_a_rank_that_has_ended_is_waited_for_no_more(monitor, clock):
    work(monitor, clock, 10, both)
    monitor.done(1)
    monitor.beat(1, Beat(200, 20, 10))
    work(monitor, clock, 100, lambda second: {0: Beat(100, 20 + second, second)})
    assert monitor.stalled(LIMITS) == ""


def test_the_loss_is_what_followed_the_newest_checkpoint_of_all(monitor, clock):
    work(monitor, clock, 101, both)  # step 0 in the first second, step 200 in the last
    monitor.saved(178)
    loss = monitor.loss()
    assert (loss.seconds, loss.steps, loss.workers, loss.saved_step) == (11, 22, 2, 178)
    assert loss.worker_hours == pytest.approx(200 / 3600)
    monitor.count_from(2.0 - 200 / 3600)
    assert loss_line(monitor.loss(), gpus=True) == "lost 22 s (22 steps) of 2.0 GPU-hours"


def test_a_resumed_group_has_lost_nothing_from_before(monitor, clock):
    work(monitor, clock, 11, lambda second: {0: Beat(100, 500 + second, second)})
    assert (monitor.loss().seconds, monitor.loss().steps, monitor.loss().saved_step) == (10, 10, -1)


def test_a_line_about_nothing_lost_says_so():
    assert loss_line(Loss(0, 0, 2, 0.5), gpus=False) == "lost 0 s (0 steps) of 0.5 worker-hours"
    assert loss_line(Loss(90, 1, 2, 0.01), gpus=True) == "lost 3 min (1 step) of 36 GPU-seconds"


def test_orders_reach_the_ranks_and_an_end_outlives_the_group(monitor):
    monitor.ask(RESIZED)
    assert monitor.beat(1, Beat(200, 1, 1)) == Orders(RESIZED)
    monitor.ask(INTERRUPTED)
    monitor.ask(PREEMPTED)
    assert monitor.beat(1, Beat(200, 1, 1)) == Orders(INTERRUPTED)
    assert monitor.beat(0, Beat(77, 1, 1)) == Orders(""), "a process of an earlier group is told nothing"
    monitor.begin_group([Member(0, "10.0.0.1", 300)])
    assert monitor.beat(0, Beat(300, 1, 1)) == Orders(INTERRUPTED)


def test_a_requested_restart_is_over_with_the_next_group(monitor):
    monitor.ask(RESIZED)
    monitor.begin_group([Member(0, "10.0.0.1", 300)])
    assert monitor.beat(0, Beat(300, 1, 1)) == Orders("")
    monitor.ask(TIME_UP)
    assert monitor.beat(0, Beat(300, 1, 1)) == Orders(TIME_UP)
