"""Checkpoints of the first format: what Ray's list names, on the world that wrote them, without running pickles."""

import json
import pickle

import pytest
import torch

from data_shards.store import open_store
from pipelines.placement import Placement
from pipelines.worker.engine.first_format import SNAPSHOT, check_placement, find_old_checkpoint, tensors_only
from pipelines.worker.state import ResumeError

FIRST, SECOND = "checkpoint_2026-01-01_00-00-00.000001", "checkpoint_2026-01-01_00-00-09.000001"


@pytest.fixture
def out(tmp_path):
    return open_store(str(tmp_path / "store")).at("runs/r/train")


def snapshot(newest: str | None) -> bytes:
    return json.dumps({"latest_checkpoint_result": newest and {"checkpoint_dir_name": newest, "metrics": {}}}).encode()


def placement(workers=1, zero_stage=0) -> Placement:
    return Placement(
        workers=workers,
        device="cpu",
        cpus_per_worker=1,
        zero_stage=zero_stage,
        scan="auto",
        concurrent_trials=1,
        nodes=1,
    )


def test_without_a_snapshot_there_is_no_checkpoint(out):
    assert find_old_checkpoint(out) is None
    out.put(f"ray/{FIRST}/train.json", b"")
    assert find_old_checkpoint(out) is None
    out.put(SNAPSHOT, snapshot(None))
    assert find_old_checkpoint(out) is None


def test_a_checkpoint_uploading_at_the_kill_is_ignored(out):
    out.put(f"ray/{FIRST}/train.json", b'{"epoch": 1}')
    out.put(f"ray/{SECOND}/train.json", b"")
    out.put(SNAPSHOT, snapshot(FIRST))
    found = find_old_checkpoint(out)
    assert (found.described, found.prefix) == ({"epoch": 1}, f"ray/{FIRST}")


@pytest.mark.parametrize(
    ("kept", "state"),
    [(snapshot(FIRST)[:20], b"{}"), (b"", b"{}"), (snapshot(FIRST), b""), (snapshot(FIRST), None), (b"{}", b"{}")],
    ids=["torn snapshot", "empty snapshot", "torn train.json", "no train.json", "another snapshot"],
)
def test_what_is_torn_is_reported_with_what_to_delete(out, kept, state):
    out.put(SNAPSHOT, kept)
    if state is not None:
        out.put(f"ray/{FIRST}/train.json", state)
    with pytest.raises(ResumeError, match=f"delete {out.uri}/ray to train from the beginning, or use another --run"):
        find_old_checkpoint(out)


@pytest.mark.parametrize("there", [True, False], ids=["damaged", "missing"])
def test_a_damaged_or_missing_file_is_named(out, there, tmp_path):
    state = {"epoch": 1, "digests": {"engine/x.pt": "0" * 64}}
    out.put(f"ray/{FIRST}/train.json", json.dumps(state).encode())
    out.put(SNAPSHOT, snapshot(FIRST))
    if there:
        out.put(f"ray/{FIRST}/engine/x.pt", b"other")
    with pytest.raises(ResumeError, match=r"engine/x\.pt .*damaged.*delete .*/ray .*--run NAME"):
        find_old_checkpoint(out).fetch(out, tmp_path)


@pytest.mark.parametrize(
    "now", [placement(workers=2), placement(zero_stage=1), placement(2, 2)], ids=["ranks", "stage", "both"]
)
def test_other_rank_counts_or_zero_stages_are_refused(now):
    described = {"epoch": 3, "ranks": 1, "zero_stage": 0}
    check_placement(described, placement())
    with pytest.raises(ResumeError, match=r"--placement\.workers 1 --placement\.zero-stage 0.*--run NAME") as error:
        check_placement(described, now)
    assert f"{now.workers} at stage {now.zero_stage}" in str(error.value)


class Harmful:
    """Runs code when it is unpickled."""

    def __init__(self, mark) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path, mark = tmp_path / "mp_rank_00_model_states.pt", tmp_path / "ran"
    torch.save({"module": {"w": torch.zeros(2)}, "optimizer": Harmful(mark)}, path)
    with tensors_only(), pytest.raises(ResumeError, match=r"mp_rank_00_model_states\.pt .*could run code") as error:
        torch.load(path, weights_only=False)
    assert "(io.open)" in str(error.value)
    assert "you have two options" not in str(error.value), "torch explains how to run it"
    assert not mark.exists()
    pickle.loads(pickle.dumps(Harmful(mark))).close()
    assert mark.exists(), "the pickle is as harmful as the test says"


def test_tensors_and_the_records_of_deepspeed_are_read(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    saved = {"a": torch.ones(2), "scaler": LossScaler(1.0), "stage": ZeroStageEnum(1), "at": fragment_address(2, 3)}
    torch.save(saved, tmp_path / "x.pt")
    with tensors_only():
        found = torch.load(tmp_path / "x.pt", weights_only=False)
    assert found["a"].equal(saved["a"])
    assert (found["stage"], found["at"], found["scaler"].cur_scale) == (1, fragment_address(2, 3), 1.0)
    assert torch.load.__name__ == "load", "torch.load is torch's own again"
