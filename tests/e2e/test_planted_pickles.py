"""Pickles planted wherever a training or a sweep keeps something: none of them is run."""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from chain import TINY, medmamba
from interrupted_training import RUN, TRAIN, Interrupted, interrupt_training

from medmamba.config import MODEL
from pipelines.worker.checkpoint.stored import FILES, STATE
from pipelines.worker.engine.first_format import SNAPSHOT
from pipelines.worker.state import described_bytes, file_digest

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
from ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SCRIPT = Path(__file__).with_name("first_format_rank.py")
# Names that Ray, DeepSpeed, torch, Tune or pickle's other friends read, below the folder of a checkpoint or of a step.
BESIDE = [
    "engine/engine/mp_rank_00_model_states.pt", "engine/engine/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "mp_rank_00_model_states.pt", "pytorch_model.bin", "optimizer.pt", "state.pkl", "weights.pt", "moments.pt",
    ".metadata", ".metadata.json", ".tune_metadata",
]  # fmt: skip
OF_RAY = [
    "tuner.pkl", "trainer.pkl", ".validate_storage_marker", "searcher-state-2026-01-01_00-00-00.pkl",
    "search_gen_state-2026-01-01_00-00-00.json", "experiment_state-2026-01-01_00-00-00.json", "tuner.json",
    "checkpoint_manager_snapshot.json", "checkpoint_2026-01-01_00-00-00.000001/train.json",
    "checkpoint_2026-01-01_00-00-00.000001/engine/engine/mp_rank_00_model_states.pt",
]  # fmt: skip


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Interrupted:
    return interrupt_training(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def ran(tmp_path) -> Path:
    """The folder in which a pickle that runs makes a file."""
    folder = tmp_path / "ran"
    folder.mkdir()
    return folder


def harmful(ran: Path, place: str) -> bytes:
    """A pickle, in torch's own wrapping where the name is one of torch's."""
    evil = Harmful(ran / place.replace("/", "-"))
    if not place.endswith((".pt", ".bin")):
        return pickle.dumps(evil)
    file = io.BytesIO()
    torch.save({"module": {}, "optimizer": evil}, file)
    return file.getvalue()


def plant(folder: Path, places: list[str], ran: Path) -> None:
    for place in places:
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(harmful(ran, place))


def test_the_pickles_of_this_test_are_harmful(ran):
    pickle.loads(harmful(ran, "tuner.pkl")).close()
    torch.load(io.BytesIO(harmful(ran, "optimizer.pt")), weights_only=False)["optimizer"].close()
    assert {path.name for path in ran.iterdir()} == {"tuner.pkl", "optimizer.pt"}


def test_a_training_runs_no_pickle_next_to_its_checkpoints(training, ran):
    training.restore()
    newest = sorted((training.train / "checkpoints").iterdir())[-1]
    plant(newest, BESIDE, ran)
    plant(newest.parent / "step-9999999999", [*BESIDE, STATE, *FILES], ran)
    plant(training.train, BESIDE, ran)
    plant(training.train / "ray", OF_RAY, ran)
    done = training.resume()
    assert list(ran.iterdir()) == []
    assert training.is_equal(done)


@pytest.mark.parametrize("file", FILES)
def test_a_pickle_with_a_fixed_digest_is_refused_as_checkpoint(training, ran, file):
    training.restore()
    state = sorted((training.train / "checkpoints").glob("*/train.json"))[-1]
    plant(state.parent, [file], ran)
    described = json.loads(state.read_text())
    described["digests"][file] = file_digest(state.with_name(file))
    if described["best_step"] == described["step"] and file in described["best_digests"]:
        described["best_digests"][file] = described["digests"][file]
    del described["digest"]
    state.write_bytes(described_bytes(described))
    done = training.resume(code=None)
    assert list(ran.iterdir()) == []
    if file != MODEL:  # of which only that of the best epoch is read, in the end
        assert done.returncode == 1
        assert file in done.stderr
        assert "unexpected" not in done.stderr


@pytest.mark.parametrize(
    "place",
    [f"{TRAIN}/config.json", f"{TRAIN}/mlflow.json", f"runs/{RUN}/shard/record.json", f"runs/{RUN}/workflow.json",
     "datasets/phantoms/default/manifest.json", "datasets/phantoms/default/samples.parquet"],
)  # fmt: skip
def test_a_pickle_in_place_of_a_file_of_the_run_is_not_run(training, ran, place):
    training.restore()
    assert (training.store / place).exists()
    plant(training.store, [place], ran)
    done = training.resume(code=None)
    assert list(ran.iterdir()) == []
    assert done.returncode in (0, 1, 2), done.stderr


def test_a_pickle_in_a_first_format_checkpoint_is_refused(training, ran):
    training.restore()
    run_ranks(SCRIPT, 1, str(training.store), RUN, "0")
    newest = json.loads((training.train / SNAPSHOT).read_text())["latest_checkpoint_result"]["checkpoint_dir_name"]
    folder = training.train / "ray" / newest
    (place,) = [path.relative_to(folder).as_posix() for path in folder.rglob("*.pt")]
    saved = torch.load(folder / place, weights_only=False)
    torch.save({**saved, "mark": Harmful(ran / "engine")}, folder / place)
    described = json.loads((folder / "train.json").read_text())
    described["digests"][place] = file_digest(folder / place)
    del described["digest"]
    (folder / "train.json").write_bytes(described_bytes(described))
    done = training.resume(code=1)
    assert list(ran.iterdir()) == []
    assert "that could run code when loaded" in done.stderr


def test_a_sweep_runs_none_of_the_pickles_in_its_folder(training, ran):
    training.restore()
    tune = training.store / "runs/sweep/tune"
    plant(tune, [*BESIDE, *OF_RAY], ran)
    plant(tune / "ray", OF_RAY, ran)
    plant(tune / "trials", [f"00000/{file}" for file in BESIDE], ran)
    done = medmamba(
        "tune", *TINY, "--run", "sweep", "--store", str(training.store), cwd=training.store.parent, timeout_s=500
    )
    assert list(ran.iterdir()) == []
    assert done.returncode == 0
