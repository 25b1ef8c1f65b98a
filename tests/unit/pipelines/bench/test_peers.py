"""Other projects are known in bench/peers only, which nothing imports until it is asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.bench import conversion, loading
from pipelines.bench.peers import loaders, networks, writers

ROOT = Path(__file__).parents[4]
PEERS = ROOT / "pipelines" / "bench" / "peers"
OTHERS = {"timm", "webdataset", "litdata", "streaming", "img2dataset"}


def roots(path: Path) -> set[str]:
    """The first part of the name of each module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_only_peers_import_other_projects():
    files = [path for name in ("pipelines", "medmamba", "data_shards") for path in (ROOT / name).rglob("*.py")]
    assert [path for path in files if PEERS not in path.parents and roots(path) & OTHERS] == []
    assert set().union(*(roots(path) for path in PEERS.glob("*.py"))) >= OTHERS


def test_the_benchmark_loads_peers_only_when_they_are_asked_for():
    script = (
        "import sys, pipelines.bench.data, pipelines.bench.feed, pipelines.bench.networks, pipelines.bench.measure; "
        "print([name for name in sys.modules if 'peers' in name])"
    )
    told = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told == "[]\n"


@pytest.mark.parametrize("folder", ["worker", "steps", "flow", "sweep"])
def test_training_knows_no_benchmark(folder):
    for path in (ROOT / "pipelines" / folder).rglob("*.py"):
        assert "pipelines.bench." not in path.read_text(), path


def test_the_peers_that_are_named_exist():
    for made in [each for name, each in loading.LOADERS.items() if name != "medmamba"]:
        assert callable(getattr(loaders, made.args[0]))
    for name, pair in conversion.WRITERS.items():
        if name != "medmamba":
            assert all(callable(getattr(writers, each.args[0])) for each in pair)


def test_a_network_of_a_missing_project_says_what_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="needs the extra compare"):
        networks.create_network("resnet50", 64, 6)
