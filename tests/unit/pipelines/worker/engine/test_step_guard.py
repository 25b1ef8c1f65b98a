"""Which steps are skipped, what they leave behind, and when they end a training."""

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.worker.engine.step_guard import (
    SHOWN_KEYS,
    Skips,
    StepGuard,
    TrainingError,
    WatchedEpoch,
    name_samples,
    watch_steps,
)
from pipelines.worker.state import TrainState

CPU, NAN = torch.device("cpu"), float("nan")


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def stepped(gradients: list[float]) -> tuple[nn.Linear, torch.optim.Optimizer, StepGuard]:
    """A network after one guarded step for each gradient."""
    model, guard = network(), StepGuard(CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    for number, value in enumerate(gradients, 1):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        guard.watch(optimizer, model.parameters())
        optimizer.step()
        guard.count(number)
    return model, optimizer, guard


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e30], ids=["nan", "inf", "a norm beyond float32"])
def test_a_skipped_step_changes_no_bit_of_weights_and_moments(wrong):
    model, optimizer, guard = stepped([1.0, wrong, 2.0, wrong])
    plain, plain_optimizer, _ = stepped([1.0, 2.0])
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for name, value in plain_optimizer.state[theirs].items():
            assert torch.equal(optimizer.state[ours][name], value), name
    assert guard.look() == Skips(total=2, row=1, longest=1, last=4)


def watched(guard: StepGuard, said: list[str], state: TrainState | None = None) -> WatchedEpoch:
    keys = np.array([f"k{n}" for n in range(200)])
    return watch_steps(
        guard, state or TrainState(), keys, 2, lambda: ["step-0000000001", "step-0000000002"], said.append
    )


def after(pattern: str, state: TrainState | None = None) -> tuple[WatchedEpoch, list[str]]:
    """An epoch after steps that were made (.) or skipped (x), and what was said."""
    guard, said = StepGuard(CPU), []
    epoch, before = watched(guard, said, state), state.step if state else 0
    for number, each in enumerate(pattern, 1):
        guard.note(skipped=each == "x")
        epoch.step(before + number)
    return epoch, said


def losses(pattern: str) -> list[float]:
    return [NAN if each == "x" else 0.5 for each in pattern]


def test_five_in_a_row_end_the_training_with_the_last_samples():
    with pytest.raises(TrainingError, match=r"^5 steps in a row, up to step 6, had .* at most 4 in a row") as error:
        after(".xxxxx.")
    assert ". Step 6 used the samples k10 k11; the last good checkpoint is step-0000000002. Lower" in str(error.value)


def test_a_steps_samples_are_right_after_a_resume_amid_an_epoch():
    state = TrainState(epoch=3, step=33, consumed=6)  # the epoch's first step was 31
    with pytest.raises(TrainingError, match=r"up to step 38, .* Step 38 used the samples k14 k15;"):
        after("xxxxx", state)


@pytest.mark.parametrize(
    ("pattern", "ends"),
    [("...", False), ("x..", False), ("xxx", True), ("xxx." * 2 + "." * 12, True), ("xx.." * 3 + "." * 90, False)],
)
def test_a_share_of_an_epoch_ends_it(pattern, ends):
    epoch, _ = after(pattern)
    if not ends:
        assert epoch.made(losses(pattern)) == [0.5] * pattern.count(".")
        return
    skipped, last = pattern.count("x"), pattern.rindex("x") + 1
    match = rf"^{skipped} of the {len(pattern)} steps of the epoch, the last of them step {last}, had"
    with pytest.raises(TrainingError, match=match):
        epoch.made(losses(pattern))


def test_each_skipped_step_is_said_once():
    _, said = after("x..x.")
    assert [text.partition(" (")[0] for text in said] == [
        "step 1 skipped: non-finite gradients",
        "step 4 skipped: non-finite gradients",
    ]
    assert "2 so far; 5 in a row or more than 10% of an epoch end the training" in said[1]


def test_a_loss_infinite_despite_an_applied_step_is_an_error():
    epoch, _ = after("..")
    with pytest.raises(TrainingError, match="the training loss became infinite"):
        epoch.made([0.5, float("inf")])


def test_of_a_large_batch_the_first_keys_are_named():
    keys = [f"k{n}" for n in range(SHOWN_KEYS + 96)]
    assert name_samples(keys[:2]) == "k0 k1"
    assert name_samples(keys).endswith(" k31 and 96 more")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_for_the_device():
    device = torch.device("cuda")
    model, guard = network().to(device), StepGuard(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    kept = []
    for number, value in enumerate([1.0, NAN, 2.0], 1):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        if number == 2:
            torch.cuda.set_sync_debug_mode("error")  # the first step makes the state
        guard.watch(optimizer, model.parameters())
        optimizer.step()
        guard.count(number)
        guard.look()
        kept.append([parameter.detach().clone() for parameter in model.parameters()])
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, second) for first, second in zip(kept[0], kept[1], strict=True))
    assert not torch.equal(kept[1][0], kept[2][0])
    assert guard.look(wait=True) == Skips(total=1, row=0, longest=1, last=2)
    assert float(next(iter(optimizer.state.values()))["step"]) == 2.0
