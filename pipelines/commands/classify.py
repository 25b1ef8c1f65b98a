"""Image files -> class probabilities of a registered model, by default the champion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.decode import decode
from data_shards.store import Store
from pipelines.tracking import Tracking, open_tracking
from pipelines.tracking.registry import Version, by_alias, loaded, models_with_alias


def classify(
    images: Sequence[Path],
    *,
    store: Store,
    model: str = "",
    alias: str = "champion",
    tracking: Tracking | None = None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """One row per image: {"image", "class" (the most probable), "scores" {class: probability}, "model", "version"}.

    `model` may be empty if only one model has the alias.

    Raises:
        ValueError: a file is missing or not an image (checked before a model is loaded), or no model, or more than one,
            has the alias.
        registry.IntegrityError: the model's files are not the ones that were registered.
    """
    import pandas as pd

    pixels = [_read(Path(path)) for path in images]
    store.reach()  # the model may be stored there: report an unreachable S3 before MLflow waits for it
    tracking = tracking or open_tracking(store)
    version = find_model(tracking, model, alias)
    with loaded(tracking, version, device=device) as registered:
        frame = registered.predict(None, pd.DataFrame({"image": pd.Series(pixels, dtype=object)}))
    return [
        {
            "image": str(path),
            "class": str(frame.columns[int(row.argmax())]),
            "scores": {str(name): float(score) for name, score in zip(frame.columns, row, strict=True)},
            "model": version.model,
            "version": version.number,
        }
        for path, row in zip(images, frame.to_numpy(), strict=True)
    ]


def find_model(tracking: Tracking, model: str = "", alias: str = "champion") -> Version:
    """The version with this alias; raises ValueError if no model, or more than one, has it."""
    names = [model] if model else models_with_alias(tracking, alias)
    if len(names) > 1:
        raise ValueError(f"{len(names)} models have the alias {alias!r}: {', '.join(names)}; choose one with --model")
    version = by_alias(tracking, names[0], alias) if names else None
    if version is None:
        raise ValueError(
            f"no model{f' {model!r}' if model else ''} in MLflow at {tracking.address} has the alias {alias!r}: train "
            "and promote one first (`medmamba run release`), or give another --store, --model or --alias"
        )
    return version


def _read(path: Path) -> np.ndarray:
    """The pixels of an image file, decoded in the same way as for shards."""
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give a readable image file") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be decoded as an image: {error}") from error
