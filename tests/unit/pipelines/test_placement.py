"""The placement is resolved once from what Ray has; an impossible one is refused with a remedy."""

import pytest

from data_shards.store.outage import PATIENCE_S
from data_shards.store.s3.client import SILENCE_S
from pipelines.cluster.monitor import SLOW_S
from pipelines.placement import Demand, Node, PlacementConfig, resolve
from pipelines.worker.config import TrainConfig
from pipelines.worker.group.process_group import TIMEOUT_S


def placed(num_cpus=2.0, num_gpus=0.0, **wishes):
    return resolve(PlacementConfig(**wishes), [Node(num_cpus, num_gpus)])


def test_without_a_gpu_one_worker_has_all_cpus():
    placement = placed(num_cpus=6)
    assert (placement.workers, placement.device, placement.cpus_per_worker) == (1, "cpu", 6)
    assert (placement.backend, placement.threads, placement.zero_stage, placement.concurrent_trials) == (
        "gloo",
        6,
        0,
        6,
    )


def test_with_gpus_there_is_one_worker_and_one_trial_for_each():
    placement = placed(num_cpus=64, num_gpus=4)
    assert (placement.workers, placement.device, placement.backend) == (4, "cuda", "nccl")
    assert (placement.cpus_per_worker, placement.zero_stage, placement.concurrent_trials) == (16, 0, 4)


@pytest.mark.parametrize(
    ("resources", "wishes", "found"),
    [
        ({"num_gpus": 1}, {}, ("auto", True)),
        ({"num_gpus": 1}, {"zero_stage": "2"}, ("auto", True)),
        ({"num_gpus": 1}, {"zero_stage": "3"}, ("off", False)),
        ({"num_gpus": 1}, {"compile": "off"}, ("off", True)),
        ({}, {}, ("off", False)),
        ({}, {"compile": "on"}, ("on", False)),
    ],
)
def test_a_training_is_compiled_on_gpus_if_a_graph_can_hold_it(resources, wishes, found):
    placement = placed(**resources, **wishes)
    assert (placement.compile, placement.flat) == found


def test_sweep_trials_are_compiled_only_on_request():
    assert placed(num_gpus=1).for_trial().compile == "off"
    assert placed(num_gpus=1, compile="on").for_trial().compile == "on"


def test_zero_3_cannot_be_compiled():
    with pytest.raises(ValueError, match=r"--placement\.compile on: ZeRO stage 3 .*--placement\.zero-stage 0, 1 or 2"):
        placed(num_gpus=1, zero_stage="3", compile="on")


def test_a_gpu_need_not_be_used():
    assert placed(num_cpus=4, num_gpus=1, device="cpu").backend == "gloo"


@pytest.mark.parametrize(("workers", "cpus"), [(1, 2), (2, 1), (3, 0.66), (4, 0.5), (7, 0.28)])
def test_workers_share_the_cpus_without_exceeding_them(workers, cpus):
    placement = placed(num_cpus=2, workers=workers)
    assert placement.cpus_per_worker == cpus
    assert placement.cpus_per_worker * placement.workers <= 2
    assert placement.threads >= 1


@pytest.mark.parametrize(
    ("resources", "wishes", "told"),
    [
        ({}, {"device": "cuda"}, r"--placement\.device cuda: this Ray has no GPU; .*auto"),
        (
            {"num_gpus": 2},
            {"workers": 3},
            r"--placement\.workers 3: one GPU per worker, and this Ray has 2; .*at most 2",
        ),
        ({}, {"workers": 99}, r"--placement\.workers 99: .* at least 0\.25 .*fewer workers"),
        ({}, {"workers": 2, "cpus_per_worker": 2}, r"2 x --placement\.cpus-per-worker 2 = 4 CPUs, .*has 2; lower"),
        ({"num_gpus": 1}, {"concurrent_trials": 2}, r"--placement\.concurrent-trials 2: one GPU per trial"),
    ],
    ids=["no GPU", "more workers than GPUs", "starved workers", "more CPUs than there are", "more trials than GPUs"],
)
def test_an_impossible_placement_names_value_rule_and_remedy(resources, wishes, told):
    with pytest.raises(ValueError, match=told):
        placed(**resources, **wishes)


@pytest.mark.parametrize(("cpus", "trials", "each"), [(2, 2, 1), (2, 1, 2), (5, 2, 2), (2, 4, 0.5)])
def test_a_trial_is_a_world_of_one_that_shares_the_cpus(cpus, trials, each):
    trial = placed(num_cpus=cpus, trials=trials).for_trial()
    assert (trial.workers, trial.zero_stage, trial.cpus_per_worker) == (1, 0, each)


def test_workers_not_dividing_the_batch_are_refused():
    config = TrainConfig(batch_size=32, micro_batch=16)
    assert (config.accumulation(1), config.accumulation(2)) == (2, 1)
    with pytest.raises(ValueError, match=r"batch_size 32 is not a multiple of train\.micro_batch 16 x 3 .*lower"):
        config.accumulation(3)


@pytest.mark.parametrize(
    ("nodes", "wishes", "workers", "each"),
    [
        ([Node(4), Node(4)], {}, 1, 4),
        ([Node(4), Node(4)], {"workers": 2}, 2, 4),
        ([Node(4), Node(4)], {"workers": 3}, 3, 2),
        ([Node(2), Node(2), Node(2)], {"workers": 2}, 2, 2),
        ([Node(0), Node(8)], {}, 1, 8),
        ([Node(4), Node(1)], {"workers": 5}, 5, 1),
        ([Node(16), Node(8, 1), Node(2, 1)], {}, 2, 2),
        ([Node(4), Node(8, 1)], {}, 1, 8),
        ([Node(16), Node(8, 1)], {"device": "cpu"}, 1, 16),
    ],
    ids=str,
)
def test_a_worker_fits_on_one_node(nodes, wishes, workers, each):
    placement = resolve(PlacementConfig(**wishes), nodes)
    assert (placement.workers, placement.cpus_per_worker, placement.nodes) == (workers, each, len(nodes))


def test_a_trial_fits_on_one_node_too():
    assert resolve(PlacementConfig(workers=2, concurrent_trials=1), [Node(4), Node(4)]).for_trial().cpus_per_worker == 4
    assert resolve(PlacementConfig(), [Node(4), Node(4)]).for_trial().cpus_per_worker == 1


@pytest.mark.parametrize(
    ("nodes", "wishes", "told"),
    [
        (
            [Node(4), Node(4)],
            {"cpus_per_worker": 8},
            r"workers 1 x .*8: a worker is on one node, .*\(4 CPUs, 4 CPUs\)",
        ),
        ([Node(4), Node(4)], {"workers": 2, "cpus_per_worker": 3.5}, None),
        ([Node(8), Node(2, 1)], {"cpus_per_worker": 4}, r"8 CPUs, 2 CPUs and 1 GPU\) have room for 0 of them on cuda"),
    ],
    ids=str,
)
def test_a_worker_that_fits_on_no_node_is_refused(nodes, wishes, told):
    if told is None:
        assert resolve(PlacementConfig(**wishes), nodes).workers == 2
        return
    with pytest.raises(ValueError, match=told):
        resolve(PlacementConfig(**wishes), nodes)


@pytest.mark.parametrize(("micro_batches", "num_gpus", "workers"), [
    (1, 8, 1), (2, 3, 2), (4, 3, 2), (4, 8, 4), (6, 4, 3), (6, 8, 6), (7, 6, 1), (8, 8, 8), (0, 5, 5),
])  # fmt: skip
def test_auto_takes_the_most_workers_that_share_evenly(micro_batches, num_gpus, workers):
    lines: list[str] = []
    demand = Demand(micro_batches, "batch size 7 in micro-batches of 1")
    placement = resolve(PlacementConfig(), [Node(64, num_gpus)], demand, say=lines.append)
    assert (placement.workers, placement.concurrent_trials) == (workers, num_gpus)
    assert placement.cpus_per_worker == min(16, 64 // workers)
    assert len(lines) == (workers < num_gpus)
    assert all(line.startswith(f"{workers} of {num_gpus} GPUs for training: batch size 7") for line in lines)


def test_workers_that_the_user_named_are_not_replaced_by_fewer():
    assert resolve(PlacementConfig(workers=3), [Node(8, 4)], Demand(4)).workers == 3


@pytest.mark.parametrize(
    ("nodes", "wishes", "workers", "trials"),
    [
        ([Node(1, 8)], {}, 4, 8),
        ([Node(8, 4)], {"cpus_per_worker": 4}, 2, 4),
        ([Node(4, 1), Node(0, 1)], {}, 1, 1),
        ([Node(2, 2), Node(4, 2)], {"cpus_per_worker": 2}, 3, 4),
    ],
    ids=str,
)
def test_auto_takes_fewer_workers_and_trials_on_few_cpus(nodes, wishes, workers, trials):
    lines: list[str] = []
    placement = resolve(PlacementConfig(**wishes), nodes, say=lines.append)
    assert (placement.workers, placement.concurrent_trials) == (workers, trials)
    assert placement.cpus_per_trial > 0
    (line,) = lines
    gpus = sum(node.gpus for node in nodes)
    assert line.startswith(f"{workers} of {gpus} GPUs: the CPUs of this Ray")


def test_auto_takes_as_many_workers_as_wrote_the_checkpoint():
    lines: list[str] = []
    assert resolve(PlacementConfig(), [Node(8, 4)], Demand(4, ranks=2), say=lines.append).workers == 2
    assert resolve(PlacementConfig(), [Node(8)], Demand(4, ranks=2), say=lines.append).workers == 2
    assert [line.partition(":")[0] for line in lines] == ["2 of 4 GPUs", "2 workers"]
    assert resolve(PlacementConfig(), [Node(8, 4)], Demand(4, ranks=8)).workers == 4
    assert resolve(PlacementConfig(workers=4), [Node(8, 4)], Demand(4, ranks=2)).workers == 4


def test_fewer_workers_leave_the_trials_of_a_sweep_as_they_were():
    many = resolve(PlacementConfig(cpus_per_worker=4), [Node(16, 4)], Demand(4))
    one = resolve(PlacementConfig(cpus_per_worker=4), [Node(16, 4)], Demand(1))
    assert (many.workers, one.workers) == (4, 1)
    assert (many.concurrent_trials, many.cpus_per_trial) == (one.concurrent_trials, one.cpus_per_trial) == (4, 4)


def test_the_users_patience_ends_before_a_waiting_worker_stalls():
    assert placed().patience_s == PATIENCE_S
    assert placed(patience_s=20).for_trial().patience_s == 20
    assert PATIENCE_S >= 600
    with pytest.raises(ValueError, match="less than or equal to 900"):
        PlacementConfig(patience_s=901)
    assert PATIENCE_S + SILENCE_S <= SLOW_S + 60 * placed().stall_minutes < TIMEOUT_S


def test_a_shrinkable_training_starts_if_only_the_fewest_fit():
    wishes = {"workers": 3, "workers_min": 1, "cpus_per_worker": 2}
    placement = placed(num_cpus=2, **wishes)
    assert (placement.workers, placement.workers_min) == (3, 1)
    with pytest.raises(ValueError, match="CPUs, but this Ray has 2"):
        placed(num_cpus=2, workers=3, cpus_per_worker=2)


def test_a_compiled_training_moved_to_zero_3_or_cpu_is_eager():
    compiled = Demand(4, compile="on")
    assert resolve(PlacementConfig(), [Node(8, 1)], compiled).compile == "on"
    assert resolve(PlacementConfig(zero_stage="3"), [Node(8, 1)], compiled).compile == "off"
    assert resolve(PlacementConfig(), [Node(8)], compiled).compile == "off"


def test_the_fewest_workers_are_at_most_all_of_them():
    with pytest.raises(ValueError, match=r"--placement\.workers-min 4: there can be no more than 2 workers"):
        placed(workers=2, workers_min=4)


def test_only_worker_counts_that_share_a_batch_evenly_are_taken():
    train = TrainConfig(batch_size=96, micro_batch=8)
    assert train.sizes(1, 12) == [1, 2, 3, 4, 6, 12]
    assert train.sizes(4, 8) == [4, 6]
