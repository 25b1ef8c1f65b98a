"""The cost of a training, from the user's price table."""

import pytest

from pipelines.cli import main
from pipelines.costs import cost_facts, cost_line, read_prices
from pipelines.worker.checkpoint.usage import Usage

ON_CPU = Usage(images=400, wall_s=750, steady_images=320, steady_s=8)
ON_GPU = ON_CPU.plus(Usage(gpu_s={"NVIDIA H200": 756.0}, energy_j=468_000))


@pytest.mark.parametrize(
    ("usage", "prices", "line"),
    [
        (ON_CPU, {"NVIDIA H200": 4.0}, "trained 5 epochs in 12:30 · 40 images/s"),
        (ON_GPU, {}, "trained 5 epochs in 12:30 · 40 images/s · 0.21 GPU-hours · 0.13 kWh"),
        (
            ON_GPU,
            {"NVIDIA H200": 4.0},
            "trained 5 epochs in 12:30 · 40 images/s · 0.21 GPU-hours · 0.13 kWh · about $0.84 at $4.00/GPU-hour",
        ),
        (
            ON_GPU,
            {"NVIDIA L4": 1.0},
            "trained 5 epochs in 12:30 · 40 images/s · 0.21 GPU-hours · 0.13 kWh · no price for NVIDIA H200",
        ),
    ],
    ids=["cpu", "no prices", "price", "another GPU's price"],
)
def test_the_last_line_of_a_training_says_what_is_known(usage, prices, line):
    assert cost_line(usage, 5, prices) == line


def test_what_is_not_known_is_no_fact():
    assert not {"gpu_hours", "energy_kwh", "price_usd"} & cost_facts(ON_CPU, {"NVIDIA H200": 4.0}).keys()
    facts = cost_facts(ON_GPU, {"NVIDIA H200": 4.0})
    assert facts["price_usd"] == pytest.approx(0.84)
    assert (facts["gpu_hours"], facts["energy_kwh"]) == (pytest.approx(0.21), pytest.approx(0.13))


def test_gpus_of_two_kinds_are_priced_each_by_its_own():
    both = ON_GPU.plus(Usage(gpu_s={"NVIDIA L4": 3600.0}))
    assert cost_line(both, 1, {"NVIDIA H200": 4, "NVIDIA L4": 0.5}).endswith("about $1.34 at $4.00, $0.50/GPU-hour")


def test_prices_are_read_from_toml(tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text('"NVIDIA H200" = 4\n"NVIDIA L4" = 0.8\n')
    assert read_prices(str(path)) == {"NVIDIA H200": 4.0, "NVIDIA L4": 0.8}
    assert read_prices("") == {}


def test_prices_from_an_editor_that_marks_utf8_are_read(tmp_path):
    path = tmp_path / "prices.toml"
    path.write_bytes(b'\xef\xbb\xbf"NVIDIA H200" = 4.0\n')
    assert read_prices(str(path)) == {"NVIDIA H200": 4.0}


def test_the_last_line_never_gives_some_epochs_time_for_all():
    resumed = ON_CPU.plus(Usage(epochs=2))  # the checkpoint of epoch 3 was written before there was usage.json
    assert cost_line(resumed, 5, {}) == "trained 5 epochs (the last 2 measured) in 12:30 · 40 images/s"
    assert cost_line(resumed, 2, {}) == "trained 2 epochs in 12:30 · 40 images/s"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"NVIDIA H200 = 4", "not a TOML file"),
        (b"\xff", "not a TOML file"),
        (b'"NVIDIA H200" = "4"', "is not a price"),
        (b'"NVIDIA H200" = -1', "is not a price"),
        (b'"NVIDIA H200" = nan', "is not a price"),
        (b"[gpus]\nH200 = 4", "is not a price"),
        (None, "No such file or directory"),
    ],
    ids=["bare name", "not text", "text", "negative", "nan", "nested", "missing"],
)
def test_a_wrong_table_is_refused_before_any_work(content, told, tmp_path, capsys):
    path = tmp_path / "prices.toml"
    if content is not None:
        path.write_bytes(content)
    words = ["train", "--recipe", "quickstart", "--dry-run", "--placement.prices", str(path)]
    assert main([*words, "--store", str(tmp_path / "store")]) == 2
    shown = capsys.readouterr().err
    assert f"--placement.prices {path}: " in shown
    assert told in shown
    assert shown.count("\n") == 1
