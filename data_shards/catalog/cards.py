"""What is known of each dataset: one card per dataset, a TOML file in this folder."""

import difflib
import functools
import tomllib
from importlib import resources
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from data_shards.config import Task
from data_shards.renamed import RenamedSettings


class PublishedFile(BaseModel):
    """A file as its publisher offers it; what is unknown is empty, and never guessed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    url: str
    """Address that gives the file itself, not a page about it."""
    size_bytes: int = 0
    """Its size; 0: unknown."""
    md5: str = ""
    """Its MD5 in hex; empty: unknown."""
    sha256: str = ""
    """Its SHA-256 in hex; empty: unknown."""


class DatasetCard(RenamedSettings):
    """A dataset's facts. Classes are in the order of their indices."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    PART: ClassVar[str] = "data"

    name: str
    """The dataset's name on the command line and in the store."""
    title: str
    """What it is, in a few words."""
    modality: str
    """How the images were taken."""
    classes: tuple[str, ...]
    """Class names, as folders or labels of the source are named."""
    task: Task
    """What a label means."""
    num_images: int
    """Images in the published set; 0 where a configuration decides."""
    source: str
    """Address to get it from, or why there is none."""
    licence: str
    """The licence the source states; `unchecked` where it was not read there."""
    layout: Literal["npz", "folders", "table", "phantoms"]
    """How the files are laid out."""
    table: str = ""
    """The table's path inside the set; empty: the only table there."""
    image_column: str = ""
    """Column with the image's file name."""
    label_column: str = ""
    """Column with the label."""
    group_column: str = ""
    """Column with what must not be in two splits."""
    split_column: str = ""
    """Column with the official split."""
    split_values: tuple[str, ...] = ()
    """What the split column says, as value=split, where it is not train, val or test."""
    split_policy: Literal["official", "official test", "by group", "by image"]
    """official: as published; official test: val is drawn by group out of the published train; by group: drawn, no
    group in two splits; by image: drawn, as groups are unknown."""
    files: dict[str, PublishedFile] = Field(default_factory=dict)
    """The published files by name; none where the publisher must be asked for the set."""
    fetch: tuple[str, ...] = ()
    """Which of the files are fetched where none is named; empty: all, as each holds a part of the set."""
    citation: str = ""
    """What to cite where results are shown."""
    notes: str = ""
    """What else to know before use."""


@functools.cache
def names() -> list[str]:
    """The names of all datasets, sorted."""
    files = resources.files(__package__).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


@functools.cache
def card(name: str) -> DatasetCard:
    """The card of a dataset. Raises ValueError, listing the names, for one that is not in the catalog."""
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"dataset {name!r} is not in the catalog{hint}: choose one of "
            f"{', '.join(names())}, or give --data.layout for a set of your own"
        )
    return DatasetCard(name=name, **tomllib.loads((resources.files(__package__) / f"{name}.toml").read_text("utf-8")))
