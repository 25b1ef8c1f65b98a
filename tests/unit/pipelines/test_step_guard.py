"""Which steps are skipped, what they leave behind, and when they end a training."""

import pytest
import torch
from torch import nn

from pipelines.worker.step_guard import SHOWN_KEYS, Skips, StepGuard, TrainingError, name_samples

CPU = torch.device("cpu")


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
def test_a_skipped_step_changes_no_bit_of_weights_moments_and_count(wrong):
    model, optimizer, guard = stepped([1.0, wrong, 2.0, wrong])
    plain, plain_optimizer, _ = stepped([1.0, 2.0])
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for name, value in plain_optimizer.state[theirs].items():
            assert torch.equal(optimizer.state[ours][name], value), name
    assert guard.look() == Skips(total=2, new=2, longest=1, last=4)
    assert guard.look().new == 0


def test_the_longest_row_is_known_although_it_is_over():
    nan = float("nan")
    _, _, guard = stepped([nan] * 5 + [1.0])
    skips = guard.look(wait=True)
    assert (skips.longest, skips.last) == (5, 5)
    with pytest.raises(
        TrainingError, match=r"^5 steps in a row, up to step 5, had .* skipped; at most 4.*the samples a b"
    ):
        skips.check_row(lambda step: f"Step {step} took the samples a b")


@pytest.mark.parametrize(
    ("skipped", "steps", "ends"),
    [(0, 3, False), (1, 3, False), (3, 3, True), (4, 20, False), (5, 40, True), (5, 60, False)],
)
def test_a_share_of_an_epoch_ends_it(skipped, steps, ends):
    skips = Skips(skipped, skipped, 1, steps)
    if not ends:
        skips.check_epoch(skipped, steps, str)
        return
    with pytest.raises(
        TrainingError, match=f"{skipped} of the {steps} steps of the epoch, the last of them step {steps}"
    ):
        skips.check_epoch(skipped, steps, str)


def test_what_was_skipped_is_said_once():
    assert Skips(3, 1, 1, 17).notice.startswith("step 17 skipped: the gradients are not finite (3 so far; 5 in a row")
    assert Skips(3, 2, 2, 17).notice.startswith("2 steps up to step 17 skipped")
    assert Skips(3, 0, 2, 17).notice == ""


def test_of_a_large_batch_the_first_keys_are_named():
    keys = [f"k{n}" for n in range(SHOWN_KEYS + 96)]
    assert name_samples(keys[:2]) == "k0 k1"
    assert name_samples(keys).endswith(" k31 and 96 more")
