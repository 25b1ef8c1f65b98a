"""The shape of the code: no circles, arrows in one direction, and nothing too large to be read.

A list of known offenders names what does not keep a rule yet. Each of its entries must still offend, so a list can only
become shorter.
"""

import ast
import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data_shards", "medmamba", "pipelines")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
MOST_MODULES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 16, 400, 60
LONGEST_TEST_NAME = 60
# One text that is read from top to bottom: the loops of a kernel, and the training loop.
LONG_FILES = {"medmamba/ops/ss2d_scan/numba_kernels.py"}
LONG_FUNCTIONS = {
    "medmamba/ops/ss2d_scan/numba_kernels.py: backward",
    "pipelines/worker/loop.py: train_loop",
}

# A row may import itself and the rows above it. For modules at the top of a package that are in no row, only the rules
# about circles count.
LAYERS = {
    "data_shards": (
        ("store",),
        ("decode", "source", "catalog"),
        ("duplicates", "loader"),
        ("convert", "verify", "contact_sheet"),
    ),
}
# Folder -> what it must not import, anywhere in it.
NEVER = {
    "data_shards": ("medmamba", "pipelines"),
    "medmamba": ("data_shards", "pipelines"),
    "pipelines.flow": (
        "pipelines.bench",
        "pipelines.cli",
        "pipelines.cluster",
        "pipelines.commands",
        "pipelines.recipes",
        "pipelines.steps",
        "pipelines.sweep",
        "pipelines.tracking",
        "pipelines.worker",
    ),
    "pipelines.worker": (
        "pipelines.bench",
        "pipelines.cli",
        "pipelines.commands",
        "pipelines.recipes",
        "pipelines.steps",
    ),
    "pipelines.sweep": ("pipelines.bench", "pipelines.cli", "pipelines.commands", "pipelines.recipes"),
    "pipelines.tracking": ("pipelines.bench", "pipelines.cli", "pipelines.commands", "pipelines.steps"),
    "pipelines.cluster": ("pipelines.bench", "pipelines.cli", "pipelines.commands", "pipelines.steps"),
    "pipelines.steps": ("pipelines.bench", "pipelines.cli", "pipelines.commands"),
    "pipelines.recipes": ("pipelines.bench", "pipelines.cli", "pipelines.commands"),
    "pipelines.commands": ("pipelines.cli",),
    "pipelines.bench": ("pipelines.cli",),
}

# Modules or folders; a circle among some of one entry's is known.
KNOWN_CIRCLES: tuple[set[str], ...] = ()
KNOWN_FOLDER_CIRCLES: tuple[set[str], ...] = ()
KNOWN_ARROWS: set[str] = set()
KNOWN_WIDE: set[str] = set()
KNOWN_LONG: set[str] = set()
KNOWN_LONG_FUNCTIONS: set[str] = set()


def imports(module: str, *, lazy: bool) -> Iterator[str]:
    """The modules of ours that a module imports; with `lazy` also inside functions and under TYPE_CHECKING."""
    path = FILES[module]
    parsed = ast.parse(path.read_text())
    for node in ast.walk(parsed) if lazy else parsed.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            here = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            source = ".".join([*here, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield from [full] if full in FILES else [source] if source in FILES else []


@functools.cache
def graph(*, lazy: bool) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, itself and its own package's `__init__` excepted."""
    return {
        module: {
            other
            for other in imports(module, lazy=lazy)
            if not f"{module}.".startswith(f"{other}.") and not f"{other}.".startswith(f"{module}.")
        }
        for module in FILES
    }


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that reach each other (Tarjan's strongly connected components), those of one left out."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return sorted(found)


def folder_graph(depth: int) -> dict[str, set[str]]:
    """Folder, at most so deep -> the folders that its modules import; a module at the top of a package is a node."""

    def folder(module: str) -> str:
        parts = (module if FILES[module].stem == "__init__" else module.rpartition(".")[0]).split(".")[:depth]
        return ".".join(parts) if len(parts) > 1 else module

    edges = defaultdict(set)
    for module, others in graph(lazy=True).items():
        here = folder(module)
        for there in map(folder, others):
            if not f"{here}.".startswith(f"{there}.") and not f"{there}.".startswith(f"{here}."):
                edges[here].add(there)
    return edges


def same(offending: set[str], known: set[str]) -> None:
    assert sorted(offending - known) == [], "new offenders"
    assert sorted(known - offending) == [], "no longer offending: take them out of the list"


def test_no_modules_import_each_other_in_a_circle():
    assert circles(graph(lazy=False)) == []


def only_known_circles(found: list[list[str]], known: tuple[set[str], ...]) -> None:
    new = [group for group in found if not any(set(group) <= entry for entry in known)]
    gone = [sorted(entry) for entry in known if not any(set(group) <= entry for group in found)]
    assert new == []
    assert gone == [], "no longer circles: take them out of the list"


def test_no_modules_import_in_a_circle_even_inside_functions():
    only_known_circles(circles(graph(lazy=True)), KNOWN_CIRCLES)


@pytest.mark.parametrize("depth", [2, 3])
def test_no_folders_import_each_other_in_a_circle(depth):
    only_known_circles(circles(folder_graph(depth)), KNOWN_FOLDER_CIRCLES)


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def layer(module: str) -> float:
    """The row of its package that a module is in, from 0 at the top; NaN, which compares with nothing, for none."""
    package, _, rest = module.partition(".")
    top = rest.partition(".")[0]
    return next((row for row, names in enumerate(LAYERS.get(package, ())) if top in names), math.nan)


def arrows_against_the_rules() -> set[str]:
    found = set()
    for module, others in graph(lazy=True).items():
        for folder, forbidden in NEVER.items():
            if f"{module}.".startswith(f"{folder}."):
                found |= {
                    f"{module} -> {other}" for other in others for no in forbidden if f"{other}.".startswith(f"{no}.")
                }
        found |= {f"{module} -> {other}" for other in others if layer(module) < layer(other)}
    return found


def test_no_module_imports_against_the_direction_of_its_folder():
    same(arrows_against_the_rules(), KNOWN_ARROWS)


def test_every_folder_that_a_rule_names_exists():
    folders = {folder for folder, forbidden in NEVER.items() for folder in (folder, *forbidden)}
    rows = {f"{package}.{name}" for package, rows in LAYERS.items() for row in rows for name in row}
    assert sorted((folders | rows) - {".".join(name.split(".")[:2]) for name in FILES}) == []


def test_no_folder_has_too_many_modules():
    modules = defaultdict(int)
    for path in FILES.values():
        modules[path.parent.relative_to(ROOT).as_posix()] += path.stem != "__init__"
    same({folder for folder, count in modules.items() if count > MOST_MODULES}, KNOWN_WIDE)


def test_no_file_is_too_long():
    lengths = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in FILES.values()}
    same({name for name, length in lengths.items() if length > MOST_LINES} - LONG_FILES, KNOWN_LONG)


def test_no_function_is_too_long():
    found = set()
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and node.end_lineno - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION:
                found.add(f"{path.relative_to(ROOT).as_posix()}: {node.name}")
    same(found - LONG_FUNCTIONS, KNOWN_LONG_FUNCTIONS)


def test_no_name_of_a_test_is_too_long():
    found = {
        f"{path.relative_to(ROOT).as_posix()}: {node.name}"
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) > LONGEST_TEST_NAME
    }
    assert sorted(found) == []
