"""Imports run one way: pipelines -> data_shards and medmamba, which know neither pipelines nor each other."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipelines", "medmamba", "data_shards")
CLUSTER_LIBRARIES = ("ray", "mlflow", "deepspeed")
MAY_IMPORT = {"pipelines": {"pipelines", "medmamba", "data_shards"}, "medmamba": {"medmamba"}}
MAY_IMPORT["data_shards"] = {"data_shards"}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """The dotted names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            here = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*here, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif _imports_by_name(node):
            names.add(node.args[0].value)
    return names


def _imports_by_name(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
        return False
    called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    return called in ("import_module", "__import__") and isinstance(node.args[0].value, str)


def loaded_by(statement: str, *watched: str) -> list[str]:
    """Which of the watched modules are loaded once a fresh interpreter has run the statement."""
    code = f"{statement}\nimport sys; print(*[name for name in {watched!r} if name in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_the_packages_that_its_own_may_know(path):
    ours = {name.partition(".")[0] for name in imported(path)} & {*PACKAGES, "tests"}
    assert ours <= MAY_IMPORT[path.relative_to(ROOT).parts[0]]


@pytest.mark.parametrize("package", ["medmamba", "data_shards"])
def test_only_pipelines_knows_ray_mlflow_and_deepspeed(package):
    for path in (ROOT / package).rglob("*.py"):
        roots = {name.partition(".")[0] for name in imported(path)}
        assert not roots & set(CLUSTER_LIBRARIES), path.relative_to(ROOT)


@pytest.mark.parametrize("package", ["medmamba", "data_shards"])
def test_importing_the_package_loads_no_ray_mlflow_or_deepspeed(package):
    assert loaded_by(f"import {package}", *CLUSTER_LIBRARIES, "pipelines") == []


def test_no_module_of_data_shards_but_augmentation_loads_torch():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if path.is_relative_to(ROOT / "data_shards") and path.stem != "augment"
    ]
    statement = "\n".join(f"import {module}" for module in modules)
    assert loaded_by(statement, "torch", "medmamba", *CLUSTER_LIBRARIES) == []


def test_no_module_of_medmamba_loads_ray_mlflow_or_deepspeed():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
    ours = [name.removesuffix(".__init__") for name in modules if name.startswith("medmamba.")]
    statement = "\n".join(f"import {module}" for module in ours)
    assert loaded_by(statement, *CLUSTER_LIBRARIES, "data_shards", "mamba_ssm") == []


def test_the_metrics_need_no_torch():
    for path in (ROOT / "medmamba" / "metrics").rglob("*.py"):
        assert "torch" not in {name.partition(".")[0] for name in imported(path)}, path.relative_to(ROOT)


def test_in_medmamba_only_the_operators_import_numba_and_triton():
    for path in FILES:
        if path.is_relative_to(ROOT / "medmamba") and not path.is_relative_to(ROOT / "medmamba" / "ops"):
            roots = {name.partition(".")[0] for name in imported(path)}
            assert not roots & {"numba", "triton", "mamba_ssm"}, path.relative_to(ROOT)


def test_the_registered_model_imports_neither_ray_nor_deepspeed():
    assert (ROOT / "pipelines" / "pyfunc.py").is_file()
    seen, queue = set(), ["pipelines.pyfunc"]
    while queue:
        module = queue.pop()
        path = ROOT / Path(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        names = imported(path)
        assert not {name.partition(".")[0] for name in names} & {"ray", "deepspeed"}, path.relative_to(ROOT)
        queue += [name for name in names if name.partition(".")[0] in PACKAGES]


def test_the_command_line_loads_no_library_that_takes_seconds():
    slow = ("torch", "numba", "scipy", "sklearn", "pandas", "pyarrow", "boto3", *CLUSTER_LIBRARIES)
    assert loaded_by("import pipelines.cli", *slow) == []


def test_the_training_loop_knows_no_ray():
    assert "ray" not in {name.partition(".")[0] for name in imported(ROOT / "pipelines" / "worker" / "loop.py")}


def test_the_runner_of_steps_knows_nothing_of_images():
    for path in (ROOT / "pipelines" / "flow").rglob("*.py"):
        names = imported(path)
        assert not {name.partition(".")[0] for name in names} & {"medmamba", "torch", "PIL"}, path.name
        known = ("data_shards.store", "data_shards.renamed")
        assert not any(name.startswith("data_shards") and not name.startswith(known) for name in names)


def test_decoding_needs_no_package_that_a_packaged_model_lacks():
    from importlib.metadata import packages_distributions

    from pipelines.tracking.registry import NEEDED

    code = (
        "import sys; before = set(sys.modules); import data_shards.decode; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    known = packages_distributions()
    needed = {distribution for name in found.split() for distribution in known.get(name, [])}
    assert {each.lower() for each in needed} - {"medmamba"} <= set(NEEDED)
