"""Reads what a run has recorded: its steps, its study and what is known of its dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from data_shards.catalog.cards import DatasetCard, card, names
from data_shards.duplicates.report import DuplicatesReport, read_report
from data_shards.manifest import MANIFEST, Manifest, ManifestError, manifest_digest
from data_shards.store import Store, StoreError
from pipelines.evaluation.files import PREDICTIONS, STUDY, VALIDATION
from pipelines.evaluation.parts import Study
from pipelines.evaluation.predictions import StoredPredictions, read_predictions
from pipelines.evaluation.study import study
from pipelines.flow.record import Record, read_identity, read_record

STEPS = ("shard", "tune", "train", "evaluate", "register", "promote")
NEEDED = ("shard", "train", "evaluate")


@dataclass(frozen=True)
class RunRecords:
    """A run as its records describe it. What is missing or damaged is None or absent."""

    run: str
    store: Store
    records: Mapping[str, Record]
    """Of the finished steps."""
    configs: Mapping[str, Mapping[str, Any]]
    """Step -> configuration."""
    study: Study
    manifest: Manifest | None = None
    duplicates: DuplicatesReport | None = None
    dataset_card: DatasetCard | None = None
    model_card: Mapping[str, Any] | None = None
    """Of model.json: the network's configuration and its card."""

    def facts(self, step: str) -> Mapping[str, Any]:
        """The facts of a step; empty if it has not finished."""
        return self.records[step].facts if step in self.records else {}


def read_run(store: Store, run: str) -> RunRecords:
    """The records of a run that has been evaluated.

    Raises ValueError where a step that the report needs has not finished, or its predictions were changed afterwards.
    """
    folders = {step: store.at("runs", run, step) for step in STEPS}
    records = {step: record for step, out in folders.items() if (record := read_record(out)) is not None}
    if not any(True for _ in store.list(f"runs/{run}/")):
        raise ValueError(f"run {run!r} not found in {store.uri}; `medmamba status` lists all runs")
    missing = [step for step in NEEDED if step not in records]
    if missing:
        raise ValueError(
            f"run {run!r} in {store.uri} has not finished {', '.join(missing)}; run "
            f"`medmamba evaluate --run {run}` first"
        )
    identities = {step: read_identity(folders[step]) for step in records}
    data = store.at(*records["shard"].facts["data"].split("/"))
    manifest = _manifest(data, records["shard"].facts["digest"])
    name = manifest.dataset if manifest else str(records["shard"].facts.get("dataset", ""))
    return RunRecords(
        run=run,
        store=store,
        records=records,
        configs={step: identity.config for step, identity in identities.items() if identity},
        study=read_study(store, run, records, manifest),
        manifest=manifest,
        duplicates=_duplicates(data),
        dataset_card=card(name) if name in names() else None,
        model_card=_model_card(store, records["train"]),
    )


def read_study(store: Store, run: str, records: Mapping[str, Record], manifest: Manifest | None) -> Study:
    """The stored study; computed again from the predictions where a run of an earlier release has none."""
    evaluated = store.at("runs", run, "evaluate")
    if evaluated.head(STUDY) is not None:
        try:
            return Study.model_validate_json(evaluated.get(STUDY))
        except ValidationError:
            pass  # damaged, or of another release: the predictions have everything
    return study(predictions_of(store, run, records, manifest), _validation(evaluated))[0]


def predictions_of(
    store: Store, run: str, records: Mapping[str, Record], manifest: Manifest | None
) -> StoredPredictions:
    """The predictions of the test split. Raises ValueError where they are missing or were changed."""
    facts = records["evaluate"].facts
    otherwise = None
    if manifest is not None:
        digests = {"manifest": records["shard"].facts["digest"], "model": records["train"].facts["digest"]}
        otherwise = {"task": manifest.task, "classes": list(manifest.classes), "split": "test", **digests}
    key = facts.get("predictions", f"runs/{run}/evaluate/{PREDICTIONS}")
    try:
        return read_predictions(store, key, digest=facts["digest"], otherwise=otherwise)
    except StoreError as error:
        raise ValueError(f"run {run!r} has no predictions to report on: {error}") from error


def _validation(evaluated: Store) -> StoredPredictions | None:
    return read_predictions(evaluated, VALIDATION) if evaluated.head(VALIDATION) is not None else None


def _manifest(data: Store, digest: str) -> Manifest | None:
    try:
        stored = data.get(MANIFEST)
        return Manifest.model_validate_json(stored, strict=True) if manifest_digest(stored) == digest else None
    except (StoreError, ValidationError):
        return None


def _duplicates(data: Store) -> DuplicatesReport | None:
    try:
        return read_report(data)
    except (ManifestError, StoreError):
        return None


def _model_card(store: Store, trained: Record) -> Mapping[str, Any] | None:
    from medmamba.config import MODEL

    try:
        found = json.loads(store.at(*trained.facts["model"].split("/")).get(MODEL))
    except (StoreError, ValueError):
        return None
    return found if isinstance(found, dict) else None
