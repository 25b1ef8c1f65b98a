"""The command export: the network of a run as a file for another runtime."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_shards.store import Store
from data_shards.store.disk import size_text
from pipelines.console.arguments import UsageError
from pipelines.console.command import Command, JsonOption, StoreOption
from pipelines.console.terminal import console
from pipelines.flow.record import Record, read_record
from pipelines.flow.runner import step_folder
from pipelines.scratch import scratch

ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2", "upstream": ".pth"}


@dataclass(frozen=True)
class ExportArguments(StoreOption, JsonOption):
    """What `export` takes."""

    run: str = ""
    """Run whose trained network is exported."""
    to: Literal["onnx", "torch-export", "upstream"] = "onnx"
    """onnx: for ONNX runtimes. torch-export: for torch alone. upstream: the state dict that the paper's code loads."""
    out: str = ""
    """File to write; an existing one is replaced. Empty: RUN.onnx, RUN.pt2 or RUN.pth in this folder."""


def export(asked: ExportArguments) -> int:
    """Writes the file and prints its size, how long it took and how far it is from the network."""
    if not asked.run:
        raise UsageError("export: name the run with --run; `medmamba status` lists the runs there are")
    store = asked.open_store()
    trained = _training(store, asked.run)
    path = Path(asked.out or f"{asked.run}{ENDINGS[asked.to]}")
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder: name a file in it")
    from medmamba import export as exporter
    from medmamba.checkpoint import load_model
    from medmamba.config import MODEL, WEIGHTS

    with scratch("export") as folder:
        stored = store.at(*trained.facts["model"].split("/"))
        for name in (WEIGHTS, MODEL):
            (folder / name).write_bytes(stored.get(name))
        model, _, card = load_model(folder, digest=trained.facts["digest"])
    if asked.to == "upstream":
        written = exporter.to_upstream(model, path)
    else:
        write = exporter.to_onnx if asked.to == "onnx" else exporter.to_torch_export
        written = write(model, card, path)
    if asked.json:
        facts = dataclasses.asdict(written) | {"path": str(path), "run": asked.run, "to": asked.to}
        print(json.dumps(facts | {"digest": trained.facts["digest"]}, indent=2))
    else:
        _print(written)
    return 0


def _training(store: Store, run: str) -> Record:
    """The record of the run's training. UsageError where it has none yet."""
    record = read_record(step_folder(store, run, "train"))
    if record is None:
        raise UsageError(
            f"run {run!r} in {store.uri} has no trained network: `medmamba status` lists the runs and their steps"
        )
    return record


def _print(written: Any) -> None:
    console().print(f"{written.path}: {size_text(written.size_bytes)}, written in {written.seconds:.0f} s")
    if not written.differences:
        console().print("read again: its tensors are those of the network")
        return
    found = ", ".join(f"{value:.0e} at batch {batch}" for batch, value in written.differences.items())
    console().print(f"run again: its probabilities differ from the network's by at most {found}")


EXPORT = Command(
    "export",
    "Write the network of a run for ONNX, for torch alone or for the paper's code.",
    ExportArguments,
    export,
    "ONNX and torch-export take uint8 images (batch, height, width, channels) of the size that the network was trained "
    "with and give probabilities. The file is compared with the network before it is kept. Needs the extra "
    "`export` for ONNX: pip install 'medmamba[export]'.",
)
