"""What train.json says of a training, and that nothing else is taken for it."""

import hashlib
import json
import math

import pytest

from pipelines.placement import Placement
from pipelines.worker.state import (
    FIELDS,
    NewerFormatError,
    ResumeError,
    TrainState,
    check_same_data,
    describe,
    described_bytes,
    read_described,
    state_of,
)

PLACEMENT = Placement(
    workers=1, device="cpu", cpus_per_worker=1, zero_stage=0, scan="auto", concurrent_trials=1, nodes=1
)
STATE = TrainState(
    epoch=3, consumed=16, step=32, losses=[0.1, 1 / 3], best_epoch=2, best_step=20,
    best={"val_auc": 0.9, "val_loss": 0.3}, history=[{"epoch": 1, "val_auc": 0.8}],
)  # fmt: skip


@pytest.fixture
def described() -> dict:
    about = describe(STATE, seed=5, placement=PLACEMENT, manifest="5" * 64)
    data = described_bytes({**about, "digests": {"weights.safetensors": "0" * 64}, "best_digests": {}})
    return json.loads(data)


def edited(described: dict, **changes: object) -> bytes:
    return json.dumps({**described, **changes}).encode()


def test_a_state_is_read_as_it_was_written(described):
    assert state_of(read_described(json.dumps(described).encode())) == STATE
    assert set(described) == FIELDS | {"format", "seed", "unsent"}
    assert (described["seed"], described["ranks"]) == (5, 1)


NOT_FINITE = TrainState(
    losses=[0.5, math.nan, math.inf, -math.inf], best={"val_auc": 0.9, "val_loss": math.nan},
    history=[{"epoch": 1, "val_auc": math.nan}], unsent=[{"step_losses": [math.nan, 1.0], "tags": {"a": "b"}}],
)  # fmt: skip


def refuse(name: str) -> None:
    """RFC 8259 has no NaN and no Infinity; Python's parser takes them unless it is given this."""
    raise AssertionError(name)


def test_nonfinite_losses_are_json_and_read_as_numbers():
    data = described_bytes(describe(NOT_FINITE, seed=5, placement=PLACEMENT, manifest="5" * 64))
    json.loads(data, parse_constant=refuse)
    assert repr(state_of(read_described(data))) == repr(NOT_FINITE)


def test_the_nan_of_earlier_code_is_read():
    fields = describe(NOT_FINITE, seed=5, placement=PLACEMENT, manifest="5" * 64)
    del fields["format"]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    data = json.dumps({**fields, "digest": digest}).encode()
    assert b"NaN" in data
    assert repr(state_of(read_described(data))) == repr(NOT_FINITE)


def test_a_later_versions_train_json_is_refused_with_a_remedy(described):
    later = {name: value for name, value in described.items() if name != "digest"} | {"format": 2}
    with pytest.raises(
        NewerFormatError, match=r"step 32 has format 2, .* up to 1; .*resume with the version that wrote it"
    ):
        read_described(described_bytes(later))


@pytest.mark.parametrize("found", [0, -1, "1", None, 1.5])
def test_a_format_that_cannot_be_is_refused(described, found):
    with pytest.raises(ResumeError, match=r"train\.json cannot be used \(format"):
        read_described(edited(described, format=found))


def test_other_data_is_refused(described):
    check_same_data(described, "5" * 64)
    with pytest.raises(ResumeError, match=r"trained on manifest 5{12}, but this run has n{12}; .*--run NAME"):
        check_same_data(described, "n" * 64)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epoch", 9), ("step", 31), ("losses", [0.1]), ("best", {"val_auc": 1.0, "val_loss": 0.0}), ("history", []),
        ("seed", 6), ("format", 2), ("digests", {}), ("manifest", "n" * 64), ("note", "x"), ("digest", "0" * 64),
    ],
)  # fmt: skip
def test_an_edited_train_json_is_refused_with_the_remedy(described, field, value):
    with pytest.raises(ResumeError, match=r"train\.json was edited or damaged.*; delete it$"):
        read_described(edited(described, **{field: value}), remedy="delete it")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epoch", -1), ("epoch", 10**30), ("epoch", "3"), ("best", []), ("history", {}), ("ranks", 0),
        ("zero_stage", 4), ("digests", {"../../etc/passwd": "0" * 64}), ("digests", {"/dev/zero": "0" * 64}),
        ("digests", {"engine": "x"}), ("digests", []), ("manifest", None), ("digest", 7), ("best_step", -1),
        ("best_step", "../x"), ("best_digests", {"../x": "0" * 64}), ("losses", ["x"]),
    ],
)  # fmt: skip
def test_an_impossible_train_json_is_refused_before_its_files(described, field, value):
    with pytest.raises(ResumeError, match=rf"train\.json cannot be used \({field}"):
        read_described(edited(described, **{field: value}))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000], ids=len)
def test_a_train_json_that_is_torn_is_refused(data):
    with pytest.raises(ResumeError, match=r"train\.json"):
        read_described(data)


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
