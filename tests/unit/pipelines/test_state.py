"""What a checkpoint says of a training, and when it may be continued."""

import json

import pytest

from pipelines.placement import Placement
from pipelines.worker.state import ResumeError, TrainState, as_written, file_digests, read_state, write_state


def placement(workers=1, zero_stage=0) -> Placement:
    return Placement(
        workers=workers, device="cpu", cpus_per_worker=1, zero_stage=zero_stage, scan="auto", trials=1, nodes=1
    )


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/optim_states.pt").write_bytes(b"this rank's")
    for folder in (tmp_path, tmp_path / "best"):
        folder.mkdir(exist_ok=True)
        (folder / "weights.safetensors").write_bytes(b"weights of " + folder.name.encode())
        (folder / "model.json").write_text("{}")
    state = TrainState(epoch=3, consumed=0, step=30, best_epoch=2, best={"val_auc": 0.9, "val_loss": 0.3})
    state.history = [{"epoch": 1, "val_auc": 0.8}]
    digests = file_digests(tmp_path)
    write_state(tmp_path, state, seed=5, placement=placement(), manifest="m" * 64, digests=digests)
    return tmp_path


def test_a_state_is_read_as_it_was_written(checkpoint):
    state = read_state(checkpoint, placement=placement(), manifest="m" * 64)
    assert (state.epoch, state.step, state.best_epoch) == (3, 30, 2)
    assert state.best == {"val_auc": 0.9, "val_loss": 0.3}
    assert state.history == [{"epoch": 1, "val_auc": 0.8}]


def test_train_json_holds_what_the_contract_names(checkpoint):
    kept = json.loads((checkpoint / "train.json").read_text())
    assert {"epoch", "consumed", "step", "seed", "ranks", "zero_stage", "manifest", "digests"} <= kept.keys()
    assert set(kept["digests"]) == {
        "weights.safetensors", "model.json", "best/weights.safetensors", "best/model.json", "engine/optim_states.pt",
    }  # fmt: skip
    assert (kept["seed"], kept["ranks"]) == (5, 1)


@pytest.mark.parametrize(
    "now", [placement(workers=2), placement(zero_stage=1), placement(2, 2)], ids=["ranks", "stage", "both"]
)
def test_another_number_of_ranks_or_zero_stage_is_refused_with_what_to_type(checkpoint, now):
    with pytest.raises(ResumeError) as error:
        read_state(checkpoint, placement=now, manifest="m" * 64)
    told = str(error.value)
    assert f"{now.workers} at stage {now.zero_stage}" in told
    assert "--placement.workers 1 --placement.zero-stage 0" in told
    assert "--run NAME" in told


@pytest.mark.parametrize(
    ("written", "asked", "found"),
    [
        ({}, {"compile": "auto", "flat": True}, ("off", False)),  # from before there was either
        ({"compile": "on", "flat": True}, {"compile": "auto", "flat": False}, ("on", True)),
        ({"compile": "on", "flat": True}, {"compile": "off", "flat": True}, ("off", True)),  # named by the user
    ],
)
def test_a_placement_keeps_what_the_checkpoint_was_written_with(written, asked, found, tmp_path):
    (tmp_path / "train.json").write_text(json.dumps({"epoch": 1, **written}))
    kept = as_written(placement().model_copy(update=asked), tmp_path)
    assert (kept.compile, kept.flat) == found


def test_other_data_is_refused(checkpoint):
    with pytest.raises(ResumeError, match=r"trained on manifest m{12}, this run has n{12}; .*--run NAME"):
        read_state(checkpoint, placement=placement(), manifest="n" * 64)


@pytest.mark.parametrize("name", ["weights.safetensors", "best/model.json", "engine/optim_states.pt"])
@pytest.mark.parametrize("is_there", [True, False], ids=["damaged", "missing"])
def test_a_damaged_or_missing_file_is_named(checkpoint, name, is_there):
    (checkpoint / name).write_bytes(b"other") if is_there else (checkpoint / name).unlink()
    with pytest.raises(ResumeError, match=rf"{name} .*damaged.*delete the folder `ray` .*--run NAME"):
        read_state(checkpoint, placement=placement(), manifest="m" * 64)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epoch", 9), ("step", 31), ("best", {"val_auc": 1.0, "val_loss": 0.0}), ("history", []), ("seed", 6),
        ("digests", {}), ("manifest", "n" * 64), ("note", "x"), ("digest", "0" * 64),
    ],
)  # fmt: skip
def test_an_edited_train_json_is_refused(checkpoint, field, value):
    edit(checkpoint, **{field: value})
    with pytest.raises(ResumeError, match=r"train\.json .*edited or damaged.*delete the folder `ray` .*--run NAME"):
        read_state(checkpoint, placement=placement(), manifest="m" * 64)


def test_a_train_json_from_before_it_had_a_digest_is_read(checkpoint):
    described = json.loads((checkpoint / "train.json").read_text())
    del described["digest"]
    (checkpoint / "train.json").write_text(json.dumps(described))
    assert read_state(checkpoint, placement=placement(), manifest="m" * 64).epoch == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epoch", -1), ("epoch", 10**30), ("epoch", "3"), ("best", []), ("history", {}), ("ranks", 0),
        ("zero_stage", 4), ("digests", {"../../etc/passwd": "0" * 64}), ("digests", {"/dev/zero": "0" * 64}),
        ("digests", {"engine": "x"}), ("digests", []), ("manifest", None), ("digest", 7),
    ],
)  # fmt: skip
def test_a_train_json_that_cannot_be_is_refused_before_any_file_it_names_is_opened(checkpoint, field, value):
    edit(checkpoint, **{field: value})
    with pytest.raises(ResumeError, match=rf"train\.json .*cannot be used \({field}.*delete the folder `ray`"):
        read_state(checkpoint, placement=placement(), manifest="m" * 64)


def test_a_train_json_without_a_field_is_refused(checkpoint):
    described = json.loads((checkpoint / "train.json").read_text())
    for name in ("ranks", "digest"):
        del described[name]
    (checkpoint / "train.json").write_text(json.dumps(described))
    with pytest.raises(ResumeError, match=r"has no ranks"):
        read_state(checkpoint, placement=placement(), manifest="m" * 64)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000], ids=len)
def test_a_train_json_that_is_torn_is_refused(checkpoint, data):
    (checkpoint / "train.json").write_bytes(data)
    with pytest.raises(ResumeError, match=r"train\.json .*delete the folder `ray`"):
        read_state(checkpoint, placement=placement(), manifest="m" * 64)


def edit(checkpoint, **changes) -> None:
    described = json.loads((checkpoint / "train.json").read_text())
    (checkpoint / "train.json").write_text(json.dumps({**described, **changes}))


@pytest.mark.parametrize(
    ("auc", "loss", "better"),
    [(0.91, 0.9, True), (0.89, 0.1, False), (0.9, 0.29, True), (0.9, 0.31, False), (0.9, 0.3, False)],
    ids=["higher AUC", "lower AUC", "same AUC, lower loss", "same AUC, higher loss", "the same"],
)
def test_the_best_epoch_has_the_highest_auc_then_the_lowest_loss(auc, loss, better):
    state = TrainState(best={"val_auc": 0.9, "val_loss": 0.3})
    assert state.is_better({"val_auc": auc, "val_loss": loss}) is better


def test_the_first_epoch_is_the_best_so_far():
    assert TrainState().is_better({"val_auc": 0.1, "val_loss": 9.0})
