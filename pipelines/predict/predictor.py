"""A registered model that is ready to classify: its files are verified and its weights are on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_shards.decode import decode
from data_shards.store import Store
from pipelines.tracking import Tracking, open_tracking
from pipelines.tracking.registry import Version, by_alias, loaded, models_with_alias


class Predictor:
    """Prepares images in any thread, and gives the class probabilities of prepared ones."""

    def __init__(self, classifier: Any, version: Version, *, batch_size: int):
        self._classifier, self.version = classifier, version
        self._classifier.batch = batch_size
        card = classifier.card
        self.classes = tuple(map(str, card["classes"]))
        self.calibrated = bool(classifier.is_calibrated)
        """Whether the probabilities are calibrated on validation images."""
        self._max_side, self._channels = card.get("max_side"), card["channels"]
        size = card["image_size"]
        self._size = (size, size) if isinstance(size, int) else tuple(size)

    def prepare(self, image: bytes | np.ndarray) -> np.ndarray:
        """The pixels in the size that the network gets, uint8 (H, W, 1 or 3). ValueError if it is not an image.

        The model prepares them again, which changes nothing: it only needs less time and memory then.
        """
        from PIL import Image

        from medmamba.preprocess import resize_uint8

        pixels_HWC = decode(image, max_side=self._max_side)
        if self._channels == 1 and pixels_HWC.shape[2] == 3:
            pixels_HWC = np.asarray(Image.fromarray(pixels_HWC).convert("L"))[..., None]
        if self._max_side is not None and max(self._size) > self._max_side:
            return pixels_HWC  # the model would shrink a resized image
        return resize_uint8(pixels_HWC, self._size)

    def scores(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """Probabilities (N, classes) of N prepared images, float64. ValueError if the GPU has no room for a batch."""
        import pandas as pd
        import torch

        try:
            frame = self._classifier.predict(None, pd.DataFrame({"image": pd.Series(list(prepared), dtype=object)}))
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the GPU has no memory for {len(prepared)} images at once: give a smaller --batch-size, or use "
                "--device cpu"
            ) from error
        scores_NC: np.ndarray = frame.to_numpy()
        return scores_NC


@contextlib.contextmanager
def open_predictor(
    store: Store,
    *,
    model: str = "",
    alias: str = "champion",
    tracking: Tracking | None = None,
    device: str = "auto",
    raw: bool = False,
    batch_size: int = 32,
) -> Iterator[Predictor]:
    """The model with this alias, verified and loaded; `raw` leaves out its calibration.

    `model` may be empty if only one model has the alias. `device` "auto" is a GPU if torch sees one.

    Raises:
        ValueError: no model, or more than one, has the alias, or torch has no such device.
        registry.IntegrityError: the model's files are not the ones that were registered.
    """
    store.reach()  # the model may be stored there: report an unreachable S3 before MLflow waits for it
    tracking = tracking or open_tracking(store)
    version = find_model(tracking, model, alias)
    with loaded(tracking, version, device=_device(device), calibrated=not raw) as classifier:
        yield Predictor(classifier, version, batch_size=batch_size)


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


def _device(wanted: str) -> str:
    import torch

    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ValueError("--device cuda: torch sees no GPU here; give --device cpu or auto")
    return wanted if wanted != "auto" else "cuda" if has_gpu else "cpu"
