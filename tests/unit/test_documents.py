"""The documents against the code: commands, options, keys, links, the tree, snippets, fields, figures."""

import functools
import io
import json
import re
import shlex
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import config_reference
import pyarrow.parquet as pq
import pytest

from data_shards import convert, manifest
from data_shards.config import DataConfig
from data_shards.renamed import SETTINGS
from data_shards.store import open_store
from pipelines.cli import VERBS, main
from pipelines.flow.record import Record
from pipelines.recipes import RECIPES, Recipe
from pipelines.workflows import WORKFLOWS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipelines", "medmamba", "data_shards")
NAMES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "data_shards/README.md",
    "medmamba/README.md",
    "pipelines/README.md",
    "infra/README.md",
)
DOCUMENTS = {name: (ROOT / name).read_text() for name in NAMES}
README, CONTRIBUTING = DOCUMENTS["README.md"], DOCUMENTS["CONTRIBUTING.md"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCES = {name: FENCE.findall(text) for name, text in DOCUMENTS.items()}
STEPS = {step.name for workflow in WORKFLOWS.values() for step in workflow(Recipe())}
LOOKING = ("predict", "export", "report", "status", "datasets", "submit", "bench", "shards")  # verbs without --dry-run
# What other programs the documents call. The paths that these commands name have to exist.
PROGRAMS = {"make", "source", "mkdir", "export", "ray", "docker", "kubectl", "cd", "cp", ".venv/bin/python"}
FOREIGN_FLAGS = {"--backend-store-uri", "--real"}  # of MLflow's command and of a script


def commands(name: str) -> list[str]:
    """The lines of all shell blocks of a document, continued lines joined."""
    blocks = [text.replace("\\\n", " ") for language, text in FENCES[name] if language == "sh"]
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def spans(name: str) -> list[str]:
    """What a document's text has between backticks, outside of its blocks; `--placement.*` stands for all its keys."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", DOCUMENTS[name]))


def arguments_of(command: str) -> list[str] | None:
    """What follows `medmamba`, or `python -m pipelines` in a job; None for any other command."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables of this command alone
        del words[0]
    if words[:1] == ["medmamba"]:
        return words[1:]
    return words[words.index("pipelines") + 1 :] if "pipelines" in words else None


OURS = [
    pytest.param(words, id=f"{name}: {' '.join(words)}")
    for name in NAMES
    for command in commands(name)
    if (words := arguments_of(command)) is not None
]
OTHERS = [
    pytest.param(command, id=f"{name}: {command}")
    for name in NAMES
    for command in commands(name)
    if arguments_of(command) is None
]


@functools.cache
def help_of(*verb: str) -> str:
    text = io.StringIO()
    with redirect_stdout(text):
        assert main([*verb, "--help"]) == 0
    return text.getvalue()


@functools.cache
def known_flags() -> set[str]:
    """Every option of every verb."""
    two = [("datasets", "fetch"), ("datasets", "verify"), ("bench", "data")]
    two += [("shards", word) for word in ("verify", "show", "duplicates", "quarantine", "names")]
    texts = [help_of(), *(help_of(verb) for verb in VERBS), *(help_of(*words) for words in two)]
    return {flag for text in texts for flag in re.findall(r"--[a-z][\w.-]*", text)}


def tree() -> list[str]:
    """The folders that the tree of the architecture names, relative to the root; each ends in "/"."""
    (block,) = (text for _, text in FENCES["CONTRIBUTING.md"] if text.startswith("data_shards/ "))
    paths, folders = [], []
    for line in block.splitlines():
        folders = folders[: (len(line) - len(line.lstrip())) // 4]
        folders.append(line.split()[0])
        paths.append("".join(folders))
    return paths


def test_the_tree_names_every_folder_of_the_packages():
    there = {f"{path.parent.relative_to(ROOT)}/" for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert there - set(tree()) == set()


def test_the_tree_names_every_folder_of_infra_and_of_the_tests():
    parts = [*(ROOT / "infra").iterdir(), *(ROOT / "tests").iterdir()]
    there = {f"{path.relative_to(ROOT)}/" for path in parts if any(path.glob("[!_.]*"))}
    assert there - set(tree()) == set()


def test_everything_the_tree_names_exists_once():
    assert len(set(tree())) == len(tree())
    assert [named for named in tree() if not (ROOT / named).is_dir()] == []


def test_every_line_of_the_tree_says_what_it_names():
    (block,) = (text for _, text in FENCES["CONTRIBUTING.md"] if text.startswith("data_shards/ "))
    assert all(len(line.split()) > 1 or line == "tests/" for line in block.splitlines())


def test_the_readme_stays_short_enough_to_be_read():
    assert len(README.splitlines()) <= 220


@pytest.mark.parametrize("name", sorted({*VERBS, *RECIPES, *WORKFLOWS, *STEPS}))
def test_every_verb_recipe_workflow_and_step_is_mentioned(name):
    assert f"`{name}`" in README + DOCUMENTS["pipelines/README.md"]


def slugs(document: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_the_linked_files_and_headings_exist(name):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", DOCUMENTS[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = {target for text in DOCUMENTS.values() for target in re.findall(r"(?:`|^)make ([\w-]+)", text, re.M)}
    assert {"quickstart", "test", "test-slow", "lint", "reference"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("words", OURS)
def test_every_command_is_one_that_the_command_line_takes(words, tmp_path):
    if words[0] in LOOKING or "--help" in words:
        check_flags(words, tmp_path)
    else:
        dry_run(words, tmp_path)


@pytest.mark.parametrize("command", OTHERS)
def test_every_other_command_calls_a_known_program_and_paths(command):
    words = shlex.split(command)
    assert words[0] in PROGRAMS, command
    for word in words[1:]:
        if word.startswith((*(f"{package}/" for package in PACKAGES), "infra/", "tests/")):
            assert (ROOT / word).exists(), word
    if words[0] == "cp":
        assert list(ROOT.glob(f"infra/*/{words[1]}")), words[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_option_in_the_text_exists(name):
    flags = {flag for span in spans(name) for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*+(?!\*)", span)}
    assert flags - known_flags() - FOREIGN_FLAGS == set()


@pytest.mark.parametrize("name", NAMES)
def test_every_key_in_the_text_exists(name):
    keys = {field.key for field in config_reference.fields()}
    if name in ("CHANGELOG.md", "pipelines/README.md"):  # where renamed settings are listed
        keys |= {key.partition("=")[0] for row in SETTINGS for key in (row.old, row.new)}
    parts = "|".join(sorted({key.partition(".")[0] for key in keys}))
    named = {span for span in spans(name) if re.fullmatch(rf"({parts})\.[a-z_]+(\.[a-z_]+)*", span)}
    known = keys | {key.rpartition(".")[0] for key in keys} | {row.old for row in SETTINGS}
    assert {key for key in named if not key.endswith((".json", ".jsonl"))} - known == set()


@pytest.mark.parametrize("name", NAMES)
def test_every_command_in_the_text_names_a_verb(name):
    verbs = [span.split()[1] for span in spans(name) if re.match(r"medmamba [a-z]", span)]
    assert [verb for verb in verbs if verb not in VERBS] == []


def check_flags(words: list[str], folder: Path) -> None:
    """The verb and its flags exist; a command that would be submitted is checked in its own right."""
    own, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    two = own[0] == "shards" or own[1:2] in (["fetch"], ["verify"], ["data"])
    text = help_of(*([] if own[0].startswith("-") else own[: 2 if two else 1]))
    for flag in (word for word in own[1:] if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), f"medmamba {own[0]} has no {flag}"
    if command:
        test_every_command_is_one_that_the_command_line_takes(command, folder)


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


def snippet(name: str, word: str) -> str:
    """The Python block of a document that has this word."""
    (found,) = (text for language, text in FENCES[name] if language == "python" and word in text)
    return found


def test_the_checkpoint_snippet_runs(tmp_path, monkeypatch):
    from medmamba.checkpoint import load_model, save_model
    from medmamba.config import MedMambaConfig
    from medmamba.model import build_model

    monkeypatch.chdir(tmp_path)
    config = MedMambaConfig(num_classes=3)
    card = {"classes": ["a", "b", "c"], "task": "multiclass", "image_size": 64, "channels": 1}
    save_model(Path("medmamba-store/runs/quickstart/train/model"), build_model(config), config, card=card)
    exec(compile(snippet("medmamba/README.md", "load_upstream"), "README.md", "exec"), {})
    model, found, _ = load_model(Path("nano"))
    assert (found.variant, found.num_classes) == ("nano", 3)
    assert sum(p.numel() for p in model.parameters()) == 496_695


def test_the_prediction_snippet_runs_on_a_champion(tmp_path, monkeypatch, capsys):
    import mlflow
    import registered
    from PIL import Image

    from pipelines.tracking import open_tracking

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlflow, "set_tracking_uri", mlflow.set_tracking_uri)
    store = open_store(str(tmp_path / "medmamba-store"))
    registered.released(store, open_tracking(store), "first", auc=0.9)
    Path("images").mkdir()
    for name in ("a", "b", "c"):
        Image.new("L", (48, 48), 90).save(f"images/{name}.png")
    try:
        exec(compile(snippet("README.md", "mlflow.pyfunc"), "README.md", "exec"), {})
    finally:
        mlflow.set_tracking_uri(None)  # it is exported too, and later tests would use this server
    printed = capsys.readouterr().out
    assert all(label in printed for label in registered.CLASSES)


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
        row = f"| {variant} | {shape} | {' | '.join(f'{count:,}' for count in counts)} |"
        assert row in DOCUMENTS["medmamba/README.md"]


def test_the_table_of_backends_names_each_once():
    from medmamba.ops.ss2d_scan import backends

    table = DOCUMENTS["medmamba/README.md"].partition("| backend |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == sorted(backends(), key=table.index)
    assert len(re.findall(r"^\| `", table, re.MULTILINE)) == len(backends())


def test_the_fields_of_manifest_index_and_record_are_named(tmp_path):
    config = DataConfig(phantoms={"num_patients": 30, "images_per_patient": 1, "side": 32})
    convert.convert(config, open_store(str(tmp_path)))
    columns = pq.read_schema(tmp_path / manifest.INDEX).names
    parts = (manifest.SplitCounts, manifest.ShardEntry, manifest.IndexEntry, manifest.Manifest, manifest.Quarantined)
    fields = [name for part in parts for name in part.model_fields]
    sections = DOCUMENTS["data_shards/README.md"].partition("### Manifest")[2].partition("## S3")[0]
    assert [name for name in (*fields, *columns) if f"`{name}`" not in sections] == []
    record = DOCUMENTS["pipelines/README.md"].partition("### `record.json`")[2]
    assert [name for name in Record.__dataclass_fields__ if f"`{name}`" not in record] == []


def test_every_dependency_has_its_reason():
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *(each for group in extras.values() for each in group)]:
        (line,) = {line for line in text.splitlines() if f'"{requirement}"' in line}
        before = text[: text.index(line)].splitlines()
        assert "  # " in line or before[-1].lstrip().startswith("# "), f"{requirement} has no reason"


def test_the_results_agree_with_the_output_that_is_shown():
    printed = next(text for _, text in FENCES["README.md"] if text.startswith("Run quickstart"))
    network, logistic = (
        ", ".join(re.search(rf"^{row} +│ ([\d.]+) │ ([\d.]+) +│ ([\d.]+)", printed, re.MULTILINE).groups())
        for row in ("network", "logistic, pixels")
    )
    assert f"| `make quickstart` | 240 phantoms | two cores | 77 s, again 3 s | {network} | {logistic} |" in README
    assert printed.count(f"test AUC {network[:6]}") == printed.count(f"test auc {network[:6]}") == 1
    text = " ".join(README.split())
    assert "This took 77 s" in text
    assert "ends after 3 s" in text


def test_bench_shares_match_the_figures_next_to_them():
    ((trained, benched, share),) = re.findall(r"\| ([\d,]+) \| ([\d,]+) \(training reaches ([\d.]+) of it\)", README)
    trained, benched = (int(figure.replace(",", "")) for figure in (trained, benched))
    assert f"{trained / benched:.3f}" == share


def test_the_reference_of_the_configuration_is_current():
    written = (ROOT / "pipelines" / "CONFIG.md").read_text()
    assert written == config_reference.text(), "run `make reference`"
