"""When a training is compiled, and whether its compiled code is on this machine already."""

from __future__ import annotations

import pytest

from data_shards.config import DataConfig, PhantomConfig
from data_shards.convert import convert
from data_shards.manifest import Dataset, open_dataset
from data_shards.store import open_store
from medmamba.config import ConvNetConfig, MedMambaConfig
from pipelines.override import override
from pipelines.placement import Placement
from pipelines.worker.config import TrainStepConfig
from pipelines.worker.engine.compile_cache import CompileCache, decide_compile, is_compiled

AUTO = Placement(
    workers=1,
    device="cpu",
    cpus_per_worker=1,
    zero_stage=0,
    scan="reference",
    concurrent_trials=1,
    nodes=1,
    compile="auto",
)
SHORT = TrainStepConfig(model=MedMambaConfig(variant="nano", num_classes=2))
LONG = override(SHORT, {"train.epochs": 10**9})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    out = open_store(str(tmp_path_factory.mktemp("store")))
    convert(DataConfig(phantoms=PhantomConfig(num_patients=20, images_per_patient=1, side=32)), out)
    return open_dataset(out)


@pytest.mark.parametrize(
    ("config", "setting", "decided"),
    [
        (SHORT, "auto", "off"),
        (LONG, "auto", "on"),
        (TrainStepConfig(model=ConvNetConfig(num_classes=2), train=LONG.train), "auto", "off"),
        (SHORT, "on", "on"),
        (LONG, "off", "off"),
    ],
    ids=["short", "long", "another network", "asked for", "refused"],
)
def test_a_training_is_compiled_where_it_is_long_or_asked_for(config, setting, decided, data):
    placement = AUTO.model_copy(update={"compile": setting})
    found, reason = decide_compile(placement, config, data)
    assert (found.compile, reason) == (decided, "")


def test_a_long_training_without_compiler_is_eager_and_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    found, reason = decide_compile(AUTO, LONG, data)
    assert (found.compile, "no C compiler" in reason) == ("off", True)
    assert decide_compile(AUTO, SHORT, data)[1] == ""
    monkeypatch.setenv("CC", "/opt/gcc")
    assert decide_compile(AUTO, LONG, data)[0].compile == "on"


@pytest.mark.parametrize(
    ("device", "precision", "setting", "expected"),
    [
        ("cuda", "bfloat16", "on", True),
        ("cuda", "tf32", "on", True),
        ("cuda", "float32", "on", False),
        ("cpu", "float32", "on", True),
        ("cuda", "bfloat16", "off", False),
    ],
)
def test_float32_on_a_gpu_is_replayed_without_being_compiled(device, precision, setting, expected):
    placement = AUTO.model_copy(update={"device": device, "compile": setting})
    assert is_compiled(placement, precision) is expected


def test_a_long_float32_training_on_a_gpu_needs_no_compiler(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    on_gpu = AUTO.model_copy(update={"device": "cuda"})
    config = override(LONG, {"train.precision": "float32"})
    assert (decide_compile(on_gpu, config, data)[0].compile, decide_compile(on_gpu, config, data)[1]) == ("on", "")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "medmamba/compiled"))


@pytest.mark.parametrize(
    "change",
    [
        {"train.label_smoothing": 0.1},
        {"train.micro_batch": 16},
        {"train.precision": "bfloat16"},
        {"train.augment.rotate": 3.0},
        {"model.variant": "T"},
    ],
    ids=str,
)
def test_what_changes_the_code_is_not_taken_for_compiled(change, data, own_cache):
    manifest = data.manifest
    assert not CompileCache(SHORT, AUTO, manifest).is_warm
    CompileCache(SHORT, AUTO, manifest).remember()
    assert CompileCache(override(SHORT, {"train.optim.lr": 0.5, "model.drop_path": 0.3}), AUTO, manifest).is_warm
    assert not CompileCache(override(SHORT, change), AUTO, manifest).is_warm
    other = manifest.model_copy(update={"channels": 4 - manifest.channels})
    assert not CompileCache(SHORT, AUTO, other).is_warm
