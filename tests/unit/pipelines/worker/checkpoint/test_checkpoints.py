"""Checkpoints in the store: complete or not there, the newest usable one is found, older ones go."""

import base64
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_shards.store import Store, open_store
from data_shards.store.fenced_lease import LostLeaseError, fenced_lease
from pipelines.placement import Placement
from pipelines.worker.checkpoint.resume import find_resume
from pipelines.worker.checkpoint.stored import FILES, FOLDER, Checkpoints
from pipelines.worker.state import NewerFormatError, ResumeError, TrainState, describe, described_bytes

PLACEMENT = Placement(
    workers=1, device="cpu", cpus_per_worker=1, zero_stage=0, scan="auto", concurrent_trials=1, nodes=1
)


@pytest.fixture(params=["folder", "s3"])
def out(request, tmp_path) -> Store:
    uri = str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3")
    return open_store(uri).at("runs/r/train")


@pytest.fixture
def checkpoints(out) -> Checkpoints:
    return Checkpoints(out)


def written(checkpoints: Checkpoints, folder: Path, step: int, *, best: int | None = None) -> None:
    """Writes the checkpoint of a step at the end of an epoch; `best` is the step of the best one, by default this."""
    files = {name: folder / name for name in FILES}
    for name, path in files.items():
        path.write_bytes(f"{name} of step {step}".encode())
    state = TrainState(epoch=step, step=step, best_epoch=1, best_step=step if best is None else best)
    checkpoints.write(step, files, describe(state, seed=0, placement=PLACEMENT, manifest="m" * 64))


def read(files) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files.items()}


def test_a_training_that_has_written_nothing_begins(checkpoints, tmp_path):
    assert checkpoints.newest(tmp_path) is None
    assert checkpoints.newest_state() is None


def test_the_newest_checkpoint_has_its_files_and_best_model(checkpoints, tmp_path, out):
    written(checkpoints, tmp_path, 1)
    written(checkpoints, tmp_path, 2, best=1)
    found = Checkpoints(out).newest(tmp_path / "fetched")
    assert (found.name, found.described["step"]) == ("step-0000000002", 2)
    assert read(found.files) == {name: f"{name} of step 2".encode() for name in FILES}
    assert read(found.best) == {name: f"{name} of step 1".encode() for name in ("weights.safetensors", "model.json")}
    assert Checkpoints(out).newest_state() == found.described


def test_kept_are_the_newest_two_their_best_and_one_before_each(checkpoints, tmp_path):
    for step, best in [(1, 1), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5), (7, 5)]:
        written(checkpoints, tmp_path, step, best=best)
    assert [int(name[-2:]) for name in checkpoints.names()] == [2, 4, 5, 6, 7]
    written(checkpoints, tmp_path, 8, best=8)
    assert [int(name[-2:]) for name in checkpoints.names()] == [2, 4, 5, 7, 8]


def test_a_process_that_resumes_still_knows_the_best_model(checkpoints, tmp_path, out):
    written(checkpoints, tmp_path, 1)
    resumed = Checkpoints(out)
    resumed.newest(tmp_path / "fetched")
    written(resumed, tmp_path, 2, best=1)
    assert read(resumed.newest(tmp_path / "again").best)["model.json"] == b"model.json of step 1"


@pytest.mark.parametrize("file", [*FILES, "train.json"])
@pytest.mark.parametrize("harm", ["flipped bit", "torn", "missing"])
def test_a_damaged_checkpoint_is_passed_over_aloud(checkpoints, tmp_path, out, file, harm):
    written(checkpoints, tmp_path, 1)
    written(checkpoints, tmp_path, 2, best=1)
    key = f"{FOLDER}/step-0000000002/{file}"
    data = out.get(key)
    if harm == "missing":
        out.delete(key)
    else:
        out.put(key, bytes([data[0] ^ 1]) + data[1:] if harm == "flipped bit" else data[: len(data) // 2])
    lines: list[str] = []
    found = Checkpoints(out).newest(tmp_path / "fetched", say=lines.append)
    assert found.name == "step-0000000001"
    if (harm, file) == ("missing", "train.json"):
        assert lines == [], "it was never complete"
    else:
        (line,) = lines
        assert line.startswith(f"checkpoint step-0000000002 is damaged ({file} ")
        assert line.endswith("trying the one before it")


def test_a_folder_in_place_of_a_file_is_damage(tmp_path):
    out = open_store(str(tmp_path / "store"))
    for step in (1, 2):
        written(Checkpoints(out), tmp_path, step)
    out.delete(f"{FOLDER}/step-0000000002/usage.json")
    out.path(f"{FOLDER}/step-0000000002/usage.json").mkdir()
    lines: list[str] = []
    assert Checkpoints(out).newest(tmp_path / "fetched", say=lines.append).name == "step-0000000001"
    assert "usage.json of step-0000000002 cannot be read (Is a directory)" in lines[0]


@pytest.mark.parametrize("file", [*FILES, "train.json"])
def test_a_folder_in_a_files_place_is_replaced_on_rewriting(file, tmp_path):
    out = open_store(str(tmp_path / "store"))
    for step in (1, 2):
        written(Checkpoints(out), tmp_path, step)
    out.delete(f"{FOLDER}/step-0000000002/{file}")
    (out.path(f"{FOLDER}/step-0000000002/{file}") / "below").mkdir(parents=True)
    written(Checkpoints(out), tmp_path, 2)
    assert Checkpoints(out).newest(tmp_path / "fetched").name == "step-0000000002"


def test_a_file_in_a_checkpoints_place_is_replaced_on_rewriting(tmp_path):
    out = open_store(str(tmp_path / "store"))
    written(Checkpoints(out), tmp_path, 1)
    out.path(f"{FOLDER}/step-0000000002").write_text("not a folder")
    written(Checkpoints(out), tmp_path, 2)
    assert Checkpoints(out).newest(tmp_path / "fetched").name == "step-0000000002"


def test_of_a_removed_checkpoint_no_folder_is_left(tmp_path):
    out = open_store(str(tmp_path / "store"))
    checkpoints = Checkpoints(out)
    for step in (1, 2):
        written(checkpoints, tmp_path, step, best=1)
    out.delete(f"{FOLDER}/step-0000000002/usage.json")
    (out.path(f"{FOLDER}/step-0000000002/usage.json") / "below").mkdir(parents=True)
    for step in (3, 4):
        written(checkpoints, tmp_path, step, best=1)
    kept = [f"step-000000000{step}" for step in (1, 3, 4)]
    assert sorted(path.name for path in out.path(FOLDER).iterdir()) == kept


def test_a_checkpoint_under_the_name_of_another_step_is_damage(tmp_path):
    out = open_store(str(tmp_path / "store"))
    checkpoints = Checkpoints(out)
    for step, best in ((1, 1), (2, 1)):
        written(checkpoints, tmp_path, step, best=best)
    out.path(f"{FOLDER}/step-0000000002").rename(out.path(f"{FOLDER}/step-0000000009"))
    lines: list[str] = []
    assert Checkpoints(out).newest(tmp_path / "fetched", say=lines.append).name == "step-0000000001"
    assert "train.json belongs to step 2" in lines[0]


def test_a_damaged_best_model_leaves_the_checkpoint_before_it(checkpoints, tmp_path, out):
    for step, best in [(1, 1), (2, 2), (3, 2), (4, 2)]:
        written(checkpoints, tmp_path, step, best=best)
    out.put(f"{FOLDER}/step-0000000002/weights.safetensors", b"other")
    lines: list[str] = []
    assert Checkpoints(out).newest(tmp_path / "fetched", say=lines.append).name == "step-0000000001"
    assert len(lines) == 3
    assert all("weights.safetensors of step-0000000002" in line for line in lines)


def test_where_all_are_damaged_it_is_said_what_to_delete(checkpoints, tmp_path, out):
    for step in (1, 2):
        written(checkpoints, tmp_path, step)
        out.put(f"{FOLDER}/step-000000000{step}/moments.safetensors", b"other")
    with pytest.raises(ResumeError, match=r"all 2 checkpoints in .*/checkpoints are damaged: delete that .*--run"):
        Checkpoints(out).newest(tmp_path / "fetched")


def test_a_step_rewritten_after_validation_never_disappears(checkpoints, tmp_path, out):
    files = {name: tmp_path / name for name in FILES}
    for name, path in files.items():
        path.write_bytes(name.encode())
    state = TrainState(epoch=0, step=5, losses=[0.5] * 5)
    checkpoints.write(5, files, describe(state, seed=0, placement=PLACEMENT, manifest="m" * 64))
    tags = {name: out.tag(f"{FOLDER}/step-0000000005/{name}") for name in FILES}
    files["usage.json"].write_bytes(b"a second later")
    after = TrainState(epoch=1, step=5, best_epoch=1, best_step=5)
    checkpoints.write(5, files, describe(after, seed=0, placement=PLACEMENT, manifest="m" * 64))
    assert {name: out.tag(f"{FOLDER}/step-0000000005/{name}") for name in FILES} == tags
    found = Checkpoints(out).newest(tmp_path / "fetched")
    assert (found.described["epoch"], set(found.best)) == (1, {"weights.safetensors", "model.json"})


def test_what_was_passed_over_does_not_come_back(checkpoints, tmp_path, out):
    for step in (1, 2, 4):
        written(checkpoints, tmp_path, step)
    out.put(f"{FOLDER}/step-0000000004/moments.safetensors", b"damaged")
    resumed = Checkpoints(out)
    assert resumed.newest(tmp_path / "fetched").name == "step-0000000002"
    written(resumed, tmp_path, 3)
    assert Checkpoints(out).names() == ["step-0000000001", "step-0000000002", "step-0000000003"]


def test_a_damaged_checkpoint_that_is_written_again_is_whole(checkpoints, tmp_path, out):
    written(checkpoints, tmp_path, 1)
    written(checkpoints, tmp_path, 2)
    out.put(f"{FOLDER}/step-0000000002/weights.safetensors", b"damaged")
    resumed = Checkpoints(out)
    assert resumed.newest(tmp_path / "before").name == "step-0000000001"
    written(resumed, tmp_path, 2)
    assert Checkpoints(out).newest(tmp_path / "fetched").name == "step-0000000002"


@pytest.mark.parametrize(
    "changes",
    [
        {"digests": {"../../model.json": "0" * 64}}, {"digests": {}}, {"best_digests": {"../x": "0" * 64}},
        {"best_step": -5}, {"best_step": "0000000001/../../../x"}, {"compile": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_hostile_train_json_opens_nothing(checkpoints, tmp_path, out, changes):
    written(checkpoints, tmp_path, 1)
    described = {**checkpoints.newest_state(), **changes}
    del described["digest"]
    out.put(f"{FOLDER}/step-0000000001/train.json", described_bytes(described))
    with pytest.raises(ResumeError, match="all 1 checkpoints"):
        Checkpoints(out).newest(tmp_path / "fetched")


def test_a_later_versions_checkpoint_is_refused_and_kept(checkpoints, tmp_path, out):
    written(checkpoints, tmp_path, 1)
    written(checkpoints, tmp_path, 2)
    described = {**checkpoints.newest_state(), "format": 2}
    del described["digest"]
    out.put(f"{FOLDER}/step-0000000002/train.json", described_bytes(described))
    lines: list[str] = []
    with pytest.raises(NewerFormatError, match=r"step 2 has format 2, .*resume with the version that wrote it"):
        Checkpoints(out).newest(tmp_path / "fetched", say=lines.append)
    assert lines == []


def test_a_checkpoint_from_before_formats_had_numbers_is_read(checkpoints, tmp_path, out):
    written(checkpoints, tmp_path, 1)
    described = checkpoints.newest_state()
    for name in ("format", "digest"):
        del described[name]
    out.put(f"{FOLDER}/step-0000000001/train.json", described_bytes(described))
    assert Checkpoints(out).newest(tmp_path / "fetched").described["step"] == 1


DRIVER = """
import base64, sys
from ray import cloudpickle
from data_shards.store import open_store
from data_shards.store.fenced_lease import fenced_check, fenced_lease
with fenced_lease(open_store(sys.argv[1]), "leases/r", what="run 'r'", remedy="-", wait_s=0, ttl_s=1) as held:
    print(base64.b64encode(cloudpickle.dumps(fenced_check(held.check))).decode(), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def driver(tmp_path):
    """A process that holds the lease of a run, and what it hands its workers to ask."""
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "leased")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process, pickle.loads(base64.b64decode(process.stdout.readline()))
    process.send_signal(signal.SIGCONT)
    process.communicate("end\n", timeout=30)


def test_workers_of_a_paused_replaced_driver_write_nothing(driver, tmp_path, out):
    process, check = driver
    workers = Checkpoints(out, check=check)
    written(workers, tmp_path, 1)
    process.send_signal(signal.SIGSTOP)
    written(workers, tmp_path, 2)  # the run is still its own
    before = sorted(out.list())
    lease = fenced_lease(
        open_store(str(tmp_path / "leased")), "leases/r", what="run 'r'", remedy="-", wait_s=60, ttl_s=45
    )
    with lease:
        with pytest.raises(LostLeaseError, match=r"run 'r' was taken over by .* while this process was paused"):
            written(workers, tmp_path, 3)
        with pytest.raises(LostLeaseError):
            workers.keep_model(3, {name: tmp_path / name for name in FILES})
    assert sorted(out.list()) == before


def test_a_train_json_without_a_field_is_damaged(checkpoints, tmp_path, out):
    written(checkpoints, tmp_path, 1)
    described = checkpoints.newest_state()
    for name in ("ranks", "digest"):
        del described[name]
    out.put(f"{FOLDER}/step-0000000001/train.json", json.dumps(described).encode())
    lines: list[str] = []
    with pytest.raises(ResumeError):
        Checkpoints(out).newest(tmp_path, say=lines.append)
    assert "lacks digest, ranks" in lines[0]


def test_another_trainings_or_datas_checkpoint_is_refused(checkpoints, tmp_path, out):
    files = {name: tmp_path / name for name in FILES}
    for name, path in files.items():
        path.write_bytes(name.encode())
    about = describe(TrainState(step=5), seed=0, placement=PLACEMENT, manifest="m" * 64, training="t" * 64)
    checkpoints.write(5, files, about)
    assert find_resume(checkpoints, tmp_path, "m" * 64, training="t" * 64).state.step == 5
    with pytest.raises(ResumeError, match=r"step-0000000005 in .*/checkpoints belongs to another training"):
        find_resume(checkpoints, tmp_path, "m" * 64, training="u" * 64)
    with pytest.raises(ResumeError, match=r"trained on manifest m{12}, but this run has n{12}"):
        find_resume(checkpoints, tmp_path, "n" * 64, training="t" * 64)
