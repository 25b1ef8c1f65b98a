"""The registered model: encoded images (or pixels) in, class probabilities out.

MLflow stores this file as the model's code ("models from code"), with the packages medmamba and data_shards, the two
files of a checkpoint, and calibration.json where validation data had one fitted. There is no pickle, and prediction
needs neither pipelines nor Ray nor DeepSpeed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from PIL import Image

BATCH = 32  # images per forward pass; bounds memory and changes nothing else


class UnusableRowsError(MlflowException, ValueError):
    """Rows of a request are not images. A server answers with status 400 and this line alone."""

    def __init__(self, line: str) -> None:
        super().__init__(line, error_code=INVALID_PARAMETER_VALUE)
        self._line = line

    def serialize_as_json(self) -> str:
        """What a server answers: without the request's data, with which MLflow begins the message."""
        return json.dumps({"error_code": self.error_code, "message": self._line})


class Classifier:
    """A trained network with its preprocessing.

    `load_model(uri, model_config={"device": "cuda"})` moves it; `model_config={"calibrated": False}` gives the
    network's raw probabilities instead of those with the temperature that was fitted on validation.
    """

    batch = BATCH

    def load_context(self, context: Any) -> None:
        """Reads weights.safetensors, model.json and, where there is one, calibration.json from the artifacts.

        Raises ValueError if their digests are not the ones that the model was packaged with.
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
        file = context.artifacts.get("calibration")
        is_wanted = settings.get("calibrated", True)
        self.is_calibrated = bool(file and is_wanted)
        self.temperature = _temperature(Path(file), settings) if self.is_calibrated else 1.0

    def predict(self, context, model_input, params=None):  # type hints would replace the signature
        """Returns a DataFrame of probabilities (N, classes), one row per image and one column per class.

        `model_input`: a DataFrame with the column `image`, or the images themselves: each one the bytes of an image
        file or uint8 pixels (H, W), (H, W, 1) or (H, W, 3); also one array (N, H, W) or (N, H, W, C) of equal sizes.
        Raises UnusableRowsError, a ValueError, with all rows that are not images and the reason of each.
        """
        images = model_input["image"].tolist() if isinstance(model_input, pd.DataFrame) else list(model_input)
        found, reasons = [], {}
        for first in range(0, len(images), self.batch):
            pixels = []
            for row, image in enumerate(images[first : first + self.batch], first):
                try:
                    pixels.append(self._pixels(image, row))
                except ValueError as error:
                    reasons[row] = " ".join(str(error).split())
            if not reasons:
                found.append(self._scores(np.stack(pixels)))
        if reasons:
            raise UnusableRowsError(
                f"{len(reasons)} of {len(images)} rows cannot be used, so none was predicted: "
                f"{'; '.join(reasons.values())}"
            )
        scores_NC = np.concatenate(found) if found else np.empty((0, len(self.card["classes"])))
        return pd.DataFrame(scores_NC.astype(np.float64), columns=self.card["classes"])

    def _scores(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        import torch

        from medmamba.loss import scores
        from medmamba.precision import exact_float32
        from medmamba.preprocess import preprocess

        with torch.inference_mode(), exact_float32():
            logits_BC = self.model(preprocess(torch.from_numpy(pixels_BHWC).to(self.device)))
        return scores(logits_BC.float() / self.temperature, self.card["task"]).cpu().numpy()

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


def _temperature(file: Path, settings: dict[str, Any]) -> float:
    """The temperature in calibration.json; raises ValueError if it is not the file that was packaged."""
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != settings.get("calibration"):
        raise ValueError(
            f"{file} is not the calibration that the model was packaged with: it was replaced or damaged; restore it, "
            "or register the model again"
        )
    return float(json.loads(data)["temperature"])


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
