"""The table of an image set: the rows of a CSV, a TSV or the first sheet of an XLSX, as text, with columns by name."""

from __future__ import annotations

import csv
import io
import posixpath
import re
import threading
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

# A sheet of 400,000 rows is some 200 MB of XML.
_MAX_SHEET_BYTES = 2 << 30
# In the order in which they are preferred, where a set has its table in several formats.
ENDINGS = (".csv", ".xlsx", ".tsv")
_DELIMITERS = ",;\t|"
# The first bytes of files that are named like a text but are something else.
_NO_TEXT = {
    b"PK\3\4": "is an XLSX workbook or a zip, not text: give it the ending .xlsx, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "is a workbook of an old Excel, not text: save it as .xlsx or CSV",
    b"\x1f\x8b": "is compressed by gzip: unpack it",
    b"version https://git-lfs": "is a Git LFS pointer, not the table itself: get it with `git lfs pull`",
}
_field_limit = threading.Lock()


class Table:
    """Columns by name, cells without the space around them; lines that are empty are left out.

    ValueError, naming the line, where the data is not such a table.
    """

    def __init__(self, path: str, data: bytes):
        self.path, self.folder = path, posixpath.dirname(path)
        lines = [(n, cells) for n, cells in (_xlsx if _is_xlsx(path) else _csv)(path, data) if any(cells)]
        if len(lines) < 2:
            raise ValueError(f"{path} has no rows: it needs a line of column names, then a line per image")
        self.names = lines[0][1]
        self._lines = [line for line, _ in lines[1:]]
        for line, cells in lines[1:]:
            if len(cells) != len(self.names):
                raise ValueError(f"line {line} of {path} has {len(cells)} cells for {len(self.names)} columns: fix it")
        self._cells = [cells for _, cells in lines[1:]]

    def column(self, name: str, use: str, option: str = "") -> list[str]:
        """The cells below `name`. `use` is what messages say the column holds; `option` names it, or else the `use`."""
        if self.names.count(name) != 1:
            fault = f"has {self.names.count(name) or 'no'} column{'s' * (name in self.names)} {name!r}"
            raise ValueError(
                f"{self.path} {fault} (it has {', '.join(self.names)}): name the column with "
                f"the {use} in --data.{option or f'{use}-column'}"
            )
        position = self.names.index(name)
        return [cells[position] for cells in self._cells]

    def line(self, index: int) -> str:
        """Where row `index` is, for messages."""
        return f"line {self._lines[index]} of {self.path}"


def _is_xlsx(path: str) -> bool:
    return path.lower().endswith(".xlsx")


def _csv(path: str, data: bytes) -> Iterator[tuple[int, list[str]]]:
    text, skipped = _text_of(path, data), 0
    if named := re.match(r"sep=(.)\r?\n", text):  # Excel writes it, and reads it
        text, skipped = text[named.end() :], 1
    delimiter = named[1] if named else _delimiter(text)
    for line, cells in _parsed(path, text, delimiter):
        yield line + skipped, [cell.strip() for cell in cells]


def _text_of(path: str, data: bytes) -> str:
    for start, what in _NO_TEXT.items():
        if data.startswith(start):
            raise ValueError(f"{path} {what}")
    if data[:200].lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path} is an HTML page, not a table: download the table itself")
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {'UTF-16' if utf16 else 'UTF-8'} ({error}): save it as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(
            f"line {line} of {path} has a NUL character, so it is not text in UTF-8 (maybe UTF-16 without its mark, or "
            "damaged): save it as UTF-8, or get it again"
        )
    return text


def _delimiter(text: str) -> str:
    """What separates the names in the first line that is not empty, quoted ones aside."""
    head = re.sub(r'"[^"]*"', "", next((line for line in text.splitlines() if line.strip()), ""))
    return max(_DELIMITERS, key=head.count)


def _parsed(path: str, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The lines with their numbers and cells; a cell may have any length."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines: list[tuple[int, list[str]]] = []
    # The limit is the process's: it is raised, never lowered, while this table is read, and put back.
    with _field_limit:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, len(text) + 1))
        try:
            lines.extend((reader.line_num, cells) for cells in reader)
        except csv.Error as error:
            raise ValueError(
                f"line {reader.line_num} of {path} cannot be read as CSV ({error}): correct it, maybe a quotation mark"
            ) from error
        finally:
            csv.field_size_limit(before)
    return lines


def _xlsx(path: str, data: bytes) -> Iterator[tuple[int, list[str]]]:
    import openpyxl  # slow to import

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            size = sum(part.file_size for part in parts.infolist())
        if size > _MAX_SHEET_BYTES:
            raise ValueError(f"it unpacks to {size:,} bytes")
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # some programs write a wrong extent, and columns would be lost
        rows = [[_text(cell) for cell in row] for row in sheet.iter_rows(values_only=True)]
    except Exception as error:  # the file is anybody's, and openpyxl raises whatever its parsers raise
        raise ValueError(
            f"{path} cannot be read as XLSX ({' '.join(str(error).split())[:120]}): save it again, or as CSV"
        ) from error
    # Cells beyond the last name are the formatting of empty ones; short rows end in empty cells.
    width = max((i + 1 for row in rows[:1] for i, cell in enumerate(row) if cell), default=0)
    for number, row in enumerate(rows, 1):
        if not any(row[width:]):
            row = [*row[:width], *[""] * (width - len(row))]
        yield number, row


def _text(cell: Any) -> str:
    """A cell as a CSV would have it: Excel keeps 1 as 1.0, and True as TRUE is a matter of its display."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return "" if cell is None else str(cell).strip()


def tables_among(names: Iterable[str]) -> list[str]:
    """The names of tables."""
    return [name for name in names if name.lower().endswith(ENDINGS)]
