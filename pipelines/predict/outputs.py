"""Answers -> a file, row by row: CSV, Parquet or JSON. The file appears under its name once it is complete."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pipelines.console.arguments import UsageError

OWN = ("path", "class", "model", "version", "error", "calibrated")
"""Columns besides those of the classes."""
_ROWS_AT_ONCE = 4096
Write = Callable[[Mapping[str, Any]], None]


def class_columns(classes: Sequence[str]) -> list[str]:
    """A column name for each class: its name, with as many `p_` before it as keep the names of all columns unique."""
    taken, columns = {*OWN, *classes}, []
    for name in classes:
        column = name
        while column in OWN or (column != name and column in taken):
            column = f"p_{column}"
        taken.add(column)
        columns.append(column)
    return columns


def check_out(out: str) -> None:
    """UsageError if no file of this name can be written: unknown ending, or no such folder."""
    path = Path(out)
    if path.suffix.lower() not in _WRITERS:
        raise UsageError(f"--out {out}: unknown ending; available: {', '.join(_WRITERS)}")
    if "://" in out or not path.parent.is_dir():
        raise UsageError(f"--out {out}: {path.parent} is not a folder of this machine; create it, or give another")
    if path.is_dir():
        raise UsageError(f"--out {out} is a folder; give a file in it")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--out {out}: {path.parent} is not writable; give another folder")


@contextlib.contextmanager
def open_out(out: str, classes: Sequence[str]) -> Iterator[Write]:
    """Yields a function that appends a row (`classify.row_of`) to the file, whose ending decides its format.

    The file replaces an older one at the end of the block; if the block fails, the older one stays.
    """
    path = Path(out)
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}")
    try:
        with _WRITERS[path.suffix.lower()](temporary, classes) as write:
            yield write
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary), str(path)):
            raise
        raise ValueError(f"--out {out} cannot be written ({error.strerror or error}); give another file") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def json_rows(file: IO[str]) -> Iterator[Write]:
    """Writes rows as a JSON array, indented by two spaces, one by one."""
    num = 0

    def write(row: Mapping[str, Any]) -> None:
        nonlocal num
        text = json.dumps(row, indent=2).replace("\n", "\n  ")
        file.write(f"{',' if num else '['}\n  {text}")
        num += 1

    yield write
    file.write("\n]\n" if num else "[]\n")


def _flat(row: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    """path, class, probabilities, model, version, error, calibrated."""
    scores = list(row["scores"].values()) or [None] * len(columns)
    return [row["image"], row["class"], *scores, *(row[name] for name in OWN[2:])]


def _names(columns: Sequence[str]) -> list[str]:
    return [*OWN[:2], *columns, *OWN[2:]]


@contextlib.contextmanager
def _csv(path: Path, classes: Sequence[str]) -> Iterator[Write]:
    columns = class_columns(classes)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_names(columns))

        def write(row: Mapping[str, Any]) -> None:
            values = _flat(row, columns)
            writer.writerow([*values[:-1], "yes" if values[-1] else "no"])

        yield write


@contextlib.contextmanager
def _json(path: Path, classes: Sequence[str]) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file, json_rows(file) as write:
        yield write


@contextlib.contextmanager
def _parquet(path: Path, classes: Sequence[str]) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = class_columns(classes)
    kinds = [pa.string(), pa.string(), *[pa.float64()] * len(columns), pa.string(), pa.int64(), pa.string(), pa.bool_()]
    schema = pa.schema(list(zip(_names(columns), kinds, strict=True)))
    rows: list[list[Any]] = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:

        def flush() -> None:
            values = zip(*rows, strict=True) if rows else [()] * len(schema)
            arrays = [pa.array(list(each), kind) for each, kind in zip(values, kinds, strict=True)]
            writer.write_table(pa.table(arrays, schema=schema))
            rows.clear()

        def write(row: Mapping[str, Any]) -> None:
            rows.append(_flat(row, columns))
            if len(rows) == _ROWS_AT_ONCE:
                flush()

        yield write
        flush()


_WRITERS: dict[str, Callable[[Path, Sequence[str]], contextlib.AbstractContextManager[Write]]] = {
    ".csv": _csv,
    ".parquet": _parquet,
    ".json": _json,
}
