"""The report of duplicates among the images of a dataset: `leakage.json` next to its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_shards.config import plain_name
from data_shards.fields import Count, Key, Label, SplitName, explained
from data_shards.manifest import MAKE_AGAIN, MANIFEST, ManifestError
from data_shards.split import SPLITS, LeakError
from data_shards.store import Store, StoreKeyError

Kind = Literal["exact", "near", "turned", "shifted"]
Symmetries = Literal["off", "exact", "all"]
REPORT = "leakage.json"
_NOT_SEARCHED = {
    "off": "Turned, mirrored or shifted duplicates were not searched for: --data.duplicates.symmetries exact or all.",
    "exact": "Duplicates after small turns or shifts were not searched for: --data.duplicates.symmetries all.",
    "all": "Small turns and shifts of mirrored images and in other datasets, turns of more than 5 degrees, shifts of "
    "more than 5 % and strong cuts were not searched for.",
}
_MOST_COPIES_ONCE = 50  # that reports without `equal` list of a finding


class DuplicatesError(LeakError):
    """A conversion is refused because of duplicates; `report` lists all of them, by key."""

    report: DuplicatesReport
    public: str
    """What was found, without the name of any file."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Copy(_Frozen):
    """One image of a finding; stored reports call it a copy."""

    key: Key
    split: SplitName
    labels: tuple[Label, ...]
    label_names: tuple[str, ...] = ()
    """The labels as class names; empty in reports of earlier releases."""
    dataset: str = ""
    """Empty: this one; another one as `dataset/name`."""
    fate: Literal["kept", "dropped", "moved"] = "kept"
    row: int = Field(default=-1, exclude=True)
    """Which of the image set's rows it is, while that is at hand."""

    @field_validator("dataset")
    @classmethod
    def _is_dataset(cls, value: str) -> str:
        parts = value.split("/") if value else []
        if len(value) > 511 or len(parts) not in (0, 2):
            raise ValueError("another dataset is named dataset/name")
        for part in parts:
            plain_name(part, "the name")
        return value


class Finding(_Frozen):
    """Images that are the same."""

    kind: Kind
    """exact: all of them have equal pixels; near: not all, but nearly; turned: some only after a quarter turn or
    mirrored; shifted: some only after a small turn or shift."""
    where: Literal["across splits", "within a split", "across datasets"]
    conflict: bool
    """Whether equal pixels have different labels."""
    copies: tuple[Copy, ...] = Field(min_length=2)
    """At least one of every split and label that there is."""
    more: int = Field(default=0, ge=0)
    """Images beyond those that are listed. Reports of earlier releases listed 50 and did not count the others."""
    equal: int | None = None
    """How many of all the images have pixels equal to another one's; none in reports of earlier releases, which called
    a finding exact where any two were."""

    @property
    def num_copies(self) -> int:
        """How many images it is about."""
        return len(self.copies) + self.more

    @property
    def head(self) -> str:
        """Its kind, and of a near one how many images are exact duplicates."""
        if self.equal is None and self.kind == "exact" and self.num_copies > 2:
            return "exact or near"
        return f"{self.kind} ({self.equal} with equal pixels)" if self.kind != "exact" and self.equal else self.kind

    def rest(self, shown: int) -> str:
        """How many images are not among the first `shown`, in words; "" where there are none."""
        hidden = self.num_copies - shown
        if self.equal is None and self.num_copies == _MOST_COPIES_ONCE:
            return f"and {hidden:,} or more images: the release that made the report listed {_MOST_COPIES_ONCE}"
        return f"and {hidden:,} more images" if hidden else ""


class DuplicatesReport(_Frozen):
    """What was found among the images of a dataset, and what was done. `leakage.json` next to the manifest."""

    format: Literal[1] = 1
    images: Count
    undecodable: Count
    blank: Count
    """Images without structure, compared by their pixels only."""
    near: Count
    """Bits in which near duplicates may differ."""
    across: Literal["report", "drop", "move", "refuse"]
    """What was done about duplicates in different splits."""
    counts: dict[Annotated[str, Field(pattern=r"^[ -~]{1,80}$")], Count]
    """Duplicates beyond the first, by kind and place."""
    dropped: tuple[Key, ...]
    """Keys of images that were left out."""
    findings: tuple[Finding, ...]
    """The worst first; at most 10,000."""
    more: Count
    """Findings beyond those."""
    symmetries: Symmetries = "off"
    """Which turned and shifted duplicates were searched for; none by earlier releases."""

    @property
    def not_searched(self) -> str:
        """What the report says nothing about, as a sentence."""
        return _NOT_SEARCHED[self.symmetries]


def read_report(store: Store, key: str = REPORT) -> DuplicatesReport:
    """The report of a finished dataset. ManifestError where it is missing or damaged."""
    try:
        return DuplicatesReport.model_validate_json(store.get(key), strict=True)
    except (StoreKeyError, ValidationError) as error:
        problem = explained(error) if isinstance(error, ValidationError) else " ".join(str(error).split())[:120]
        raise ManifestError(
            f"{store.uri} has no complete {REPORT} ({problem}): delete {MANIFEST} there {MAKE_AGAIN}"
        ) from error


def refuse_elsewhere(report: DuplicatesReport) -> None:
    """LeakError where images of a finished dataset were also in another one when it was made."""
    for finding in report.findings:
        if finding.where == "across datasets":
            num = report.counts.get("also in other datasets", "some")
            raise LeakError(
                f"{num} images are also in other datasets of this store (e.g. key {finding.copies[0].key} in "
                f"{finding.copies[1].dataset!r}): use another store, or --data.duplicates.datasets report"
            )


def named_labels(labels: Sequence[int], classes: Sequence[str]) -> tuple[str, ...]:
    """Class names of labels; "class 2" where the names are not known."""
    return tuple(classes[label] if label < len(classes) else f"class {label}" for label in labels)


def lost_text(lost: Sequence[tuple[str, int]], classes: Sequence[str]) -> str:
    """Which classes are gone from which splits, from pairs (split, label): one clause, the first label first."""
    homes: dict[int, list[str]] = {}
    for split, label in lost:
        homes.setdefault(label, []).append(split)
    shown = []
    for label, splits in homes.items():
        each = sorted(splits, key=SPLITS.index)
        among = " and ".join([*([", ".join(each[:-1])] if each[:-1] else []), each[-1]])
        shown.append(f"class {named_labels((label,), classes)[0]!r} is gone from {among}")
    more = [f"{len(shown) - 5} more classes are gone from some split"] if len(shown) > 5 else []
    return ", ".join([*shown[:5], *more])
