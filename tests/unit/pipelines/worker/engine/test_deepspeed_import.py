"""DeepSpeed is imported without MLflow, which its autotuner would import, and MLflow stays importable."""

from __future__ import annotations

import subprocess
import sys

import pytest


def loaded(*statements: str) -> list[str]:
    code = "\n".join([*statements, "import sys; print('mlflow' in sys.modules, 'deepspeed' in sys.modules)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-2:]


IMPORT = "from pipelines.worker.engine.deepspeed_import import import_deepspeed\nimport_deepspeed('cpu')"


def test_importing_deepspeed_loads_no_mlflow():
    assert loaded(IMPORT) == ["False", "True"]


def test_mlflow_can_be_imported_before_and_after():
    assert loaded("import mlflow", IMPORT, "mlflow.MlflowClient") == ["True", "True"]
    assert loaded(IMPORT, "import mlflow", "mlflow.MlflowClient") == ["True", "True"]


def test_an_engine_loads_no_compiler_for_unused_passes():
    """DeepSpeed asks its module for support by name; on a GPU the answer would be yes."""
    found = loaded(
        IMPORT,
        "import deepspeed.runtime.engine as engine",
        "assert not engine.is_deepcompile_supported()",
    )
    assert found == ["False", "True"]


STEP = """
import sys

import torch
from medmamba.config import MedMambaConfig
from medmamba.model import build_model
from pipelines.placement import Placement
from pipelines.worker.config import TrainConfig
from pipelines.worker.engine.engine import build_engine
from pipelines.worker.launch import world_of_one
from pipelines.worker.engine.objective import Objective
world_of_one("gloo")
place = Placement(
    workers=1, device="cpu", cpus_per_worker=1, zero_stage=0, scan="reference", concurrent_trials=1, nodes=1,
    flat={flat}
)
train = TrainConfig(batch_size=2, micro_batch=2, image_size=32)
model = build_model(MedMambaConfig(dims=(8, 16), depths=(1, 1), num_classes=2), scan="reference")
engine = build_engine(model, train, place)
images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
for _ in range(3):
    engine.train(Objective(train, "multiclass", None), images, torch.eye(2, dtype=torch.uint8), torch.rand(2, 18))
print("waits" if engine._engine.tput_timer.config.enabled else "flows")
print(sorted({{"torch._dynamo", "sympy"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("flat", [True, False])
def test_an_eager_training_loads_no_compiler_and_never_syncs(flat):
    code = STEP.format(flat=flat)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["flows", "[]"]
