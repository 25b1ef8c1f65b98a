"""What a page is made of: sections with text, tables, figures and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: Literal["numbers", "words", "keys"] = "numbers"
    """What the columns after the first are: numbers or words; keys: words, and the first has keys of settings."""


@dataclass(frozen=True)
class Figure:
    """A drawing with what it shows in words and in numbers."""

    title: str
    svg: str
    label: str
    """What it shows, for those who do not see it."""
    caption: str
    table: Table


@dataclass(frozen=True)
class Example:
    """An image and the maps of the branches."""

    kind: str
    label: str
    caption: str
    pictures: Sequence[tuple[str, str]]
    """(name, data URI)."""


@dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    anchor: str
    title: str
    text: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    """(term, description)."""
    points: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    examples: Sequence[Example] = ()
