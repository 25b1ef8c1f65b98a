"""Types of values read from a dataset's files that become a path, size or shape, and messages for invalid ones.

The files are untrusted: each value is checked before it is used to open or allocate anything.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError

from data_shards.config import plain_name

MAX_OBJECT_BYTES = 5 << 40  # the largest object of S3 that one upload can write
MAX_COUNT = 1 << 40
MAX_CLASSES = 1 << 16

SHA256 = re.compile(r"[0-9a-f]{64}")
KEY = re.compile(r"[0-9a-f]{20}")

Sha256 = Annotated[str, Field(pattern=rf"^{SHA256.pattern}$")]
Key = Annotated[str, Field(pattern=rf"^{KEY.pattern}$")]
"""Key of a sample or a group (`plan.sample_key`, `plan.group_key`)."""
SplitName = Annotated[str, Field(pattern=r"^(train|val|test)$")]
ShardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")]
"""Used in paths. Shards of a dataset have `PLANNED` names."""
PLANNED = re.compile(r"(train|val|test)-[0-9]{5,9}")
"""Shard names as given by `plan.plan_shards`: the split comes first."""
SizeBytes = Annotated[int, Field(ge=0, le=MAX_OBJECT_BYTES)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Label = Annotated[int, Field(ge=0, lt=MAX_CLASSES)]
"""Index of a class."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
DatasetName = Annotated[str, Field(max_length=255), AfterValidator(lambda name: plain_name(name, "the name"))]


def explained(error: ValidationError, most: int = 80) -> str:
    """The first violated rule as `field = value: rule`, in printable characters only."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "its JSON"
    value = "" if isinstance(first["input"], dict | list) or not first["loc"] else f" = {_cut(first['input'], most)}"
    return f"{_cut(where, most, quoted=False)}{value}: {first['msg'].removeprefix('Value error, ')}"


def _cut(value: object, most: int, *, quoted: bool = True) -> str:
    # Checked before repr, which takes seconds for a million digits.
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of more than 77 digits"
    text = value if isinstance(value, str) else repr(value)
    short = text if len(text) <= most else f"{text[:most]}…"
    return ascii(short) if quoted and isinstance(value, str) else "".join(c if c.isprintable() else "?" for c in short)
