"""Expands DICOM files to one row per frame, grouped by patient."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from data_shards.config import DataConfig
from data_shards.decode import dicom
from data_shards.source.row import Row

_log = logging.getLogger(__name__)
# Headers are read by threads, because a remote store takes some 20 ms to answer. Only _AHEAD are queued at a time: each
# future takes a kilobyte.
_AT_ONCE, _AHEAD = 16, 4096


def with_frames(rows: Sequence[Row], open_file: Callable[[Row], BinaryIO], config: DataConfig) -> list[Row]:
    """The rows, with one for every frame of each DICOM file, and with groups if the set has none.

    The group is the patient ID, or that of another file of the same study, or the study, or the file, so that frames
    and slices of one patient stay in one split. Only headers are read, and only of files that are not named as PNG,
    JPEG and so on.

    Raises ValueError if most of the files are DICOM and the extra `dicom` is not installed, or if all belong to one
    patient, so that no split can be drawn.
    """
    found = _found([row for row in rows if not dicom.named_as_image(row.where)], open_file)
    if not found:
        return list(rows)
    if not dicom.usable() and len(found) > len(rows) / 2:
        raise ValueError(
            f"{len(found)} of {len(rows)} images are DICOM files, which need the extra dicom: {dicom.EXTRA}"
        )
    _warn(list(found.values()), config)
    patients = {facts.study: facts.patient for facts in found.values() if facts.study and facts.patient}
    expanded = []
    for row in rows:
        facts = found.get(row.where)
        if facts is not None and row.group is None:
            row = dataclasses.replace(row, group=_group(facts, patients, row.where))
        frames = facts.num_frames if facts is not None and _all_frames(facts, config) else 1
        expanded += [row] if frames == 1 else [dataclasses.replace(row, frame=frame) for frame in range(frames)]
    _require_patients(rows, expanded, config)
    return expanded


def _found(rows: Sequence[Row], open_file: Callable[[Row], BinaryIO]) -> dict[str, dicom.Facts]:
    """Facts about the DICOM files among the rows, by path."""

    def facts(row: Row) -> dicom.Facts | None:
        try:
            with open_file(row) as file:
                return dicom.facts(file) if dicom.is_dicom(file) else None
        except OSError:  # reported when the image is read
            return None

    found: dict[str, dicom.Facts] = {}
    # Set outside of the threads: warning filters belong to the process.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="headers") as pool:
        for start in range(0, len(rows), _AHEAD):
            ahead = rows[start : start + _AHEAD]
            found |= {row.where: known for row, known in zip(ahead, pool.map(facts, ahead), strict=True) if known}
    return found


def _all_frames(facts: dicom.Facts, config: DataConfig) -> bool:
    """Whether each frame becomes a row. A non-image object that will be quarantined is a single row."""
    return config.dicom.frames == "each" and not (facts.not_image and config.dicom.objects == "quarantine")


def _warn(found: Sequence[dicom.Facts], config: DataConfig) -> None:
    if identifying := sum(facts.identifying for facts in found):
        _log.warning(
            "%d DICOM files are marked as showing who the patient is (BurnedInAnnotation or "
            "RecognizableVisualFeatures is YES); they are %s (--data.dicom.identifying)",
            identifying,
            "kept" if config.dicom.identifying == "keep" else "quarantined",
        )
    if objects := sum(facts.not_image for facts in found):
        _log.warning(
            "%d DICOM files are not images but other objects, such as doses, segmentations or slide labels; they are "
            "%s (--data.dicom.objects)",
            objects,
            "kept if they have pixels" if config.dicom.objects == "keep" else "quarantined",
        )
    if unsaid := sum(facts.unsaid for facts in found):
        _log.warning(
            "%d DICOM files of ultrasound or secondary capture do not state whether patient names are burned into the "
            "pixels; inspect some of them before sharing the shards",
            unsaid,
        )


def _group(facts: dicom.Facts, patients: dict[str, str], where: str) -> str:
    patient = facts.patient or patients.get(facts.study)
    if patient:
        return f"patient {patient}"
    return f"study {facts.study}" if facts.study else f"file {where}"


def _require_patients(rows: Sequence[Row], expanded: Sequence[Row], config: DataConfig) -> None:
    groups = {row.group for row in expanded}
    if len(rows) > 1 and len(groups) == 1 and None not in groups and not (config.group_column or config.group_pattern):
        raise ValueError(
            f"all {len(rows)} DICOM files have the same PatientID or study, so no split can be drawn; if they are of "
            "several patients, list them in a CSV with a group column (--data.layout table, --data.group-column)"
        )
