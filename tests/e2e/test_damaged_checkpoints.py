"""Damage to the newest checkpoint of an interrupted training: the one before is taken, aloud, to the same weights."""

from __future__ import annotations

import json

import pytest
from interrupted_training import interrupt_training

from pipelines.worker.checkpoint.stored import FILES, STATE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return interrupt_training(tmp_path_factory.mktemp("damaged"))


def epoch_of(state) -> int:
    return json.loads(state.read_text())["epoch"]


def flip_bit(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_in_half(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip_bit, cut_in_half, delete], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", [*FILES, STATE])
def test_the_checkpoint_before_a_damaged_one_is_taken_and_named(training, file, damage):
    training.restore()
    before, newest = sorted((training.train / "checkpoints").glob("*/train.json"))
    epoch = epoch_of(before)
    damage(newest.with_name(file))
    done = training.resume()
    # Without the file that makes it valid it is an upload that a kill cut off, of which nothing was lost.
    is_told = f"checkpoint {newest.parent.name} is damaged" in done.stderr
    assert is_told == (not (file == STATE and damage is delete)), done.stderr
    assert f"training resumes after epoch {epoch}" in done.stderr
    assert training.is_equal(done)


def test_two_damaged_checkpoints_make_the_command_say_what_to_do(training):
    training.restore()
    for state in (training.train / "checkpoints").glob("*/train.json"):
        flip_bit(state.with_name("moments.safetensors"))
    done = training.resume(code=1)
    assert "delete that folder to train from the beginning, or use another --run" in done.stderr
    assert "all 2 checkpoints" in done.stderr
