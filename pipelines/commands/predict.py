"""The command predict: classifies images with a registered model."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import tyro

from pipelines.commands.shards.owner import dataset_in
from pipelines.console.arguments import UsageError
from pipelines.console.command import Command, Flag, JsonOption, StoreOption
from pipelines.console.terminal import Terminal, table, visible
from pipelines.predict.classify import BATCH, answers, row_of, text_of
from pipelines.predict.inputs import NOTHING, Inputs, open_inputs
from pipelines.predict.outputs import check_out, json_rows, open_out
from pipelines.predict.predictor import Predictor, open_predictor

SHOWN = 20  # rows of the table without --all, and images without progress
_EXAMPLES, _REASONS = 2, 3


@dataclass(frozen=True)
class PredictArguments(StoreOption, JsonOption):
    """Arguments of `predict`."""

    images: tyro.conf.Positional[tuple[str, ...]]
    """Image or DICOM files, folders, .tar and .zip, s3://bucket/prefix, or DATASET[/NAME]:SPLIT of the store."""
    model: str = ""
    """Registered model. Empty: the only one that has the alias."""
    alias: str = "champion"
    """Alias of the version to use."""
    out: str = ""
    """File for the results, .csv, .parquet or .json. Empty: a table on standard output."""
    all: Flag = False
    """Print all rows of the table, not only the first 20."""
    raw: Flag = False
    """Scores without the calibration that is registered with the model."""
    batch_size: int = BATCH
    """Images that the network gets at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""


def predict(asked: PredictArguments) -> int:
    """Prints or writes the probability of each class for each image; ValueError if no image could be classified."""
    if asked.batch_size < 1:
        raise UsageError(f"--batch-size {asked.batch_size}: must be at least 1")
    if asked.out:
        check_out(asked.out)
    if not asked.images:
        raise UsageError(NOTHING)
    store = asked.open_store()
    terminal, seen = Terminal(), _Seen()
    inputs = open_inputs(asked.images, dataset=functools.partial(dataset_in, store))
    for message in inputs.messages():
        terminal.say(message)
    if not inputs.num_files:
        raise ValueError(f"predict: {', '.join(asked.images[:3])}: no images there")
    with (
        open_predictor(
            store, model=asked.model, alias=asked.alias, device=asked.device, raw=asked.raw, batch_size=asked.batch_size
        ) as predictor,
        contextlib.closing(terminal),
        _writers(asked, predictor) as write,
    ):
        for answer in answers(inputs, predictor, batch_size=asked.batch_size, progress=_progress(terminal, inputs)):
            seen.add(answer.path, answer.error)
            write(row_of(answer, predictor))
    return seen.conclude(terminal, asked.out)


@dataclass
class _Seen:
    """How many images could be classified, and why others could not."""

    num: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, path: str, error: str) -> None:
        """Counts an image; `error` is empty if it was classified."""
        self.num += 1
        if error:
            reason = error if error in self.reasons or len(self.reasons) < 1000 else "other reasons"
            self.reasons[reason] += 1
            some = self.examples.setdefault(reason, [])
            some += [path] if len(some) < _EXAMPLES else []

    def conclude(self, terminal: Terminal, out: str) -> int:
        """Reports what was written and what failed; returns the exit code. ValueError if nothing was classified."""
        bad = self.reasons.total()
        if out:
            terminal.say(f"{self.num} rows in {out}")
        if not bad:
            return 0
        line = f"{bad} of {self.num} {'images' if self.num > 1 else 'image'} could not be classified: {self._why()}"
        if bad == self.num:
            raise ValueError(f"{line}; give images in a format that medmamba reads")
        terminal.say(_line(line))
        return 0

    def _why(self) -> str:
        parts = []
        for reason, num in self.reasons.most_common(_REASONS):
            more = f" and {num - _EXAMPLES} more" if num > _EXAMPLES else ""
            parts.append(f"{reason} ({', '.join(map(_line, self.examples[reason]))}{more})")
        if len(self.reasons) > _REASONS:
            parts.append(f"{len(self.reasons) - _REASONS} other reasons (column `error`)")
        return "; ".join(parts)


@contextlib.contextmanager
def _writers(asked: PredictArguments, predictor: Predictor) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields a function that takes a row and writes it wherever the user wants it."""
    with contextlib.ExitStack() as stack:
        writes = []
        if asked.out:
            writes.append(stack.enter_context(open_out(asked.out, predictor.classes)))
        if asked.json:
            writes.append(stack.enter_context(json_rows(sys.stdout)))
        elif not asked.out:
            writes.append(stack.enter_context(_table(predictor, most=sys.maxsize if asked.all else SHOWN)))

        def write(row: Mapping[str, Any]) -> None:
            for each in writes:
                each(row)

        yield write


@contextlib.contextmanager
def _table(predictor: Predictor, *, most: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    rows: list[tuple[str, str, str]] = []
    num = 0

    def write(row: Mapping[str, Any]) -> None:
        nonlocal num
        num += 1
        if len(rows) < most:
            best = sorted(row["scores"].items(), key=lambda pair: -pair[1])
            said = "  ".join(f"{name} {value:.3f}" for name, value in best) or row["error"]
            rows.append((_line(row["image"]), row["class"] or "-", said))

    yield write
    if num:
        version = predictor.version
        table(f"{version.model} version {version.number}", ("image", "class", "probabilities"), rows)
    if num > len(rows):
        print(f"and {num - len(rows)} more: --all prints them, --out FILE.csv writes them")


def _progress(terminal: Terminal, inputs: Inputs) -> Callable[[int, int], None]:
    began = time.monotonic()

    def progress(files: int, images: int) -> None:
        if inputs.num_files > SHOWN or images > SHOWN:
            speed = images / max(time.monotonic() - began, 1e-9)
            unit = f"files  {speed:.{0 if speed >= 10 else 1}f} images/s"
            terminal.progress("predict", {"done": files, "total": inputs.num_files, "unit": unit})

    return progress


def _line(text: str) -> str:
    """The text on one line: a file name may have line breaks."""
    return visible(text_of(text).replace("\n", "\\n").replace("\t", "\\t"))


PREDICT = Command(
    "predict",
    "Classify images with the champion model.",
    PredictArguments,
    predict,
    "Prints the probability of each class. An image that cannot be read is a row with the reason; the exit code is 1 "
    "if no image could be classified.",
)
