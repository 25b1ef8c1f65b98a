"""The README against the code: its tree, verbs, recipes, commands, snippets, fields and dependencies."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_shards import convert, manifest
from data_shards.config import DataConfig
from data_shards.store import open_store
from pipelines.cli import VERBS, main
from pipelines.flow.record import Record
from pipelines.recipes import RECIPES, Recipe
from pipelines.workflows import WORKFLOWS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PACKAGES = ("pipelines", "medmamba", "data_shards")
STEPS = {step.name for workflow in WORKFLOWS.values() for step in workflow(Recipe())}
LOOKING = ("predict", "status", "datasets", "submit", "bench", "shards")  # verbs without --dry-run
FENCES = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The lines of all shell blocks, continued lines joined."""
    blocks = [text.replace("\\\n", " ") for language, text in FENCES if language == "sh"]
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def arguments_of(command: str) -> list[str] | None:
    """What follows `medmamba`, or `python -m pipelines` in a job; None for any other command."""
    words = shlex.split(command)
    if words[0] == "medmamba":
        return words[1:]
    return words[words.index("pipelines") + 1 :] if "pipelines" in words else None


def tree() -> list[str]:
    """The paths that the README's tree names, relative to the root; folders end in "/"."""
    (block,) = (text for _, text in FENCES if text.startswith("data_shards/ "))
    paths, folders = [], []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 4
        folders = folders[:depth]
        paths.append("".join([*folders, name]))
        if name.endswith("/"):
            folders.append(name)
    return paths


OURS = [words for command in commands() if (words := arguments_of(command)) is not None]


def test_the_tree_names_every_python_file_of_the_packages():
    named = set(tree())
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            where = path.relative_to(ROOT).as_posix()
            assert where.removesuffix("__init__.py") in named, f"{where} is not in the README's tree"


def test_the_tree_names_every_folder_of_infra_and_of_the_tests():
    parts = [*(ROOT / "infra").iterdir(), *(ROOT / "tests").iterdir()]
    there = {f"{path.relative_to(ROOT)}/" for path in parts if any(path.glob("[!_.]*"))}
    assert there <= set(tree())


def test_everything_the_tree_names_exists_once():
    assert len(set(tree())) == len(tree())
    for named in tree():
        assert any(ROOT.glob(named)), f"{named} does not exist"


def test_every_line_of_the_tree_says_what_it_names():
    (block,) = (text for _, text in FENCES if text.startswith("data_shards/ "))
    assert all(len(line.split()) > 1 or line == "tests/" for line in block.splitlines())


@pytest.mark.parametrize("name", sorted({*VERBS, *RECIPES, *WORKFLOWS, *STEPS}))
def test_every_verb_recipe_workflow_and_step_is_mentioned(name):
    assert f"`{name}`" in README


def test_the_linked_files_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`?make ([\w-]+)", README))
    assert {"quickstart", "test", "lint"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_every_command_is_one_that_the_command_line_takes(words, tmp_path, capsys):
    if words[0] in LOOKING or "--help" in words:
        check_flags(words, tmp_path, capsys)
    else:
        dry_run(words, tmp_path)


def check_flags(words: list[str], folder: Path, capsys) -> None:
    """The verb and its flags exist; a command that would be submitted is checked in its own right."""
    own, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    two = own[0] == "shards" or own[1:2] in (["fetch"], ["verify"])
    verb = [] if own[0].startswith("-") else own[: 2 if two else 1]
    assert main([*verb, "--help"]) == 0
    told = capsys.readouterr().out
    for flag in (word for word in own[1:] if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", told), f"medmamba {own[0]} has no {flag}"
    if command:
        test_every_command_is_one_that_the_command_line_takes(command, folder, capsys)


def dry_run(words: list[str], folder: Path) -> None:
    """Resolves the whole configuration, where the run that it names was begun with the quickstart recipe."""
    if "--run" in words and "--recipe" not in words:
        kept = {"workflow": "direct", "recipe": RECIPES["quickstart"]().model_dump(mode="json")}
        run = words[words.index("--run") + 1]
        open_store(str(folder)).at("runs", run).put("workflow.json", json.dumps(kept).encode())
    if "--data.source" in words:  # a dry run looks whether it is there
        at = words.index("--data.source") + 1
        source = folder / words[at]
        if words[words.index("--data.layout") + 1 if "--data.layout" in words else 0] == "folders":  # and of classes
            for name in ("benign", "malignant"):
                (source / name).mkdir(parents=True)
                (source / name / "1.png").touch()
        else:
            source.parent.mkdir(parents=True, exist_ok=True)
            source.touch()
        words = [*words[:at], str(source), *words[at + 1 :]]
    if "--train.init" in words:
        at = words.index("--train.init") + 1
        words = [*words[:at], initial_weights(words[at], folder), *words[at + 1 :]]
    assert main([*words, *([] if "--dry-run" in words else ["--dry-run"]), "--store", str(folder)]) == 0


def initial_weights(named: str, folder: Path) -> str:
    """Makes the weights that a command starts from, in its folder or in the registry of its store; what names them."""
    import registered

    from medmamba.checkpoint import export_upstream
    from medmamba.config import MedMambaConfig
    from medmamba.model import build_model
    from pipelines.tracking import open_tracking

    store = open_store(str(folder))
    if named.startswith("models:/"):
        registered.released(store, open_tracking(store), "first", auc=0.9)
        return named
    if named.endswith(".pth"):
        export_upstream(build_model(MedMambaConfig(variant="T", num_classes=9)), folder / named)
        return str(folder / named)
    registered.facts(store, "other", auc=0.9)
    return str(folder / "runs/other/train/model")


def test_the_checkpoint_snippet_runs(tmp_path, monkeypatch, capsys):
    from medmamba.checkpoint import load_model, save_model
    from medmamba.config import MedMambaConfig
    from medmamba.model import build_model

    (snippet,) = (text for language, text in FENCES if language == "python" and "load_upstream" in text)
    monkeypatch.chdir(tmp_path)
    config = MedMambaConfig(num_classes=3)
    card = {"classes": ["a", "b", "c"], "task": "multiclass", "image_size": 64, "channels": 1}
    save_model(Path("medmamba-store/runs/quickstart/train/model"), build_model(config), config, card=card)
    exec(compile(snippet, "README.md", "exec"), {})
    model, found, _ = load_model(Path("nano"))
    assert (found.variant, found.num_classes) == ("nano", 3)
    assert sum(p.numel() for p in model.parameters()) == 496_695


def test_the_table_of_parameters_is_that_of_the_built_networks():
    import torch

    from medmamba.config import VARIANTS, MedMambaConfig
    from medmamba.model import build_model

    for variant, (dims, depths) in VARIANTS.items():
        counts = []
        for num_classes in (2, 6, 1000):
            with torch.device("meta"):
                model = build_model(MedMambaConfig(variant=variant, num_classes=num_classes), device="meta")
            counts.append(sum(p.numel() for p in model.parameters()))
        shape = f"{', '.join(map(str, depths))} | {', '.join(map(str, dims))}"
        assert f"| {variant} | {shape} | {' | '.join(f'{count:,}' for count in counts)} |" in README


def test_the_fields_of_manifest_index_and_record_are_named(tmp_path):
    config = DataConfig(phantoms={"num_patients": 30, "images_per_patient": 1, "side": 32})
    convert.convert(config, open_store(str(tmp_path)))
    columns = pq.read_schema(tmp_path / manifest.INDEX).names
    parts = (manifest.SplitCounts, manifest.ShardEntry, manifest.IndexEntry, manifest.Manifest, manifest.Quarantined)
    fields = [name for part in parts for name in part.model_fields]
    sections = README.partition("### Manifest")[2].partition("### Checkpoint")[0]
    assert [name for name in (*fields, *columns) if f"`{name}`" not in sections] == []
    record = README.partition("### `record.json`")[2].partition("###")[0]
    assert [name for name in Record.__dataclass_fields__ if f"`{name}`" not in record] == []


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    section = README.partition("## Dependencies")[2].partition("## The tree")[0]
    for requirement in project["dependencies"]:
        name = re.match(r"[\w-]+", requirement).group()
        assert f"| {name} |" in section, f"{name} has no line"
    for extra, requirements in project["optional-dependencies"].items():
        assert f"`{extra}`" in section
        assert all(re.match(r"[\w-]+", each).group() in section for each in requirements)
