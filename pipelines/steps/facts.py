"""The facts that each step records about its result, and the lines that show them to users.

A field with a default is one that records of earlier releases lack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from data_shards.split import SPLITS
from pipelines.flow import Facts, Record
from pipelines.override import explain
from pipelines.sweep.ledger import trial_name
from pipelines.wording import counted


class ShardFacts(Facts):
    """A dataset in the store."""

    data: str
    """Its folder."""
    counts: dict[str, dict[str, int]]
    """Split -> class -> images."""
    num_images: int
    num_shards: int
    quarantine: int
    """Images that could not be decoded."""
    samples: dict[str, int] = Field(default_factory=dict)
    """Split -> images, each counted once even with several classes."""
    leaks: dict[str, int] = Field(default_factory=dict)
    """Kind of duplicate -> images."""
    dropped: int = 0
    """Duplicates that were left out."""

    def line(self) -> str:
        """See Facts."""
        classes = {name for counts in self.counts.values() for name in counts}
        images, shards = counted(self.num_images, "image"), counted(self.num_shards, "shard")
        return f"{images} of {counted(len(classes), 'class', 'classes')} in {shards}"

    def lines(self, finished: str) -> list[str]:
        """See Facts."""
        split = ", ".join(f"{name} {self.samples[name]}" for name in SPLITS if name in self.samples)
        images, shards = counted(self.num_images, "image"), counted(self.num_shards, "shard")
        lines = [f"{images} in {shards}{f' ({split})' if split else ''}"]
        dataset = self.data.removeprefix("datasets/")
        if self.quarantine:
            bad = counted(self.quarantine, "image")
            lines.append(f"{bad} could not be decoded (medmamba shards quarantine {dataset} --names)")
        duplicates = [f"{count} {what}" for what, count in self.leaks.items() if count]
        if duplicates:
            left_out = f"; {self.dropped} left out" if self.dropped else ""
            lines.append(f"duplicates: {', '.join(duplicates)}{left_out} (medmamba shards duplicates {dataset})")
        return [*lines, f"manifest {self.digest[:12]}"]

    def places(self, store_uri: str) -> list[tuple[str, str]]:
        """See Facts."""
        return [("shards", f"{store_uri}/{self.data}")]


class TuneFacts(Facts):
    """A sweep and its winner."""

    winner: dict[str, Any]
    """The winner's overrides: dotted key -> value."""
    trials: list[dict[str, Any]]
    winner_trial: str = ""
    winner_number: int = 0
    """0 in records of releases whose trials had no numbers."""

    @property
    def winner_name(self) -> str:
        """The name of the winner, "trial 3/8"; its id if trials had no numbers."""
        return trial_name(self.winner_number, len(self.trials), self.winner_trial)

    def line(self) -> str:
        """See Facts."""
        return f"{counted(len(self.trials), 'trial')}, winner {self.winner_name}"

    def lines(self, finished: str) -> list[str]:
        """See Facts."""
        stopped = sum(row["stopped_early"] for row in self.trials)
        failed = sum(row["error"] is not None for row in self.trials)
        lines = [f"{counted(len(self.trials), 'trial')}, {stopped - failed} stopped early, {failed} failed"]
        lines.append(f"winner: {self.winner_name}")
        return lines + [f"winner: {key} = {_short(value)}" for key, value in self.winner.items()]


class TrainFacts(Facts):
    """A trained model: the best epoch's."""

    model: str
    """Its folder in the store."""
    best_epoch: int
    epochs: int
    metrics: dict[str, float]
    """Validation metrics of the best epoch."""
    init: dict[str, str] = Field(default_factory=dict)
    """The weights that it started from; empty if they were random."""
    profile: dict[str, Any] | None = None
    """The result of the profile, if one was requested."""

    def line(self) -> str:
        """See Facts."""
        return f"epoch {self.best_epoch}, val AUC {self.metrics['val_auc']:.4f}"

    def lines(self, finished: str) -> list[str]:
        """See Facts."""
        best = f"best of {counted(self.epochs, 'epoch')}: {self.best_epoch}, val AUC {self.metrics['val_auc']:.4f}"
        return [best, *([f"started from {self.init['uri']}"] if self.init else [])]

    def places(self, store_uri: str) -> list[tuple[str, str]]:
        """See Facts."""
        return [("weights", f"{store_uri}/{self.model}")]


class EvaluateFacts(Facts):
    """The metrics of the model and of the baselines on the test split."""

    predictions: str
    """Their file in the store."""
    num_samples: int
    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]] = Field(default_factory=dict)
    absent_baselines: dict[str, str] = Field(default_factory=dict)
    """Baseline -> why it is missing."""
    intervals: dict[str, list[float]] = Field(default_factory=dict)
    """Metric -> lower and upper bound of its 95 % interval."""
    study: str = ""
    """The file with every figure, interval and curve."""
    calibration: str = ""
    """The file with what was fitted on validation."""

    def line(self) -> str:
        """See Facts."""
        return f"test AUC {self.metrics['auc']:.4f} over {counted(self.num_samples, 'image')}"

    def places(self, store_uri: str) -> list[tuple[str, str]]:
        """See Facts."""
        files = {"predictions": self.predictions, "study": self.study, "calibration": self.calibration}
        return [(what, f"{store_uri}/{file}") for what, file in files.items() if file]


class ReportFacts(Facts):
    """The page and the model card of an evaluation."""

    page: str
    """Its file in the store."""
    card: str
    """Its file in the store, as JSON."""

    def line(self) -> str:
        """See Facts."""
        return self.page

    def places(self, store_uri: str) -> list[tuple[str, str]]:
        """See Facts."""
        return [("report", f"{store_uri}/{self.page}")]


class RegisterFacts(Facts):
    """A version in MLflow's registry."""

    model: str
    version: int

    def line(self) -> str:
        """See Facts."""
        return f"{self.model} version {self.version}"

    def places(self, store_uri: str) -> list[tuple[str, str]]:
        """See Facts."""
        return [("model", f"models:/{self.model}/{self.version}")]


class PromoteFacts(Facts):
    """The verdict of the gate."""

    verdict: Literal["yes", "no"]
    reason: str
    alias: str = "champion"
    model: str = ""

    def line(self) -> str:
        """See Facts."""
        return f"{self.verdict}: {self.reason}"

    def lines(self, finished: str) -> list[str]:
        """See Facts."""
        # The reason refers to the champion at that time, which may have been replaced since.
        return [self.line(), f"decided on {finished[:16].replace('T', ' ')} UTC"]

    def places(self, store_uri: str) -> list[tuple[str, str]]:
        """See Facts."""
        return [(self.alias, f"models:/{self.model}@{self.alias}")] if self.verdict == "yes" and self.model else []


FACTS: Mapping[str, type[Facts]] = {
    "shard": ShardFacts,
    "tune": TuneFacts,
    "train": TrainFacts,
    "evaluate": EvaluateFacts,
    "report": ReportFacts,
    "register": RegisterFacts,
    "promote": PromoteFacts,
}


def read_facts(step: str, record: Record) -> Facts:
    """The facts of a finished step; only the digest for an unknown step.

    Raises ValueError if the record lacks what every release has recorded.
    """
    kind = FACTS.get(step.partition("-")[0], Facts)  # promote-forced, promote-forced-2, ...
    try:
        return kind.model_validate(record.facts)
    except ValidationError as error:
        raise ValueError(
            f"the record of step {step} is not valid ({explain(error)[:200]}): it was edited or damaged; "
            "restore it, or delete the step's folder to run the step again"
        ) from None


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
