"""Columns of a table that are kept for figures by subgroup, typed by their values."""

from __future__ import annotations

import re
from collections.abc import Sequence

from data_shards.config import DataConfig
from data_shards.source.table.label_doubts import says_missing
from data_shards.source.table.text_table import Table

Value = int | float | str | None
LONGEST_TEXT = 256
"""Bytes of a value; `data_shards.index` reads no longer one."""
# A number with leading zeros is a code. 18 digits fit into an int64.
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d{1,30})?([eE][+-]?\d{1,2})?")


def read_metadata(table: Table, among: Sequence[int], config: DataConfig) -> dict[int, tuple[Value, ...]]:
    """The values of `data.metadata_columns` of each of these rows; empty if no column is named.

    Raises:
        ValueError: a column is not there, or a text has more than LONGEST_TEXT bytes.
    """
    if not config.metadata_columns:
        return {}
    columns = [_typed(name, table, among) for name in config.metadata_columns]
    return dict(zip(among, zip(*columns, strict=True), strict=True))


def _typed(name: str, table: Table, among: Sequence[int]) -> list[Value]:
    """Integers, or else numbers, if all values are; otherwise texts."""
    every = table.column(name, "metadata", "metadata-columns")
    cells = [every[i] for i in among]
    known = [cell for cell in cells if cell and not says_missing(cell)]
    for pattern, kind in ((_INTEGER, int), (_NUMBER, float)):
        if known and all(pattern.fullmatch(cell) for cell in known):
            return [None if not cell or says_missing(cell) else kind(cell) for cell in cells]
    for i, cell in zip(among, cells, strict=True):
        if len(cell.encode()) > LONGEST_TEXT:
            raise ValueError(
                f"{name!r} in {table.line(i)} has {len(cell.encode()):,} bytes, but a value of a subgroup has at most "
                f"{LONGEST_TEXT}: shorten it, or leave the column out of --data.metadata-columns"
            )
    return [None if not cell or says_missing(cell, certainly=True) else cell for cell in cells]
