"""Writing beside the training: nothing is waited for, nothing needed is lost, a store that is away is tried again."""

import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load

from data_shards.store import FileStore, StoreError
from data_shards.store.fenced_lease import LostLeaseError
from pipelines.placement import Placement
from pipelines.worker.checkpoint.stored import Checkpoints
from pipelines.worker.checkpoint.usage import Usage
from pipelines.worker.checkpoint.writer import CheckpointWriter
from pipelines.worker.engine.snapshot import Snapshot
from pipelines.worker.state import TrainState

PLACEMENT = Placement(
    workers=1, device="cpu", cpus_per_worker=1, zero_stage=0, scan="auto", concurrent_trials=1, nodes=1
)
ABOUT = {"seed": 0, "placement": PLACEMENT, "manifest": "m" * 64}


class SlowStore(FileStore):
    """A folder that takes nothing until it is opened, or that fails as often as it was told to."""

    def __init__(self, folder) -> None:
        super().__init__(folder)
        self.opened, self.failures = threading.Event(), 0
        self.opened.set()

    def put(self, key, data, *, if_absent=False):
        assert self.opened.wait(30)
        if self.failures:
            self.failures -= 1
            raise StoreError("the store is away")
        return super().put(key, data, if_absent=if_absent)


@pytest.fixture
def store(tmp_path) -> SlowStore:
    return SlowStore(tmp_path / "store")


def engine(rank: int = 0) -> SimpleNamespace:
    """What a writer asks of an engine: one weight, counted up in place as a training does."""
    weight, asked = torch.zeros(1), []

    def snapshot() -> Snapshot | None:
        asked.append(rank)
        return Snapshot({"w": weight.clone()}, {"step": torch.tensor(0.0)}) if rank == 0 else None

    device = torch.device("cpu")
    return SimpleNamespace(rank=rank, snapshot=snapshot, weight=weight, asked=asked, device=device)


def writer(store, of, warn=None, patience_s=60.0) -> CheckpointWriter:
    lines = [] if warn is None else warn
    return CheckpointWriter(
        Checkpoints(store), of, model_json=b"{}", about=ABOUT, warn=lines.append, patience_s=patience_s
    )


def state(step: int, best: int = 0) -> TrainState:
    return TrainState(epoch=1, step=step, best_epoch=1 if best else 0, best_step=best)


def weight_of(store, name: str) -> float:
    return float(load(store.get(f"checkpoints/{name}/weights.safetensors"))["w"])


def test_training_does_not_wait_and_the_saved_step_is_stored(store):
    of = engine()
    store.opened.clear()
    with writer(store, of) as written:
        current = state(1)
        written.save(current, Usage())
        of.weight += 1
        current.step = 99
        assert written.is_busy
        store.opened.set()
    assert Checkpoints(store).names() == ["step-0000000001"]
    assert weight_of(store, "step-0000000001") == 0.0


def test_losses_are_those_of_the_tensor_that_was_handed_over(store):
    with writer(store, engine()) as written:
        written.save(state(3), Usage(), torch.tensor([0.5, 0.25, 0.125]))
    assert Checkpoints(store).newest_state()["losses"] == [0.5, 0.25, 0.125]


def test_of_waiting_checkpoints_the_newest_and_its_best_survive(store):
    of = engine()
    store.opened.clear()
    with writer(store, of) as written:
        written.save(state(1), Usage())
        while not written._writes:  # the first is on its way
            pass
        for step, best in [(2, 0), (3, 3), (4, 3), (5, 3)]:
            written.save(state(step, best), Usage())
        store.opened.set()
    assert Checkpoints(store).names() == ["step-0000000001", "step-0000000003", "step-0000000005"]


def test_other_ranks_take_part_and_write_nothing(store):
    of = engine(rank=1)
    with writer(store, of) as written:
        written.save(state(1), Usage())
        assert not written.is_busy
    assert of.asked == [1]
    assert list(store.list()) == []


def test_a_store_away_for_a_while_gets_everything_later(store):
    lines: list[str] = []
    store.failures = 2
    with writer(store, engine(), lines) as written:
        written.save(state(1), Usage())
    assert Checkpoints(store).names() == ["step-0000000001"]
    assert "step 1 cannot be stored (the store is away); training continues" in lines[0]
    assert "was stored" in lines[1]
    assert len(lines) == 2


def test_a_store_that_stays_away_ends_the_training(store):
    store.failures = 1000
    written = writer(store, engine(), patience_s=0.01)
    with pytest.raises(StoreError, match="the store is away"), written:
        written.save(state(1), Usage())
    with pytest.raises(StoreError, match="the store is away"):
        written.check()


def test_a_run_that_another_driver_has_ends_the_training_at_once(store):
    def check() -> None:
        raise LostLeaseError("run 'r' was taken over")

    lines: list[str] = []
    written = CheckpointWriter(
        Checkpoints(store, check=check), engine(), model_json=b"{}", about=ABOUT, warn=lines.append, patience_s=60.0
    )
    with pytest.raises(LostLeaseError), written:
        written.save(state(1), Usage())
    assert lines == list(store.list()) == []


def test_what_waiting_cannot_help_ends_the_training_at_once(store):
    store.folder.mkdir()
    (store.folder / "checkpoints").write_text("not a folder")
    lines: list[str] = []
    written = writer(store, engine(), lines, patience_s=60.0)
    with pytest.raises(StoreError, match="found a file instead of a folder"), written:
        written.save(state(1), Usage())
    assert lines == []


def test_a_training_that_fails_is_not_kept_by_its_checkpoint(store):
    written = writer(store, engine())
    written.__enter__()
    written.save(state(1), Usage())
    written.__exit__(ZeroDivisionError)
    assert not written._thread.is_alive()
