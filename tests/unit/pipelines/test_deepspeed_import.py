"""DeepSpeed is imported without MLflow, which its autotuner would import, and MLflow stays importable."""

from __future__ import annotations

import subprocess
import sys


def loaded(*statements: str) -> list[str]:
    code = "\n".join([*statements, "import sys; print('mlflow' in sys.modules, 'deepspeed' in sys.modules)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-2:]


IMPORT = "from pipelines.worker.deepspeed_import import import_deepspeed\nimport_deepspeed('cpu')"


def test_importing_deepspeed_loads_no_mlflow():
    assert loaded(IMPORT) == ["False", "True"]


def test_mlflow_can_be_imported_before_and_after():
    assert loaded("import mlflow", IMPORT, "mlflow.MlflowClient") == ["True", "True"]
    assert loaded(IMPORT, "import mlflow", "mlflow.MlflowClient") == ["True", "True"]
