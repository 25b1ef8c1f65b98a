"""The arithmetic of a training's speed, with a clock that the tests move."""

import pytest

from medmamba.config import ConvNetConfig, MedMambaConfig
from medmamba.cost import macs
from pipelines.worker.checkpoint.usage import USAGE, Usage, read_usage, usage_bytes
from pipelines.worker.meter.peak import peak_images_per_s
from pipelines.worker.meter.speed import LAST_STEPS, Meter, _over_ranks
from pipelines.worker.state import ResumeError


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Card:
    """A GPU of which the figures are known."""

    name = "NVIDIA H200"

    def __init__(self) -> None:
        self.joules, self.restarts = 0.0, 0

    def figures(self) -> dict[str, float]:
        return {"gpu_memory_gib": 8.0, "gpu_reserved_gib": 9.0, "gpu_utilization": 0.5}

    def restart(self) -> None:
        self.restarts += 1

    def energy_j(self) -> float:
        return self.joules


@pytest.fixture
def clock() -> Clock:
    return Clock()


def train(meter: Meter, clock: Clock, steps: int, *, wait_s: float = 0.1, step_s: float = 0.4, look_every: int = 1):
    """One epoch of `steps` steps; each waits for its batch and then computes."""

    def stream():
        for number in range(steps):
            clock.now_s += wait_s
            yield number

    meter.begin_epoch()
    for number in meter.fetched(stream(), steps):
        clock.now_s += step_s
        meter.step(looked=(number + 1) % look_every == 0 or number + 1 == steps)
    meter.end_training()


def test_an_epoch_has_its_speed_step_and_waiting_share(clock):
    meter = Meter(8, clock=clock)
    train(meter, clock, 10)
    with meter.validating():
        clock.now_s += 3
    figures = meter.epoch()
    assert figures == {
        "images_per_s": pytest.approx(16.0),
        "images_per_s_last": pytest.approx(16.0),
        "step_ms": pytest.approx(500.0),
        "data_wait_share": pytest.approx(0.2),
        "data_wait_share_last": pytest.approx(0.2),
        "validation_s": pytest.approx(3.0),
    }


def test_the_last_steps_are_not_slowed_by_those_before_them(clock):
    meter = Meter(8, clock=clock)
    meter.begin_epoch()
    clock.now_s += 100  # workers start
    for seconds in [5.0] * 10 + [0.5] * LAST_STEPS:
        clock.now_s += seconds
        meter.step()
    assert meter.images_per_s_last == pytest.approx(16.0)
    assert meter.wait_share_last == 0.0
    assert meter.left_s(10) == pytest.approx(5.0)


def test_on_a_gpu_speed_is_measured_between_looks_at_the_loss(clock):
    meter = Meter(8, gpu=Card(), clock=clock)
    meter.begin_epoch()
    for number in range(1, 2 * LAST_STEPS + 6):
        looks = number % LAST_STEPS == 0
        clock.now_s += 10.0 if looks else 0.0  # the host launches twenty steps at once, then waits for the GPU
        meter.step(looked=looks)
    assert meter.images_per_s_last == pytest.approx(LAST_STEPS * 8 / 10)


def test_before_the_first_look_the_hosts_clock_has_to_do(clock):
    meter = Meter(8, gpu=Card(), clock=clock)
    meter.begin_epoch()
    assert meter.images_per_s_last == meter.left_s(5) == 0.0
    for _ in range(4):
        clock.now_s += 0.5
        meter.step()
    assert meter.images_per_s_last == pytest.approx(16.0)


def test_a_checkpoint_counts_in_the_next_epoch_and_slows_nothing(clock):
    meter = Meter(8, clock=clock)
    train(meter, clock, 10)
    assert "checkpoint_s" not in meter.epoch()
    for seconds in (2, 5):  # the best model, then the rest
        with meter.writing():
            clock.now_s += seconds
    train(meter, clock, 10)
    figures = meter.epoch()
    assert (figures["checkpoint_s"], figures["images_per_s"]) == (pytest.approx(7.0), pytest.approx(16.0))


def test_sustained_speed_leaves_out_the_first_epoch_and_pauses(clock):
    meter = Meter(8, clock=clock)
    train(meter, clock, 10, step_s=9.9)
    for _ in range(4):
        with meter.validating():
            clock.now_s += 30
        meter.epoch()
        with meter.writing():
            clock.now_s += 20
        clock.now_s += 1  # a boundary: before the first of the steady epochs it does not count
        train(meter, clock, 10)
    meter.epoch()
    assert meter.usage.steady_images == 4 * 80
    assert meter.usage.steady_s == pytest.approx(4 * 5 + 3 * 1)
    assert meter.usage.images_per_s == pytest.approx(320 / 23)
    assert (meter.usage.validation_s, meter.usage.checkpoint_s) == (120, 80)
    assert (meter.usage.images, meter.usage.wall_s) == (400, pytest.approx(100 + 4 * 5 + 4 * 51))


def test_a_single_epochs_speed_is_that_of_its_training():
    usage = Usage(images=80, wall_s=20, validation_s=8, checkpoint_s=2)
    assert usage.images_per_s == 8.0
    assert Usage().images_per_s == 0.0


def test_a_resumed_training_adds_to_what_was_used_before(clock, tmp_path):
    meter = Meter(8, gpu=Card(), clock=clock)
    train(meter, clock, 10, look_every=5)
    meter.epoch()
    (tmp_path / USAGE).write_bytes(usage_bytes(meter.usage))
    resumed = Meter(8, gpu=Card(), before=read_usage(tmp_path / USAGE), clock=clock)
    train(resumed, clock, 10, look_every=5)
    resumed.epoch()
    assert (resumed.usage.epochs, resumed.usage.images) == (2, 160)
    assert resumed.usage.gpu_s == {"NVIDIA H200": pytest.approx(10.0)}
    assert resumed.usage.steady_s == 0.0, "each process's first epoch starts workers and compiles"


def test_a_gpu_adds_memory_utilization_energy_and_peak_share(clock):
    card = Card()
    meter = Meter(8, gpu=card, peak_images_per_s=64.0, clock=clock)
    train(meter, clock, 10)
    card.joules = 7200.0
    figures = meter.epoch()
    assert figures["mfu"] == pytest.approx(0.25)
    assert {name: figures[name] for name in card.figures()} == card.figures()
    assert card.restarts == 1
    assert meter.usage.energy_kwh == pytest.approx(0.002)
    assert meter.usage.gpu_hours == pytest.approx(5 / 3600)


def test_ranks_are_put_together_the_same_on_each(clock):
    meter = Meter(8, gpu=Card(), clock=clock)
    train(meter, clock, 10)

    def gather(part):
        other = part.figures | {"data_wait_share": 0.9, "gpu_memory_gib": 3.0, "gpu_utilization": 0.1}
        return [part, part._replace(figures=other, energy_j=11.0, held_s=6.0)]

    figures = meter.epoch(gather)
    assert (figures["data_wait_share"], figures["gpu_memory_gib"]) == (0.9, 8.0)
    assert figures["gpu_utilization"] == pytest.approx(0.3)
    assert (meter.usage.gpu_s, meter.usage.energy_j) == ({"NVIDIA H200": pytest.approx(11.0)}, 11.0)


def test_a_rank_whose_gpu_says_nothing_does_not_lower_the_mean():
    assert _over_ranks([{"gpu_utilization": 0.8}, {}]) == {"gpu_utilization": 0.8}


def test_usage_is_kept_with_a_checkpoint_and_old_ones_have_none(tmp_path):
    usage = Usage(images=5, wall_s=2.5, gpu_s={"a": 1.5}, energy_j=3)
    assert read_usage(tmp_path / USAGE) == Usage()
    (tmp_path / USAGE).write_bytes(usage_bytes(usage))
    assert read_usage(tmp_path / USAGE) == usage
    assert usage.plus(Usage(images=1, gpu_s={"a": 1, "b": 2})).gpu_s == {"a": 2.5, "b": 2}
    (tmp_path / USAGE).write_text('{"images": "many"}')
    with pytest.raises(ResumeError, match=r"usage\.json of the checkpoint is invalid.*images.*another --run"):
        read_usage(tmp_path / USAGE)


def test_the_usage_in_the_middle_of_an_epoch_counts_its_steps(clock):
    meter = Meter(8, gpu=Card(), before=Usage(images=100, gpu_s={"NVIDIA H200": 7.0}), clock=clock)
    meter.begin_epoch()
    for _ in meter.fetched(range(4), 4):
        clock.now_s += 0.5
        meter.step(looked=True)
    now = meter.usage_now(2)
    assert (now.images, now.wall_s) == (100 + 4 * 8, pytest.approx(2.0))
    assert now.gpu_s == {"NVIDIA H200": pytest.approx(7.0 + 2 * 2.0)}


def test_the_peak_is_known_for_a_few_gpus_and_for_medmamba_only():
    tiny = MedMambaConfig(variant="T", num_classes=6)
    assert peak_images_per_s(tiny, 224, "NVIDIA H200", "bfloat16") == pytest.approx(989e12 / (6 * macs(tiny, 224)))
    for gpu, precision in [("NVIDIA H200 NVL", "bfloat16"), ("", "float32"), ("Tesla V100-SXM2-32GB", "bfloat16")]:
        assert peak_images_per_s(tiny, 224, gpu, precision) is None
    assert peak_images_per_s(ConvNetConfig(), 224, "NVIDIA H200", "bfloat16") is None


def test_an_epoch_whose_steps_were_all_made_before_has_no_speed(clock):
    meter = Meter(8, clock=clock, peak_images_per_s=100.0)
    train(meter, clock, 0)
    with meter.validating():
        clock.now_s += 3
    assert meter.speed() == {}
    assert meter.epoch() == {"validation_s": 3.0}
    train(meter, clock, 4)
    assert meter.speed() == {"images_per_s": pytest.approx(16.0)}
    assert "mfu" in meter.epoch()


def test_a_checkpoint_amid_validation_counts_once(clock):
    meter = Meter(8, clock=clock)
    train(meter, clock, 10)
    with meter.validating():
        clock.now_s += 3
        now = meter.usage_now(1)
        with meter.writing():
            clock.now_s += 2
        clock.now_s += 1
    assert (now.images, now.epochs, now.wall_s) == (80, 0, pytest.approx(8.0))
    meter.epoch()
    assert (meter.usage.images, meter.usage.epochs) == (80, 1)
    assert (meter.usage.validation_s, meter.usage.checkpoint_s) == (pytest.approx(4.0), pytest.approx(2.0))
    assert meter.usage.images_per_s == pytest.approx(16.0)
