"""What a training is told between two steps: the same on all ranks at the same step."""

from __future__ import annotations

import os
import pickle
from types import SimpleNamespace

import pytest

from pipelines.cluster.monitor import (
    FAILED,
    INTERRUPTED,
    PREEMPTED,
    RESIZED,
    STOPS,
    TIME_UP,
    Beat,
    Member,
    Monitor,
    Orders,
)
from pipelines.worker.group.control import BITS, CHECKPOINT, NOTHING, Control, OwnFlags, Stopped, UntilTheEnd, Wants


class Idle:
    is_busy = False


class Busy:
    is_busy = True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Board:
    """A monitor in this process, called as the board's actor is."""

    def __init__(self) -> None:
        self.monitor = Monitor()

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self.monitor, name))


def asked(control: Control, steps: range, writer=Idle) -> list[int]:
    """The steps after which a checkpoint is wanted."""
    return [step for step in steps if control.wants(step, writer()).checkpoint]


def test_a_checkpoint_is_due_after_so_many_steps():
    assert asked(Control(0, OwnFlags(), checkpoint_steps=4), range(1, 14)) == [4, 8, 12]


def test_a_checkpoint_is_due_after_so_many_seconds():
    clock, found = Clock(), []
    control = Control(0, OwnFlags(), checkpoint_s=10, clock=clock)
    for step in range(1, 30):
        clock.now += 1
        found += asked(control, range(step, step + 1))
    assert found == [10, 20]


def test_nothing_is_due_where_nothing_was_set():
    assert asked(Control(0, OwnFlags()), range(1, 50)) == []
    assert UntilTheEnd().wants(1, Idle()) == NOTHING


def test_no_checkpoint_is_begun_while_one_is_still_on_its_way():
    control = Control(0, OwnFlags(), checkpoint_steps=2)
    assert asked(control, range(1, 9), Busy) == []
    assert asked(control, range(9, 10)) == [9]


def test_only_rank_0_has_a_clock():
    assert asked(Control(1, OwnFlags(), checkpoint_steps=1), range(1, 9)) == []


def test_orders_from_outside_become_wants():
    control = Control(1, OwnFlags())
    control._obey(Orders())
    assert control.wants(1, Idle()) == NOTHING
    control._obey(Orders(PREEMPTED))
    assert control.wants(2, Idle()) == Wants(checkpoint=True, stop=PREEMPTED)


@pytest.mark.parametrize("first", [INTERRUPTED, TIME_UP])
def test_an_end_of_the_run_counts_before_a_restart(first):
    control = Control(0, OwnFlags())
    for stop in (RESIZED, PREEMPTED, first):
        control._obey(Orders(stop))
    assert control.wants(1, Idle()).stop == first


def test_a_validation_checks_the_step_before_it():
    control = Control(0, OwnFlags(), checkpoint_steps=4)
    assert asked(control, range(1, 4)) == []
    with control.busy("validating"):
        assert not any(control.wants(3, Idle()).checkpoint for _ in range(10))
        assert (control._doing, control._slow) == ("validating", True)
        control._obey(Orders(INTERRUPTED))
        assert control.wants(3, Idle()) == Wants(checkpoint=True, stop=INTERRUPTED)
    assert asked(Control(0, OwnFlags(), checkpoint_steps=4), range(4, 9)) == [7]


def test_a_rank_that_cannot_continue_stops_all_others_first():
    control = Control(0, OwnFlags())
    control._obey(Orders(INTERRUPTED))
    assert control.give_up()
    assert control.wants(1, Idle()) == Wants(checkpoint=True, stop=FAILED)
    assert not UntilTheEnd().give_up()


def test_every_reason_to_stop_has_a_flag_of_its_own():
    assert len({CHECKPOINT, *BITS.values()}) == 1 + len(STOPS)


def test_waiting_for_data_and_validation_show_as_activity():
    control = Control(0, OwnFlags())
    seen = [(control._doing, control._slow) for _ in control.fetched([1])]
    control.wants(1, Idle())

    def items():
        seen.append((control._doing, control._slow))
        yield 1

    for _ in control.fetched(items()):
        seen.append((control._doing, control._slow))
    with control.busy("validating"):
        before = control._moves
        control.counted(len)("abc")
        seen.append((control._doing, control._moves - before))
    assert seen == [
        ("starting", True), ("waiting for data", True), ("training", False), ("validating", 1),
    ]  # fmt: skip


def test_a_stop_can_travel_between_processes():
    again = pickle.loads(pickle.dumps(Stopped(RESIZED, 12)))
    assert (again.reason, again.step) == (RESIZED, 12)


def lose_the_others(board: Board) -> None:
    """Six steps of a rank whose last beat was before them."""
    with Control(0, OwnFlags(), board=board) as control:
        control.begin(6)
        board.beat.remote(0, Beat(os.getpid(), 6, 0))
        for step in range(7, 13):
            control.wants(step, Idle())
        raise RuntimeError("the other rank is gone")


def test_a_rank_ending_with_an_error_tells_how_far_it_came():
    board = Board()
    board.monitor.begin_group([Member(0, "node", os.getpid())])
    with pytest.raises(RuntimeError):
        lose_the_others(board)
    assert board.monitor.loss().steps == 6
