"""The command datasets: shows the catalog, and downloads and verifies the published files of a dataset."""

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
    """Arguments of `datasets`."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")] = ""
    """Dataset to show. Empty: the complete catalog."""


@dataclass(frozen=True)
class FetchArguments(JsonOption):
    """Arguments of `datasets fetch`."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """Name of a dataset in the catalog."""
    file: tuple[str, ...] = ()
    """Files to download (`medmamba datasets NAME` lists them). Empty: the smallest of several sizes, or all
    parts of the dataset."""
    to: str = ""
    """Folder for the files. Empty: medmamba-data/NAME."""
    mirror: str = ""
    """URL of a folder with the same files, to download from instead; the catalog's checksums still apply."""


@dataclass(frozen=True)
class VerifyArguments(JsonOption):
    """Arguments of `datasets verify`."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """Name of a dataset in the catalog."""
    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE ...")]
    """Files under their published names, or folders that contain such files."""


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
    """Downloads files of a dataset and prints the next command; exit code 1 if they must be placed by hand."""
    known = _card(asked.name)
    if known.layout == "phantoms":
        raise UsageError("datasets fetch: phantoms are generated when they are needed; nothing to fetch")
    if asked.mirror and not asked.mirror.startswith(("http://", "https://")):
        raise UsageError(f"datasets fetch: --mirror {asked.mirror} is not a URL; give http://HOST/FOLDER")
    if not known.files or known.licence == "none":
        _report_by_hand(known, asked.json)
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
    _report_fetched(known, folder, verdicts, asked.json)
    return 0


def verify_files(asked: VerifyArguments) -> int:
    """Compares files with the published ones and prints the result; exit code 1 if any of them differs."""
    known = _card(asked.name)
    if not asked.paths:
        raise UsageError("datasets verify: give at least one file")
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
    "Download the published files of a dataset and check them against the catalog; interrupted downloads resume.",
    FetchArguments,
    fetch_files,
    "Prints licence and citation first. Uses the proxies of the environment (http_proxy, https_proxy, no_proxy). For a "
    "private dataset, or one without a download URL, it explains how to place the files by hand.",
)
VERIFY = Command(
    "datasets verify",
    "Compare your files with the published ones, by checksum and size.",
    VerifyArguments,
    verify_files,
    "Exit code 1 if any of them differs.",
)
DATASETS = Command(
    "datasets",
    "List the catalog, show one dataset, or fetch or verify its files.",
    DatasetsArguments,
    datasets,
    "`medmamba datasets fetch NAME` downloads its files, `medmamba datasets verify NAME FILE` checks your files; "
    "both have their own --help.",
    parts=lambda: (FETCH, VERIFY),
)


def _card(name: str) -> DatasetCard:
    try:
        return card(name)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _wanted(known: DatasetCard, files: Sequence[str], mirror: str) -> dict[str, PublishedFile]:
    """File name -> published file to download, from the mirror if one is given."""
    for name in files:
        if name not in known.files:
            near = difflib.get_close_matches(name, known.files, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"datasets fetch: {known.name} has no file {name}; {hint}available: {', '.join(known.files)}"
            )
    wanted = {name: known.files[name] for name in files or known.fetch or known.files}
    if mirror:
        wanted = {
            name: file.model_copy(update={"url": f"{mirror.rstrip('/')}/{quote(name)}"})
            for name, file in wanted.items()
        }
    return wanted


def _published(known: DatasetCard, path: Path) -> list[tuple[Path, PublishedFile]]:
    """(path, published file) of every published file at `path`; raises ValueError if there are none."""
    if not path.exists():
        raise ValueError(f"{path} not found; check the path")
    if path.is_dir():
        found = [(path / name, file) for name, file in known.files.items() if (path / name).is_file()]
    else:
        found = [(path, file) for name, file in known.files.items() if Path(name).name == path.name]
    if not found:
        raise ValueError(
            f"{path} {'contains' if path.is_dir() else 'is'} none of the files published for {known.name} "
            f"({', '.join(known.files)}); use the published file names"
        )
    return found


def _terms(known: DatasetCard) -> list[str]:
    """Lines about the citation and the terms of the licence."""
    licence = known.licence
    lines = [f"cite: {known.citation}"]
    if "-NC" in licence:
        lines.append(
            "NC: do not use these images primarily for commercial advantage or payment; ask a lawyer before you sell a "
            "model trained on them"
        )
    if "research and education" in licence:
        lines.append("research and education only: any other use needs the owners' written permission")
    if licence.startswith("CC BY"):
        lines.append("BY: if you show or share the images, give credit, name the licence and say what you changed")
    if "unchecked" in licence:
        lines.append(
            f"this licence has not been checked at its source: read it at {known.source} before you use the dataset"
        )
    return lines


def _shown(terminal: Terminal, name: str) -> Callable[[int, int], None]:
    """Shows progress as a bar, or as an occasional line if the server does not report the size."""
    said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        unit, size = ("MB", 10**6) if max(done, total) >= 10**7 else ("kB", 10**3)
        if total:
            terminal.progress(name, {"done": done // size, "total": total // size, "unit": unit})
        elif time.monotonic() - said >= PLAIN_EVERY_S:
            said = time.monotonic()
            terminal.say(f"{name}: {done // size} {unit} so far (total size unknown)")

    return progress


def _report_fetched(known: DatasetCard, folder: Path, verdicts: dict[str, Verdict], as_json: bool) -> None:
    # If the card names the file to fetch, each file is the complete dataset in one size; else a part of it.
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
            note = f"{name}: no published checksum to compare with; its MD5 is {verdict.digest}"
            console().print(note, soft_wrap=True)
    if command:
        console().print(f"next: {command}", soft_wrap=True)
    else:
        missing = ", ".join(name for name in known.files if name not in verdicts)
        console().print(f"the dataset is incomplete; still missing: {missing}")


def _as_json(name: str, verdict: Verdict) -> dict[str, Any]:
    kind = verdict.checked if verdict.checked in ("md5", "sha256") else "md5"
    return both_keys({
        "name": name, "path": str(verdict.path), "bytes": verdict.size_bytes, "state": verdict.state,
        "checked": verdict.checked, kind: verdict.digest, "fault": verdict.fault,
    })  # fmt: skip


def _next_command(known: DatasetCard, source: str) -> str:
    """The command that trains on the files, with the dataset's own recipe if it has one, else one of the paper's."""
    own = [name for name, made in RECIPES.items() if made().data.dataset == known.name]
    recipe = own[0] if own else "paper-medmnist" if known.layout == "npz" else "paper"
    words = ["medmamba", "run", "direct", "--recipe", recipe, "--run", known.name]
    return shlex.join([*words, "--data.dataset", known.name, "--data.source", source])


def _report_by_hand(known: DatasetCard, as_json: bool) -> None:
    command = _next_command(known, known.name)
    tree = [f"{known.name}/", *(f"    {label}/" for label in known.classes)]
    if as_json:
        _print_json({"dataset": known.name, "source": known.source, "tree": tree, "next": command})
        return
    lines = [
        f"{known.name} cannot be fetched: {known.source}.",
        f"{known.notes}",
        "Put the images into a folder, or a .zip or .tar, with one folder per class, named exactly like this:",
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
    """Size, checksums and URL of a published file, in one line."""
    size = f"{file['size_bytes']:,} bytes" if file["size_bytes"] else ""
    sums = [f"{kind} {file[kind]}" for kind in ("md5", "sha256") if file[kind]]
    return "  ".join(each for each in (size, *(sums or ["no checksum known"]), file["url"]) if each)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
