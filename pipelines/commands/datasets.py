"""The command datasets: the catalog, and how the published files of a set come to this machine and are checked."""

from __future__ import annotations

import difflib
import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import tyro

from data_shards.catalog import DatasetCard, PublishedFile, card, names
from data_shards.catalog.fetch import Verdict, check_room, fetch, verify
from data_shards.renamed import both_keys, both_words
from pipelines.console.arguments import UsageError
from pipelines.console.command import Command, JsonOption
from pipelines.console.terminal import PLAIN_EVERY_S, Terminal, console, table
from pipelines.recipes import RECIPES

DEFAULT_FOLDER = "medmamba-data"


@dataclass(frozen=True)
class DatasetsArguments(JsonOption):
    """What `datasets` takes."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")] = ""
    """Dataset to show. Empty: all of the catalog."""


@dataclass(frozen=True)
class FetchArguments(JsonOption):
    """What `datasets fetch` takes."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """Dataset of the catalog."""
    file: tuple[str, ...] = ()
    """Which of its files (`medmamba datasets NAME` lists them). Empty: the smallest of several sizes, or all that make
    up the set."""
    to: str = ""
    """Folder for the files. Empty: medmamba-data/NAME."""
    mirror: str = ""
    """Address of a folder that holds the same files, to take them from there; the checksums stay."""


@dataclass(frozen=True)
class VerifyArguments(JsonOption):
    """What `datasets verify` takes."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """Dataset of the catalog."""
    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE ...")]
    """Files named as they were published, or folders with such files."""


def datasets(asked: DatasetsArguments) -> int:
    """Prints the catalog, or one dataset of it."""
    cards = [_card(asked.name)] if asked.name else [card(each) for each in names()]
    if asked.json:
        dumped = [both_words(each.model_dump(mode="json"), each.PART) for each in cards]
        _print_json(dumped[0] if asked.name else dumped)
    elif asked.name:
        rows = [(key, _readable(value)) for key, value in cards[0].model_dump(mode="json").items()]
        table(cards[0].title, ("field", "value"), rows)
    else:
        shown = [(c.name, c.modality, _classes(c), c.num_images or "", c.split_policy, c.licence) for c in cards]
        table("Datasets", ("name", "modality", "classes", "images", "split", "licence"), shown)
    return 0


def _classes(known: DatasetCard) -> str:
    num = len(known.classes)
    return str(num) if known.task == "multiclass" else f"{num} ({known.task})"


def fetch_files(asked: FetchArguments) -> int:
    """Gets files of a dataset and prints what to do with them; exit code 1 where they can only be placed by hand."""
    known = _card(asked.name)
    if known.layout == "phantoms":
        raise UsageError("datasets fetch: phantoms are drawn on the spot; there is nothing to fetch")
    if asked.mirror and not asked.mirror.startswith(("http://", "https://")):
        raise UsageError(f"datasets fetch: --mirror {asked.mirror} is not an address; give http://HOST/FOLDER")
    if not known.files or known.licence == "none":
        _tell_by_hand(known, asked.json)
        return 1
    wanted = _wanted(known, asked.file, asked.mirror)
    folder = Path(asked.to or f"{DEFAULT_FOLDER}/{known.name}").expanduser()
    terminal = Terminal()
    try:
        for line in (f"{known.title}: {known.licence}, {known.source}", *_terms(known)):
            terminal.say(line)
        check_room(wanted, folder)
        verdicts = {}
        for name, published in wanted.items():
            terminal.say(f"{name}: from {published.url}")
            verdicts[name] = fetch(published, folder / name, say=terminal.say, progress=_shown(terminal, name))
    finally:
        terminal.close()
    _tell_fetched(known, folder, verdicts, asked.json)
    return 0


def verify_files(asked: VerifyArguments) -> int:
    """Prints how files compare with the published ones; exit code 1 where one of them differs."""
    known = _card(asked.name)
    if not asked.paths:
        raise UsageError("datasets verify: name at least one file")
    if not known.files:
        raise ValueError(f"{asked.name} has no published files to compare with: {known.source}")
    found = {path: published for each in asked.paths for path, published in _published(known, Path(each).expanduser())}
    verdicts = [verify(published, path) for path, published in found.items()]
    if asked.json:
        _print_json([_as_json(str(verdict.path), verdict) for verdict in verdicts])
    else:
        shown = [(v.path, f"{v.size_bytes:,}", v.checked, v.fault or "as published") for v in verdicts]
        table(f"Files of {asked.name}", ("file", "bytes", "checked", "verdict"), shown)
    return int(any(verdict.fault for verdict in verdicts))


FETCH = Command(
    "datasets fetch",
    "Get the published files of a dataset, checked against the catalog; an interrupted download resumes.",
    FetchArguments,
    fetch_files,
    "Licence and citation are printed first. Proxies are those of the environment (http_proxy, https_proxy, no_proxy). "
    "For a set that is private, or has no address, it explains how to place the files by hand.",
)
VERIFY = Command(
    "datasets verify",
    "Compare files that you have with the published ones, by the checksums and sizes of the catalog.",
    VerifyArguments,
    verify_files,
    "Exit code 1 if one of them differs.",
)
DATASETS = Command(
    "datasets",
    "List the catalog, show one dataset of it, or fetch or verify its files.",
    DatasetsArguments,
    datasets,
    "`medmamba datasets fetch NAME` gets its files, `medmamba datasets verify NAME FILE` checks files that you have; "
    "each of the two has a --help of its own.",
    parts=lambda: (FETCH, VERIFY),
)


def _card(name: str) -> DatasetCard:
    try:
        return card(name)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _wanted(known: DatasetCard, files: Sequence[str], mirror: str) -> dict[str, PublishedFile]:
    """The files to get, from where."""
    for name in files:
        if name not in known.files:
            near = difflib.get_close_matches(name, known.files, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"datasets fetch: {known.name} has no file {name}; {hint}there are {', '.join(known.files)}"
            )
    wanted = {name: known.files[name] for name in files or known.fetch or known.files}
    if mirror:
        wanted = {
            name: file.model_copy(update={"url": f"{mirror.rstrip('/')}/{quote(name)}"})
            for name, file in wanted.items()
        }
    return wanted


def _published(known: DatasetCard, path: Path) -> list[tuple[Path, PublishedFile]]:
    """The published files at a path."""
    if not path.exists():
        raise ValueError(f"{path} was not found; check its name")
    if path.is_dir():
        found = [(path / name, file) for name, file in known.files.items() if (path / name).is_file()]
    else:
        found = [(path, file) for name, file in known.files.items() if Path(name).name == path.name]
    if not found:
        raise ValueError(
            f"{path} {'holds' if path.is_dir() else 'is'} none of the files published for {known.name} "
            f"({', '.join(known.files)}): name it as it was published"
        )
    return found


def _terms(known: DatasetCard) -> list[str]:
    """What the licence asks for, in words, and what to cite."""
    licence = known.licence
    told = [f"cite: {known.citation}"]
    if "-NC" in licence:
        told.append(
            "NC: these images may be used only where that is not primarily for commercial advantage or payment; "
            "whether a model trained on them may be sold is a question for a lawyer, so ask before you do"
        )
    if "research and education" in licence:
        told.append("research and education only: any other use needs the owners' written permission")
    if licence.startswith("CC BY"):
        told.append("BY: whoever shows or passes on the images gives credit, names the licence and says what changed")
    if "unchecked" in licence:
        told.append(
            f"nobody here has read this licence at its source: read it at {known.source} before you use the set"
        )
    return told


def _shown(terminal: Terminal, name: str) -> Callable[[int, int], None]:
    """Progress as a bar, or, where the server does not say how much will come, as a line now and then."""
    said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        unit, size = ("MB", 10**6) if max(done, total) >= 10**7 else ("kB", 10**3)
        if total:
            terminal.progress(name, {"done": done // size, "total": total // size, "unit": unit})
        elif time.monotonic() - said >= PLAIN_EVERY_S:
            said = time.monotonic()
            terminal.say(f"{name}: {done // size} {unit} so far; the server does not say of how many")

    return progress


def _tell_fetched(known: DatasetCard, folder: Path, verdicts: dict[str, Verdict], as_json: bool) -> None:
    # Where a card says which file is fetched, each file is the whole set in another size; else each is a part of it.
    parts = len(known.files) > 1 and not known.fetch
    source = str(folder if parts else folder / next(iter(verdicts)))
    command = "" if parts and set(verdicts) != set(known.files) else _next_command(known, source)
    if as_json:
        _print_json(
            {
                "dataset": known.name, "licence": known.licence, "citation": known.citation,
                "files": [_as_json(name, verdict) for name, verdict in verdicts.items()],
                "source": source, "next": command,
            }
        )  # fmt: skip
        return
    shown = [(v.path, v.state, f"{v.size_bytes:,}", v.checked) for v in verdicts.values()]
    table(f"Files of {known.name}", ("file", "state", "bytes", "checked"), shown)
    for name, verdict in verdicts.items():
        if verdict.checked in ("size", "nothing"):
            told = f"{name}: no checksum of it is known here; its MD5 is {verdict.digest}"
            console().print(told, soft_wrap=True)
    if command:
        console().print(f"next: {command}", soft_wrap=True)
    else:
        missing = ", ".join(name for name in known.files if name not in verdicts)
        console().print(f"a part of the set; missing: {missing}")


def _as_json(name: str, verdict: Verdict) -> dict[str, Any]:
    kind = verdict.checked if verdict.checked in ("md5", "sha256") else "md5"
    return both_keys({
        "name": name, "path": str(verdict.path), "bytes": verdict.size_bytes, "state": verdict.state,
        "checked": verdict.checked, kind: verdict.digest, "fault": verdict.fault,
    })  # fmt: skip


def _next_command(known: DatasetCard, source: str) -> str:
    """What users do with the files: the recipe made for the set, else the paper's of its kind."""
    own = [name for name, made in RECIPES.items() if made().data.dataset == known.name]
    recipe = own[0] if own else "paper-medmnist" if known.layout == "npz" else "paper"
    words = ["medmamba", "run", "direct", "--recipe", recipe, "--run", known.name]
    return shlex.join([*words, "--data.dataset", known.name, "--data.source", source])


def _tell_by_hand(known: DatasetCard, as_json: bool) -> None:
    command = _next_command(known, known.name)
    tree = [f"{known.name}/", *(f"    {label}/" for label in known.classes)]
    if as_json:
        _print_json({"dataset": known.name, "source": known.source, "tree": tree, "next": command})
        return
    lines = [
        f"{known.name} cannot be fetched: {known.source}.",
        f"{known.notes}",
        "Put the images into a folder, or a .zip or .tar, with one folder per class, named exactly so:",
        "",
        *(f"    {line}" for line in tree),
        "",
        f"then: {command}",
    ]
    for line in lines:
        console().print(line, soft_wrap=True)


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}  {_facts(each) if isinstance(each, dict) else each}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts(file: dict[str, Any]) -> str:
    """What is known of a published file, in one line."""
    size = f"{file['size_bytes']:,} bytes" if file["size_bytes"] else ""
    sums = [f"{kind} {file[kind]}" for kind in ("md5", "sha256") if file[kind]]
    return "  ".join(each for each in (size, *(sums or ["no checksum known"]), file["url"]) if each)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
