"""What decides the bytes of a dataset: the `data` part of a recipe."""

import math
import re
import unicodedata
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from data_shards.renamed import RenamedSettings, old_words

Task = Literal["multiclass", "ordinal", "multilabel"]
"""multiclass: one of several classes; ordinal: classes in order (grades); multilabel: any number of them."""

STORED_COLUMNS = ("key", "group", "label", "scores", "logits", "height", "width", "channels")
"""Columns of stored predictions, beside which metadata columns are stored."""


def plain_name(value: str, what: str) -> str:
    """The value itself; ValueError where it cannot name a folder of the store. `what` it is, for the message."""
    if value in ("", ".", "..") or not all(c.isalnum() or c in "._-" for c in value):
        raise ValueError(
            f"{what} is {value!r}, but it becomes a folder of the store: use letters, digits, '.', '_', '-'"
        )
    return value


class PhantomConfig(BaseModel):
    """The synthetic ultrasound-like images: how many, how large, how hard."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_patients: int = Field(default=300, ge=3)
    """Patients to draw. A patient has one diagnosis; classes take turns, so every class gets a third."""
    images_per_patient: int = Field(default=4, ge=1)
    """Images of each patient; they share tissue and lesion but not position, gain or speckle."""
    side: int = Field(default=64, ge=32, le=1024)
    """Height and width of an image in pixels."""
    speckle: float = Field(default=0.3, ge=0.0, le=1.0)
    """Strength of the speckle: 0 is none, 1 is as grainy as fully developed ultrasound speckle."""
    contrast: tuple[float, float] = (0.5, 0.85)
    """Least and greatest darkening of a lesion against its surroundings, as fractions of brightness."""

    @field_validator("contrast")
    @classmethod
    def _contrast_in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError(f"contrast is {value}, but it is a range within (0, 1]: give the smaller number first")
        return value


class DuplicatesConfig(BaseModel):
    """What is done about duplicates. Exact duplicates have identical pixels, near duplicates similar fingerprints."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    near: int = Field(default=12, ge=0, le=24)
    """Bits, of a fingerprint's 168, in which near duplicates may differ; 0 finds identical pixels only."""
    symmetries: Literal["off", "exact", "all"] = "off"
    """Duplicates that are turned or shifted: `exact` searches for the eight symmetries of the square (quarter turns and
    mirror images), `all` also for turns of up to 5 degrees with shifts of up to 5 % of the side. The time of `all`
    grows with the square of the number of images (10 ms per image where there are 6,000)."""
    across: Literal["auto", "report", "drop", "move", "refuse"] = "auto"
    """Duplicates in different splits. `drop` and `move` spare the split that is held out most (test, then val): drop
    leaves the other duplicates out, move takes them there with their groups. `auto`: splits that are drawn keep
    duplicates together, official splits of the catalog are only reported on, all others are refused."""
    within: Literal["report", "drop"] = "report"
    """Identical pixels twice in one split, with the same labels: `drop` keeps the first."""
    labels: Literal["report", "drop", "refuse"] = "report"
    """Identical pixels under different labels: `drop` leaves all of them out."""
    datasets: Literal["off", "report", "refuse"] = "report"
    """Duplicates in other datasets of the same store."""

    @model_validator(mode="after")
    def _symmetries_need_fingerprints(self) -> "DuplicatesConfig":
        if self.symmetries != "off" and self.near == 0:
            raise ValueError(
                f"symmetries is {self.symmetries!r}, but near is 0, which compares pixels only: set near above 0 "
                "(12 is the default)"
            )
        return self


class DicomConfig(RenamedSettings):
    """How DICOM files become images: which frames, shown how. Other files are untouched by it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    PART: ClassVar[str] = "data.dicom"

    frames: Literal["each", "first"] = "each"
    """Of a file with several frames each is a sample (all of one group), or only the first one is."""
    window: tuple[float, float] | None = None
    """Center and width of one window for all gray images, for example in Hounsfield units; none: the file's own."""
    view: int = Field(default=0, ge=0)
    """Which of a file's own windows or VOI LUTs is used, from 0; a file with fewer is quarantined."""
    identifying: Literal["quarantine", "keep"] = "quarantine"
    """What becomes of files that say that their pixels may identify the patient (burned-in annotation, a face)."""
    objects: Literal["quarantine", "keep"] = "quarantine"
    """What becomes of objects that have pixels but are not images by their SOP class or modality (doses,
    segmentations, maps and so on), and of labels, overviews and thumbnails of slides. Kept, each frame is shown as an
    image would be: one of more than 8 bits over its own range."""

    @field_validator("window")
    @classmethod
    def _window_shows_something(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not (math.isfinite(value[0]) and 1 <= value[1] < math.inf):
            raise ValueError(f"window is {value}, but it is a center and a width of at least 1: give both")
        return value


class DataConfig(RenamedSettings):
    """Which images, with which labels, in which splits, cut into shards how. Everything here decides the bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    PART: ClassVar[str] = "data"
    WHEREABOUTS: ClassVar[frozenset[str]] = frozenset({"source"})
    """Settings that say where something is: a finished step or dataset stays the same when they change."""

    dataset: str = "phantoms"
    """A dataset of the catalog (`medmamba datasets`), or a new name of your own together with `layout`."""
    name: str = "default"
    """Name of this conversion; its shards are in the store under datasets/<dataset>/<name>."""
    source: str = ""
    """Where the image set is: an .npz file, a folder, a .zip, a .tar, or a table with its images; local or s3://."""
    layout: Literal["catalog", "npz", "folders", "table", "phantoms"] = "catalog"
    """How the set is laid out: `npz` as MedMNIST, `folders` one per class, `table` a table of files and
    labels (CSV, TSV or XLSX)."""
    classes: tuple[str, ...] = ()
    """Class names in the order of their indices; empty: the catalog's, or the labels found, sorted. Naming them also
    says that ambiguous labels (`A|B`, `Benign` as well as `benign`) are meant as they are."""
    drop_classes: tuple[str, ...] = ()
    """Classes to leave out with their images; in a multilabel set the label is removed and the image is kept. `''`
    leaves out rows without a label."""
    class_map: tuple[str, ...] = ()
    """Classes to rename, as old=new: `bkl=benign nv=benign`. Several may become one; a name that no class has yet takes
    the place of its first old one in the order of classes."""
    task: Literal["catalog", "multiclass", "ordinal", "multilabel"] = "catalog"
    """What a label means; `catalog` is the catalog's task, or multiclass for a set that is not in it."""
    table: str = ""
    """Path of the table inside the source; empty: the catalog's, or the only .csv there, or .xlsx, or .tsv."""
    image_column: str = ""
    """Column with the image's path, relative to the table or to the source; empty: the catalog's, or `file`."""
    label_column: str = ""
    """Column with the label (several of them in a multilabel set); empty: the catalog's, or `label`."""
    label_separator: str = "|"
    """What separates the labels in a cell of a multilabel table."""
    no_finding: str = ""
    """The label of a multilabel table that means none of the classes, for example 'No Finding'; empty: only an empty
    cell means it."""
    group_column: str = ""
    """Column with the patient, or whatever must not be in two splits; empty: the catalog's, or none."""
    group_pattern: str = ""
    """Regular expression whose first group is the patient in an image's path: `patient_(\\d+)_`; empty: none."""
    metadata_columns: tuple[str, ...] = ()
    """Columns of the table to keep for figures by subgroup, for example `age sex device`. They are stored readable for
    all readers of the store: choose none that identifies a patient."""
    split_column: str = ""
    """Column saying train, val or test; empty: the catalog's, or none, and splits are drawn; `-`: none in any
    case."""
    split_values: tuple[str, ...] = ()
    """What other words of the split column mean, as value=split: `1=train 0=test`, and `=train` for empty cells;
    empty: the catalog's, or none.
    In a `folders` set what a folder around the class folders means: `TEST_SIMPLE=test`; `masks=drop` leaves it out."""
    split_folders: Literal["keep", "ignore"] = "keep"
    """Folders of a `folders` set that are named after splits (`Training/`, `Testing/`), around the class folders or
    inside of them: `keep` the splits that they give, or `ignore` them and draw the splits from all images."""
    rows_without_file: Literal["refuse", "drop"] = "refuse"
    """Rows of the table whose image is not there: `refuse` the set, or `drop` them and report how many they were."""
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of the samples drawn for validation, where the set has no official split; of the official training
    samples, where it has only train and test."""
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of the samples drawn for the test, where the set has no official split."""
    seed: int = Field(default=0, ge=0)
    """Draws the splits, the order within shards and the phantoms."""
    salt: str = ""
    """Mixed into the hashed keys, so that a key cannot be found by hashing a known file name."""
    max_side: int | None = Field(default=None, ge=8)
    """Shrink images whose longer side is above this many pixels; none keeps the coded pixels as they are."""
    max_quarantine: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of undecodable images above which the step fails; up to it they are quarantined and counted."""
    samples_per_shard: int = Field(default=10_000, ge=1)
    """Images in one shard at most."""
    shard_bytes: int = Field(default=256_000_000, ge=1)
    """Bytes of one shard at most, on average over a split, and as estimated from the source: its coded bytes, or its
    pixels where it has no code; what is coded tighter than PNG, such as JPEG 2000, makes larger ones."""
    duplicates: DuplicatesConfig = DuplicatesConfig()
    """Duplicates, and what is done about them."""
    dicom: DicomConfig = DicomConfig()
    """How DICOM files become images; a `folders` or `table` set may contain them among others."""
    phantoms: PhantomConfig = PhantomConfig()
    """The synthetic images, used where `dataset` is phantoms."""

    def identity(self, *, defaults: bool = True) -> dict[str, Any]:
        """The settings that decide the bytes, as JSON values in the words that digests are taken of.

        Settings that name a conversion, say where its source is, or judge it are not among them: `name`, `source`,
        `max_quarantine` and `duplicates.datasets`. Without `defaults` only settings that differ from theirs, so that a
        setting that is added later changes nothing for users who do not use it.
        """
        duplicates = self.duplicates.model_copy(update={"datasets": DuplicatesConfig().datasets})
        ignored = {"name", "max_quarantine", *self.WHEREABOUTS}
        found = self.model_copy(update={"duplicates": duplicates}).model_dump(
            mode="json", exclude=ignored, exclude_defaults=not defaults
        )
        found.get("duplicates", {}).pop("datasets", None)
        return old_words(found, self.PART)

    @field_validator("dataset", "name")
    @classmethod
    def _usable_as_folder(cls, value: str) -> str:
        return plain_name(value, "the name")

    @field_validator("table")
    @classmethod
    def _inside_the_source(cls, value: str) -> str:
        if value.startswith("/") or ".." in PurePosixPath(value).parts:
            raise ValueError(f"table is {value!r}, but it is a path inside the source: give it relative to the source")
        return value

    @field_validator("split_values")
    @classmethod
    def _value_and_split(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pair in value:
            _, equals, split = pair.rpartition("=")
            if not equals or split not in ("train", "val", "test", "drop"):
                raise ValueError(
                    f"split_values has {pair!r}, but it says value=split with the split train, val, test or drop: "
                    "write for example 1=train 0=test"
                )
        return value

    @field_validator("class_map")
    @classmethod
    def _old_and_new(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        new_names: dict[str, str] = {}
        for pair in value:
            old, equals, new = pair.rpartition("=")
            if not equals or not new.strip():
                raise ValueError(f"class_map has {pair!r}, but it says old=new: write for example bkl=benign nv=benign")
            if new_names.setdefault(old.strip(), new.strip()) != new.strip():
                raise ValueError(f"class_map gives {old.strip()!r} two new names: keep one of them")
        for new in new_names.values():
            if new_names.get(new, new) != new:
                raise ValueError(
                    f"class_map renames to {new!r}, and {new!r} to {new_names[new]!r}: names are replaced once, so map "
                    "each old name to its last one"
                )
        return value

    @field_validator("group_pattern")
    @classmethod
    def _pattern_with_a_group(cls, value: str) -> str:
        try:
            num_groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"group_pattern {value!r} is not a regular expression ({error}): correct it") from None
        if value and not num_groups:
            raise ValueError(
                f"group_pattern {value!r} has no group: put the part that names the patient in parentheses, as in "
                r"'patient_(\d+)_'"
            )
        return value

    @field_validator("metadata_columns")
    @classmethod
    def _columns_to_keep(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if taken := next((name for name in value if name in STORED_COLUMNS), None):
            raise ValueError(
                f"metadata_columns has {taken!r}, which is the name of a column of stored predictions: rename the "
                "column in the table"
            )
        if "" in value or len(set(value)) != len(value):
            raise ValueError(f"metadata_columns is {value}: name each column, and each only once")
        return value

    @field_validator("label_separator")
    @classmethod
    def _something_separates(cls, value: str) -> str:
        if not value:
            raise ValueError("label_separator is empty, but labels need something between them: write | or ; or ,")
        return value

    @model_validator(mode="after")
    def _settings_agree(self) -> "DataConfig":
        if self.group_pattern and self.group_column:
            raise ValueError(
                f"group_pattern {self.group_pattern!r} and group_column {self.group_column!r} both name the groups: "
                "give one of them"
            )
        renamed = {name.strip() for pair in self.class_map for name in pair.rpartition("=")[::2]}
        if both := sorted(renamed & set(self.drop_classes)):
            raise ValueError(
                f"{both[0]!r} is in drop_classes and in class_map: a class is either left out or renamed, so take it "
                "out of one of them"
            )
        if self.no_finding and self.no_finding in (*self.classes, *self.drop_classes):
            raise ValueError(
                f"no_finding {self.no_finding!r} means none of the classes, but it is named as a class: take it out of "
                "classes and drop_classes"
            )
        return self

    @model_validator(mode="after")
    def _room_for_training(self) -> "DataConfig":
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction {self.val_fraction} + test_fraction {self.test_fraction} leave nothing to train on: "
                "their sum must stay below 1"
            )
        if len({unicodedata.normalize("NFC", name) for name in self.classes}) != len(self.classes):
            raise ValueError(f"classes {self.classes} name one class twice: each name may appear once")
        return self
