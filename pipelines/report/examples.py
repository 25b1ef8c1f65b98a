"""Images of the test split with the maps of the network: the worst, the best and the most uncertain ones."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from data_shards.contact_sheet import read_image
from data_shards.manifest import Dataset, open_dataset
from data_shards.store import StoreError
from pipelines.report.parts import Example
from pipelines.report.records import RunRecords, predictions_of
from pipelines.report.words import number, plain
from pipelines.scratch import scratch

if TYPE_CHECKING:
    from pipelines.evaluation.predictions import StoredPredictions

MOST = 50
_SIDE = 160
_SMALL = 96  # pixels: up to here an image is kept as it is, and enlarged by the browser
_KINDS = {"worst": "Most wrong", "uncertain": "Most uncertain", "best": "Most right"}
_BRANCHES = {"conv": "convolution branch", "scan": "scan branch"}


def examples(run: RunRecords, count: int) -> tuple[list[Example], str]:
    """At most `count` images with their maps, and why there are none; needs the shards and the weights."""
    if count < 3:
        return [], "no images were asked for"
    try:
        return _examples(run, min(count, MOST) // 3), ""
    except (ValueError, StoreError) as error:
        return [], f"the images cannot be shown: {plain(error)[:300]}"


def _examples(run: RunRecords, each: int) -> list[Example]:
    from medmamba.examples import pick

    stored = predictions_of(run.store, run.run, run.records, run.manifest)
    shard, trained = run.facts("shard"), run.facts("train")
    data = open_dataset(run.store.at(*shard["data"].split("/")), digest=shard["digest"])
    if len(data.index(stored.split)) != len(stored):
        raise ValueError("the predictions are not of the samples of this dataset")
    model, card = _model(run, trained)
    picks = pick(stored.scores, stored.labels, stored.task, count=each)
    return [
        _example(kind, int(position), stored, _pixels(data, stored.split, int(position), card), model)
        for kind in _KINDS
        for position in getattr(picks, kind)
    ]


def _model(run: RunRecords, trained: Any) -> tuple[Any, dict[str, Any]]:
    from medmamba.checkpoint import load_model
    from medmamba.config import MODEL, WEIGHTS

    with scratch("report") as folder:
        stored = run.store.at(*trained["model"].split("/"))
        for name in (WEIGHTS, MODEL):
            (folder / name).write_bytes(stored.get(name))
        model, _, card = load_model(folder, digest=trained["digest"])
    return model.eval(), card


def _pixels(data: Dataset, split: str, position: int, card: dict[str, Any]) -> np.ndarray:
    """The image as the network reads it, uint8 (H, W, 3)."""
    from medmamba.preprocess import resize_uint8

    pixels = read_image(data, split, position)
    if card["channels"] == 1 and pixels.shape[2] == 3:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    size = card["image_size"]
    resized = resize_uint8(pixels, size if isinstance(size, int) else tuple(size))
    return np.ascontiguousarray(np.broadcast_to(resized, (*resized.shape[:2], 3)))


def _example(kind: str, position: int, stored: StoredPredictions, pixels: np.ndarray, model: Any) -> Example:
    from medmamba.examples import overlay
    from medmamba.explain import finest_block, grad_cam

    scores = stored.scores[position]
    target = int(scores.argmax())
    truth = ", ".join(plain(stored.classes[at]) for at in np.flatnonzero(stored.labels[position])) or "no class"
    guess = f"{plain(stored.classes[target])} {number(float(scores[target]), 2)}"
    block = finest_block(model, pixels.shape[:2])
    pictures = [("image", _uri(Image.fromarray(pixels)))]
    for branch, name in _BRANCHES.items():
        try:
            found = grad_cam(model, pixels[None], target, branch, block=block)  # type: ignore[arg-type]
        except ValueError:  # a network without that branch
            continue
        pictures.append((name, _uri(Image.open(io.BytesIO(overlay(pixels, found))))))
    caption = f"Label: {truth}. Predicted: {guess}. Key {str(stored.key[position])[:12]}."
    return Example(_KINDS[kind], f"{_KINDS[kind]}: label {truth}, predicted {guess}", caption, pictures)


def _uri(image: Image.Image) -> str:
    """A small image without loss, a larger one as a JPEG of at most `_SIDE` pixels."""
    buffer = io.BytesIO()
    if max(image.size) <= _SMALL:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((_SIDE, _SIDE))
        image.convert("RGB").save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
