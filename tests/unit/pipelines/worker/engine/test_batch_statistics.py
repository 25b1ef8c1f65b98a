"""Running statistics: averaged over all micro-batches of a step, updated once, on every rank the same."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from medmamba.finetune import freeze
from pipelines.worker.engine.batch_statistics import BatchStatistics

CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.1), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2, momentum=0.3)
    )


def micro_batch(seed: int) -> torch.Tensor:
    return torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) * (1 + seed) + seed


def expected(seeds: list[int], steps: int = 1) -> list[torch.Tensor]:
    """By hand: mean and unbiased variance of each norm's input, averaged over micro-batches, moved by the momentum."""
    model = network().train()
    first, second = model[0], nn.Sequential(model[0], model[1], model[2])
    found = []
    for layer, channels, momentum in ((first, 4, 0.1), (second, 2, 0.3)):
        inputs = [layer(micro_batch(seed)).detach().transpose(0, 1).flatten(1) for seed in seeds]
        for start, measured in (
            (torch.zeros(channels), [x.mean(1) for x in inputs]),
            (torch.ones(channels), [x.var(1) for x in inputs]),
        ):
            running = start
            for _ in range(steps):
                running = running + momentum * (torch.stack(measured).mean(0) - running)
            found.append(running)
    return found


def trained(seeds: list[int], steps: int = 1) -> tuple[list[torch.Tensor], float]:
    model = network().train()
    statistics = BatchStatistics(model, CPU)
    for _ in range(steps):
        for seed in seeds:
            statistics.collect(model(micro_batch(seed)).sum() * 0 + seed)
        loss = statistics.update()
    return [buffer for norm in (model[1], model[3]) for buffer in (norm.running_mean, norm.running_var)], float(loss)


def test_a_loss_that_is_kept_keeps_no_statistics():
    statistics = BatchStatistics(network(), CPU)
    statistics.collect(torch.tensor(1.0))
    assert statistics.update().untyped_storage().nbytes() == 4


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("seeds", "steps"), [([1], 1), ([1, 2, 3, 4], 1), ([1, 2], 3)])
def test_the_running_statistics_are_those_computed_by_hand(seeds, steps):
    found, loss = trained(seeds, steps)
    same(found, expected(seeds, steps))
    assert loss == pytest.approx(sum(seeds) / len(seeds))


def test_a_skipped_step_leaves_the_running_statistics():
    model = network().train()
    statistics = BatchStatistics(model, CPU)
    statistics.collect(model(micro_batch(1)).sum())
    statistics.update(torch.tensor(0.0))
    kept = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    statistics.collect((model(micro_batch(2) * torch.nan)).sum())
    assert torch.isnan(statistics.update(torch.tensor(1.0)))
    assert all(torch.equal(value, kept[name]) for name, value in model.named_buffers() if "running" in name)
    statistics.collect(model(micro_batch(1)).sum())
    assert torch.isfinite(statistics.update(torch.tensor(0.0)))


def test_one_micro_batch_a_step_is_what_torch_does():
    model = network().train()
    for _ in range(3):
        model(micro_batch(1))
    same(trained([1], steps=3)[0], [b for n in (model[1], model[3]) for b in (n.running_mean, n.running_var)])


def test_running_statistics_resume_from_the_checkpoints():
    model = network().train()
    statistics = BatchStatistics(model, CPU)
    with torch.no_grad():
        model[1].running_mean.fill_(5.0)
    statistics.reload()
    statistics.collect(model(micro_batch(1)).sum())
    statistics.update()
    torch.testing.assert_close(model[1].running_mean, expected([1])[0] + 0.9 * 5.0)


def test_frozen_norms_are_left_alone_and_others_followed():
    model = network()
    model[1].momentum = 1.0
    with torch.no_grad():  # of each the mean over seven micro-batches differs in the last bit
        model[1].running_var.copy_(torch.tensor([0.1, 0.7, 1.3, 1.9]))
    freeze(model, ["1.*"])
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    statistics = BatchStatistics(model, CPU)
    for seed in range(7):
        statistics.collect(model(micro_batch(seed)).sum())
    assert float(statistics.update()) != 0.0
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, kept[name])}
    assert moved == {"3.running_mean", "3.running_var", "3.num_batches_tracked"}


def test_a_model_without_batchnorm_still_gets_its_loss():
    statistics = BatchStatistics(nn.Linear(2, 2), CPU)
    for loss in (1.0, 3.0):
        statistics.collect(torch.tensor(loss))
    assert float(statistics.update()) == 2.0


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(trained([1, 3] if rank == 0 else [2, 4]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_statistics_of_a_single_one(tmp_path):
    torch.multiprocessing.spawn(rank_of_two, args=(str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        found, loss = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        same(found, expected([1, 2, 3, 4]))
        assert loss == pytest.approx(2.5)
