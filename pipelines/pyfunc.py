"""The registered model: encoded images (or pixels) in, class probabilities out.

MLflow stores this file as the model's code ("models from code"), with the packages medmamba and data_shards and the two
files of a checkpoint. There is no pickle, and prediction needs neither pipelines nor Ray nor DeepSpeed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel
from PIL import Image

BATCH = 32  # images per forward pass; bounds memory and changes nothing else


class Classifier:
    """A trained network with its preprocessing. `load_model(uri, model_config={"device": "cuda"})` moves it."""

    batch = BATCH

    def load_context(self, context: Any) -> None:
        """Reads weights.safetensors and model.json from the artifacts.

        Raises ValueError if their digest is not the one that the model was packaged with.
        """
        _keep_kernels_outside()
        from medmamba.checkpoint import load_model

        folder = Path(context.artifacts["weights"]).parent
        settings = context.model_config or {}
        if not settings.get("digest"):
            raise ValueError(
                f"{folder}: MLmodel was edited and has no digest of the weights, so they cannot be verified; "
                "restore it, or register the model again"
            )
        self.device = settings.get("device", "cpu")
        self.model, _, self.card = load_model(folder, device=self.device, digest=settings["digest"])

    def predict(self, context, model_input, params=None):  # type hints would replace the signature
        """Returns a DataFrame of probabilities (N, classes), one row per image and one column per class.

        `model_input`: a DataFrame with the column `image`, or the images themselves: each one the bytes of an image
        file or uint8 pixels (H, W), (H, W, 1) or (H, W, 3); also one array (N, H, W) or (N, H, W, C) of equal sizes.
        Raises ValueError, naming the row, for anything that is not an image.
        """
        images = model_input["image"].tolist() if isinstance(model_input, pd.DataFrame) else list(model_input)
        starts = range(0, len(images), self.batch)
        found = [self._scores(images[first : first + self.batch], first) for first in starts]
        scores_NC = np.concatenate(found) if found else np.empty((0, len(self.card["classes"])))
        return pd.DataFrame(scores_NC.astype(np.float64), columns=self.card["classes"])

    def _scores(self, images: Sequence[bytes | np.ndarray], first: int) -> np.ndarray:
        import torch

        from medmamba.loss import scores
        from medmamba.precision import exact_float32
        from medmamba.preprocess import preprocess

        pixels_BHWC = np.stack([self._pixels(image, first + i) for i, image in enumerate(images)])
        with torch.inference_mode(), exact_float32():
            logits_BC = self.model(preprocess(torch.from_numpy(pixels_BHWC).to(self.device)))
        return scores(logits_BC, self.card["task"]).cpu().numpy()

    def _pixels(self, image: bytes | np.ndarray, row: int) -> np.ndarray:
        """Pixels as uint8 (height, width, 3), prepared as in training: decode, shrink like the dataset, resize."""
        from data_shards.decode import decode
        from medmamba.preprocess import resize_uint8

        if isinstance(image, np.ndarray) and (
            image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,))
        ):
            raise ValueError(
                f"image {row} is an array {image.shape} of {image.dtype}: pass uint8 pixels (height, width) or "
                "(height, width, 1 or 3), or the bytes of an image file"
            )
        if not isinstance(image, bytes | bytearray | np.ndarray):
            raise ValueError(
                f"image {row} is a {type(image).__name__}: pass the bytes of an image file or uint8 pixels"
            )
        try:
            data = image if isinstance(image, np.ndarray) else bytes(image)
            pixels_HWC = decode(data, max_side=self.card.get("max_side"))
        except ValueError as error:
            raise ValueError(f"image {row} cannot be decoded: {error}") from error
        if self.card["channels"] == 1 and pixels_HWC.shape[2] == 3:
            pixels_HWC = np.asarray(Image.fromarray(pixels_HWC).convert("L"))[..., None]  # trained on grayscale only
        size = self.card["image_size"]
        resized = resize_uint8(pixels_HWC, size if isinstance(size, int) else tuple(size))
        return np.broadcast_to(resized, (*resized.shape[:2], 3))


def _keep_kernels_outside() -> None:
    """Sends compiled kernels to the user's cache: next to their code they would be pickles among the artifacts."""
    import numba

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medmamba" / "numba"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="medmamba-numba-"))
    settings: Any = numba.config
    settings.CACHE_DIR = settings.CACHE_DIR or str(folder)


class MedMambaModel(Classifier, PythonModel):
    """The classifier as an MLflow model. MLflow would wrap a `predict` defined here, with a warning."""


mlflow.models.set_model(MedMambaModel())
