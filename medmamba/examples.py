"""Which images of a split are worth a look, and an image with its map as a picture.

Shapes: N samples, C classes or channels, H W pixels.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

# matplotlib's viridis at every fifteenth of its 256 values: even for the eye, also in gray and for the color-blind.
# Interpolated in between, it differs from matplotlib's by at most 6 of 255.
_VIRIDIS = (
    "440154 481769 472a7a 433d84 3d4e8a 355e8d 2e6d8e 297b8e 23898e 1f978b 21a585 2eb37c 46c06f 65cb5e 89d548 b0dd2f "
    "d8e219 fde725"
)
_STEPS = np.array([list(bytes.fromhex(color)) for color in _VIRIDIS.split()], dtype=np.float64)


class Picks(NamedTuple):
    """Positions of samples, the most telling first; no sample is in two of them."""

    worst: np.ndarray
    best: np.ndarray
    uncertain: np.ndarray


def pick(scores_NC: np.ndarray, labels_NC: np.ndarray, task: str, *, count: int = 4) -> Picks:
    """The samples that a network gets most wrong, most right, and is least sure of: at most `count` of each.

    `scores_NC` are probabilities, `labels_NC` multi-hot. Wrong and right are measured by the cross-entropy
    (multiclass), its mean over the classes (multilabel), or the expected distance from the true grade (ordinal);
    uncertain by the entropy, whatever the label. Among equals the earlier sample comes first. Where there are too few
    samples for all three, worst takes its share first, then uncertain. Raises ValueError where scores and labels do not
    fit, or for an unknown task.
    """
    if scores_NC.shape != labels_NC.shape or scores_NC.ndim != 2:
        raise ValueError(f"scores {scores_NC.shape} and labels {labels_NC.shape}: both must be (samples, classes)")
    loss_N, entropy_N = _loss(scores_NC, labels_NC, task), _entropy(scores_NC, task)
    taken = np.zeros(len(scores_NC), bool)

    def take(order_N: np.ndarray) -> np.ndarray:
        found = order_N[~taken[order_N]][:count]
        taken[found] = True
        return np.asarray(found)

    worst = take(np.argsort(-loss_N, kind="stable"))
    uncertain = take(np.argsort(-entropy_N, kind="stable"))
    return Picks(worst, take(np.argsort(loss_N, kind="stable")), uncertain)


def overlay(image_HWC: np.ndarray, map_HW: np.ndarray, *, strength: float = 0.65) -> bytes:
    """PNG of a uint8 image (H, W, 1 or 3) in gray under a map (H, W) in [0, 1] in viridis.

    The color is the stronger the higher the map, up to `strength`: where the map is 0 the image is as it was. Raises
    ValueError where the two are not of one size.
    """
    if image_HWC.shape[:2] != map_HW.shape:
        raise ValueError(f"image {image_HWC.shape} and map {map_HW.shape}: both must have one height and width")
    channels = image_HWC.shape[2]
    picture = Image.fromarray(np.ascontiguousarray(image_HWC[..., 0] if channels == 1 else image_HWC)).convert("L")
    gray_HW1 = np.asarray(picture, dtype=np.float64)[..., None]
    share_HW1 = strength * np.clip(map_HW, 0, 1)[..., None]
    mixed = gray_HW1 * (1 - share_HW1) + viridis(map_HW) * share_HW1
    buffer = io.BytesIO()
    Image.fromarray(np.rint(mixed).astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def viridis(values: np.ndarray) -> np.ndarray:
    """Colors (..., 3), float from 0 to 255, of values from 0 to 1; what is beyond them has the color of the end."""
    at = np.linspace(0, 1, len(_STEPS))
    return np.stack([np.interp(values, at, _STEPS[:, channel]) for channel in range(3)], axis=-1)


def _loss(scores_NC: np.ndarray, labels_NC: np.ndarray, task: str) -> np.ndarray:
    tiny = np.finfo(np.float64).tiny
    scores, labels = scores_NC.astype(np.float64), labels_NC.astype(np.float64)
    if task == "multiclass":
        return np.asarray(-np.log(np.maximum((scores * labels).sum(1), tiny)))
    if task == "ordinal":
        grades_C = np.arange(scores.shape[1])
        return np.asarray((scores * np.abs(grades_C - labels.argmax(1)[:, None])).sum(1))
    if task == "multilabel":
        return np.asarray(-np.log(np.maximum(np.where(labels > 0, scores, 1 - scores), tiny)).mean(1))
    raise ValueError(f"task {task!r}: must be multiclass, ordinal or multilabel")


def _entropy(scores_NC: np.ndarray, task: str) -> np.ndarray:
    scores = scores_NC.astype(np.float64)
    found = _surprise(scores)
    return np.asarray((found + _surprise(1 - scores) if task == "multilabel" else found).sum(1))


def _surprise(probabilities: np.ndarray) -> np.ndarray:
    return -probabilities * np.log(np.where(probabilities > 0, probabilities, 1))
