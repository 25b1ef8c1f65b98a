"""Parquet bytes -> a table of a known schema, with memory bounded by the actual size, not by claims of the file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

# A row takes some 100 bytes unpacked; dictionaries add a little per file.
_MOST_ROW_BYTES, _MOST_BYTES = 1024, 1 << 20
_LONGEST_TEXT = 64


class TableError(ValueError):
    """These bytes are not a valid table of the schema; the message is a clause."""


def read_bounded(
    data: bytes, schema: pa.Schema, *, least_row_bytes: int, most_labels: int, longest_text: int = _LONGEST_TEXT
) -> pa.Table:
    """The table in these bytes, fully validated.

    Args:
        data: A Parquet file.
        schema: The required columns, including nullability.
        least_row_bytes: Least size of an encoded row: keys and digests are random, so they do not compress.
        most_labels: Most items in a row's list.
        longest_text: Most bytes of a text.

    Raises:
        TableError: the file is damaged, has other columns, or would unpack to more than its rows can need.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        meta = pq.read_metadata(io.BytesIO(data))
        _check_claims(meta, schema, len(data), least_row_bytes, most_labels)
        # As dictionaries, so that a long text repeated a million times is in memory once.
        text = [field.name for field in schema if field.type == pa.string()]
        table = pq.read_table(io.BytesIO(data), read_dictionary=text)
        for name in text:
            longest = max((_longest(chunk.dictionary) for chunk in table[name].chunks), default=0)
            if longest > longest_text:
                raise TableError(f"its column {name} has a text of {longest} bytes")
        table = table.cast(schema)
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise TableError(" ".join(str(error).split())[:120]) from error
    return table


def _check_claims(
    meta: pa.parquet.FileMetaData, schema: pa.Schema, size_bytes: int, least_row_bytes: int, most_labels: int
) -> None:
    found, num = meta.schema.to_arrow_schema(), meta.num_rows
    if not found.equals(schema):
        raise TableError(f"its columns are {', '.join(found.names)[:200]}")
    if num * least_row_bytes > size_bytes:
        raise TableError(f"it claims {num} rows in {size_bytes} bytes")
    parts = [meta.row_group(n).column(i) for n in range(meta.num_row_groups) for i in range(meta.num_columns)]
    values, unpacked = (sum(getattr(part, of) for part in parts) for of in ("num_values", "total_uncompressed_size"))
    most_values = num * (meta.num_columns + most_labels)
    most_bytes = _MOST_BYTES + num * (_MOST_ROW_BYTES + 8 * most_labels)
    if values > most_values or unpacked > most_bytes:
        raise TableError(f"it would unpack to {values} values in {unpacked} bytes, too many for {num} rows")


def _longest(texts: pa.Array) -> int:
    """Bytes of the longest text; 0 if there is none."""
    import pyarrow.compute as pc

    return int(pc.max(pc.binary_length(texts)).as_py() or 0)
