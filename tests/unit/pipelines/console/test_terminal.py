"""Plain lines where there is no terminal, live bars where there is one, tables that fit."""

import logging
import re
from dataclasses import asdict, replace

import pytest

from data_shards.store.outage import Notice
from pipelines.console import terminal
from pipelines.console.terminal import Terminal, console, show_log_visibly, table
from pipelines.wording import duration

STEP = {"epoch": 2, "epochs": 4, "step": 5, "steps": 10, "images_per_s": 812.3, "loss": 0.4123, "left_s": 41.0}
EPOCH = {
    "epoch": 2, "finished_epoch": 2, "train_loss": 0.5, "val_loss": 0.4, "val_auc": 0.9, "val_accuracy": 0.8,
    "images_per_s": 800.0,
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still until it is moved: `clock[0] += 3`."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def narrow_log(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "40")


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_logged_message_stays_one_line_with_its_brackets(capsys):
    shown = Terminal()
    told = f"step train of run [bold]x[/bold] was begun with {'another ' * 40}configuration"
    shown.say(told)
    shown.trace(told)
    assert lines(capsys) == [told, told]


def test_messages_go_to_stderr_and_tables_to_stdout(capsys):
    Terminal().step("train", "starts")
    table("Steps", ("step", "state"), [("train", "[to do]")])
    seen = capsys.readouterr()
    assert seen.err == "train     starts\n"
    assert "[to do]" in seen.out


def test_plain_progress_shows_epoch_speed_loss_and_time_left(capsys, clock):
    Terminal().progress("train", STEP)
    assert lines(capsys) == ["train: epoch 2/4  812 images/s  loss 0.412  (37 %, 0:41 left)"]


def test_waiting_for_data_is_shown_from_five_percent_on(capsys, clock):
    Terminal().progress("train", {**STEP, "wait_share": 0.049})
    Terminal().progress("train", {**STEP, "wait_share": 0.124})
    assert lines(capsys) == [
        "train: epoch 2/4  812 images/s  loss 0.412  (37 %, 0:41 left)",
        "train: epoch 2/4  812 img/s  wait 12%  loss 0.412  (37 %, 0:41 left)",
    ]


def test_a_warning_of_a_training_is_one_line(capsys):
    Terminal().progress("train", {"warning": "slow: 5 images/s"})
    assert lines(capsys) == ["train: slow: 5 images/s"]


def test_plain_progress_comes_every_ten_seconds_and_at_the_end(capsys, clock):
    shown = Terminal()
    for done in range(1, 41):
        shown.progress("shard", {"done": done, "total": 40, "unit": "shards"})
        clock[0] += 1
    assert lines(capsys) == [
        "shard: 1/40 shards  (2 %)",
        "shard: 11/40 shards  (27 %, 0:29 left)",
        "shard: 21/40 shards  (52 %, 0:19 left)",
        "shard: 31/40 shards  (77 %, 0:09 left)",
        "shard: 40/40 shards  (100 %)",
    ]


def test_each_trial_has_its_own_lines(capsys, clock):
    shown = Terminal()
    for name in ("trial-a", "trial-b", "trial-a"):
        shown.progress(name, STEP)
    assert [line.partition(":")[0] for line in lines(capsys)] == ["trial-a", "trial-b"]


def test_an_epochs_metrics_are_told_each_time_on_one_line(capsys, clock):
    shown = Terminal()
    shown.progress("train", EPOCH)
    shown.progress("train", EPOCH)
    (first, second) = lines(capsys)
    assert first == second
    assert "val loss 0.400, AUC 0.9000, accuracy 0.800" in first
    longest = {**EPOCH, "epoch": 100, "train_loss": 12.3456}
    shown.progress("trial 12/12", longest)
    assert len(lines(capsys)[0]) <= 80


@pytest.mark.parametrize("name", ["train", "trial 12/12"])
def test_a_gpu_epoch_has_a_second_line_on_utilization(name, capsys):
    busy = {"step_ms": 1041.25, "data_wait_share": 0.99, "gpu_memory_gib": 139.04, "gpu_reserved_gib": 140.0}
    shown = Terminal()
    shown.progress(name, EPOCH | busy | {"images_per_s": 12345.6})
    assert lines(capsys)[1:] == [f"{name}: 12346 img/s  1041 ms  wait 99%  GPU 139 GiB"]
    more = {"gpu_utilization": 0.996, "mfu": 0.213, "checkpoint_s": 9.94}
    more |= {"images_per_s": 2345.6, "step_ms": 41.25, "gpu_memory_gib": 8.6}
    shown.progress(name, EPOCH | busy | more)
    (line,) = lines(capsys)[1:]
    assert line == f"{name}: 2346 img/s  41.2 ms  wait 99%  GPU 100% 8.6 GiB  MFU 21%  save 9.9s"
    assert len(line) <= 80


def test_on_a_terminal_bars_are_drawn_and_end(capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = Terminal()
    shown.step("train", "starts")
    shown.progress("train", STEP)
    shown.progress("train", EPOCH)
    shown.progress("evaluate", {"done": 3, "total": 9, "unit": "images"})
    shown.close()
    shown.close()
    seen = capsys.readouterr().err
    assert "epoch 2/4" in seen
    assert "3/9 images" in seen
    assert seen.count("\x1b[?25h") == 1, "the cursor is shown again"


def test_a_quiet_terminal_says_nothing(capsys):
    shown = Terminal(quiet=True)
    shown.say("x")
    shown.progress("train", STEP)
    assert capsys.readouterr() == ("", "")


def test_a_table_keeps_every_cell_whole_by_folding_it(capsys):
    value = "/a/long/path" * 20
    table("Where it lies", ("what", "where"), [("store", value)])
    folded = capsys.readouterr().out
    assert "".join(line.partition("│")[2].strip() for line in folded.splitlines()) == value
    assert max(map(len, folded.splitlines())) <= 110


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (750, "12:30"), (10930, "3:02:10")])
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


EVIL = "a\x1b[2J\x1b]0;title\x07b\x9bc\u202ed\rtail\x08"
SEEN = r"a\x1b[2J\x1b]0;title\x07b\x9bc\u202ed\x0dtail\x08"


def test_control_characters_are_escaped_wherever_text_is_printed(capsys):
    terminal = Terminal()
    terminal.say(EVIL)
    terminal.progress(EVIL, {"done": 1, "total": 1, "unit": EVIL})
    terminal.trace(EVIL)
    console().print(EVIL, soft_wrap=True)
    table(EVIL, (EVIL, "b"), [(EVIL, "x")])
    told = capsys.readouterr()
    for text in (told.out, told.err):
        assert all(c.isprintable() or c == "\n" for c in text)
    assert told.err.count(SEEN) == 4
    assert SEEN in told.out


def test_a_warning_that_python_itself_prints_is_written_out_too(capsys):
    show_log_visibly()
    record = logging.LogRecord("data_shards", logging.WARNING, "", 0, "1 image set aside: %s", (EVIL,), None)
    assert logging.lastResort is not None
    logging.lastResort.handle(record)
    assert capsys.readouterr().err == f"1 image set aside: {SEEN}\n"


def test_markup_in_a_name_stays_text(capsys):
    terminal = Terminal()
    terminal.say("[red]x[/red] [link=http://a]y[/link]")
    table("[bold]t[/bold]", ("[red]c[/red]",), [("[blink]v[/blink]",)])
    told = capsys.readouterr()
    assert "[red]x[/red] [link=http://a]y[/link]" in told.err
    assert all(name in told.out for name in ("[bold]t[/bold]", "[red]c[/red]", "[blink]v[/blink]"))


def drawn(capsys) -> list[str]:
    """The lines of a live display as one sees them, without the codes that draw them."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    return [line for line in re.split(r"[\r\n]+", text) if line]


@pytest.fixture
def terminal_of_80(monkeypatch):
    for name, value in {"TTY_COMPATIBLE": "1", "TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", ["train", "trial 12/12"])
@pytest.mark.parametrize(("wait", "speed"), [(0.0, "12346 images/s"), (0.99, "12346 img/s  wait 99%")])
def test_at_80_columns_a_bar_is_one_line_with_a_labeled_time(name, wait, speed, capsys, terminal_of_80):
    shown = Terminal()
    values = {"epoch": 100, "epochs": 100, "step": 5, "steps": 10, "images_per_s": 12345.6, "loss": 12.345}
    shown.progress(name, {**values, "wait_share": wait, "left_s": 36000.0})
    shown.close()
    seen = drawn(capsys)
    assert max(map(len, seen)) <= 80
    assert all(line.startswith(name) for line in seen)
    assert all(f"epoch 100/100  {speed}  loss 12.345 10:00:00 left" in line for line in seen)


def test_work_without_progress_shows_seconds_and_its_duration(capsys, terminal_of_80, clock):
    shown = Terminal()
    shown.begin("starting Ray on this machine")
    clock[0] += 9
    shown.ready()
    shown.ready()
    seen = drawn(capsys)
    assert any("starting Ray on this machine 0:0" in line for line in seen)
    assert seen[-1] == "starting Ray on this machine: took 0:09"


def test_in_a_log_a_start_is_said_at_once_and_with_progress(capsys, clock):
    shown = Terminal()
    shown.begin("starting 2 training workers")
    assert lines(capsys) == ["starting 2 training workers"]
    clock[0] += 31
    shown.progress("train", STEP)
    assert lines(capsys)[0] == "starting 2 training workers: took 0:31"


def test_a_start_followed_by_a_failure_shows_no_duration(capsys, clock):
    shown = Terminal()
    shown.begin("starting 1 training worker")
    shown.step("train", "failed")
    shown.progress("evaluate", {"done": 1, "total": 2, "unit": "images"})
    assert "took" not in capsys.readouterr().err


def test_an_outage_is_said_once_however_many_processes_notice_it(capsys):
    shown = Terminal()
    away = Notice("MLflow at http://m", since=1000.0, patience_s=900.0, meanwhile="work continues")
    back = replace(away, over_after_s=60.0)
    shown.outage(away)
    shown.progress("train", {"outage": asdict(replace(away, since=1003.0))})
    shown.progress("train", {"outage": asdict(back)})
    shown.outage(back)
    shown.outage(replace(away, since=1055.0))  # of a process that found it out late
    said = lines(capsys)
    assert len(said) == 2
    assert said[0].endswith(": work continues, for at most 15 minutes")
    assert said[1] == "MLflow at http://m answers again after 1 minute"
    shown.outage(replace(away, since=2000.0))
    assert len(lines(capsys)) == 1


def test_what_was_kept_is_said_even_if_others_saw_the_service(capsys):
    shown = Terminal()
    away = Notice("MLflow at http://m", since=1000.0, patience_s=900.0)
    shown.outage(away)
    shown.outage(replace(away, over_after_s=60.0))
    shown.outage(replace(away, over_after_s=61.0, sent="what was logged of 3 epochs is being sent"))
    assert lines(capsys)[-1].endswith("after 1:01 minutes: what was logged of 3 epochs is being sent")
