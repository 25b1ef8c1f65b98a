"""Images -> answers in their order: threads decode while the network computes, and only some images are in memory."""

from __future__ import annotations

import itertools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_shards.store import Store
from data_shards.store.store import StoreAwayError
from pipelines.predict.inputs import open_inputs
from pipelines.predict.predictor import Predictor, open_predictor
from pipelines.predict.source import Item
from pipelines.tracking import Tracking

# Enough to hide the 20 ms of a request to S3; at most so many images are in memory in their full size.
_THREADS = min(16, max(4, os.cpu_count() or 1))
_MOST_CHARACTERS = 300
BATCH = 32


@dataclass(frozen=True, slots=True)
class Answer:
    """The probabilities of one image, or why it could not be classified."""

    path: str
    scores: tuple[float, ...] | None
    error: str = ""


class _Prepared(NamedTuple):
    path: str
    pixels: np.ndarray | None
    error: str
    num_frames: int
    """Of the file."""
    is_last: bool


def answers(
    items: Iterable[Item],
    predictor: Predictor,
    *,
    batch_size: int = BATCH,
    progress: Callable[[int, int], None] = lambda files, images: None,
) -> Iterator[Answer]:
    """One answer per image, in the order of `items`; a file of several frames has one per frame, `FILE#0` and so on.

    `progress` is called after each batch with the number of finished files and images.

    Raises:
        StoreAwayError: the server of a store no longer answers.
        ValueError: the GPU has no room for a batch.
    """
    num_files = num_images = 0
    with warnings.catch_warnings(action="ignore"):  # pydicom's warnings quote headers
        for batch in _batches(_prepared(items, predictor, ahead=2 * batch_size), batch_size):
            pixels = [each.pixels for each in batch if each.pixels is not None]
            rows = iter(predictor.scores(pixels).tolist() if pixels else ())
            for each in batch:
                yield Answer(each.path, tuple(next(rows)) if each.pixels is not None else None, each.error)
            num_files += sum(each.is_last for each in batch)
            num_images += len(batch)
            progress(num_files, num_images)


def classify(
    images: Sequence[Path | str],
    *,
    store: Store,
    model: str = "",
    alias: str = "champion",
    tracking: Tracking | None = None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """One row per image of these files, folders or archives, as `row_of` describes it.

    Raises:
        UsageError: a file does not exist (checked before a model is loaded).
        ValueError: see `open_predictor`.
    """
    inputs = open_inputs([str(path) for path in images], dataset=lambda name: store.at("datasets", *name.split("/")))
    with open_predictor(store, model=model, alias=alias, tracking=tracking, device=device) as predictor:
        return [row_of(answer, predictor) for answer in answers(inputs, predictor)]


def row_of(answer: Answer, predictor: Predictor) -> dict[str, Any]:
    """{"image", "class" (the most probable), "scores" {class: probability}, "model", "version", "error", "calibrated"}.

    Without an answer the class is None, the scores are empty and `error` is the reason.
    """
    scores = dict(zip(predictor.classes, answer.scores or (), strict=False))
    return {
        "image": answer.path,
        "class": max(scores, key=lambda name: scores[name]) if scores else None,
        "scores": scores,
        "model": predictor.version.model,
        "version": predictor.version.number,
        "error": answer.error or None,
        "calibrated": predictor.calibrated,
    }


def _batches(prepared: Iterator[_Prepared], size: int) -> Iterator[list[_Prepared]]:
    """Lists with up to `size` images that can be classified, and up to as many that cannot."""
    batch: list[_Prepared] = []
    for each in prepared:
        batch.append(each)
        num = sum(one.pixels is not None for one in batch) if len(batch) >= size else 0
        if num == size or len(batch) == 2 * size:
            yield batch
            batch = []
    if batch:
        yield batch


def _prepared(items: Iterable[Item], predictor: Predictor, *, ahead: int) -> Iterator[_Prepared]:
    """The images in order; up to `ahead` files, or frames of a file, are read and decoded by threads in advance."""
    left = iter(items)
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="images")
    waiting: deque[tuple[Item, Future[_Prepared]]] = deque()
    try:
        while True:
            for item in itertools.islice(left, ahead - len(waiting)):
                waiting.append((item, pool.submit(_first_frame, item, predictor)))
            if not waiting:
                return
            item, future = waiting.popleft()
            first = future.result()
            yield first
            num = first.num_frames
            for start in range(1, num, ahead):
                some = range(start, min(start + ahead, num))
                yield from pool.map(lambda frame: _frame(item, predictor, frame, num), some)  # noqa: B023
    finally:
        pool.shutdown(cancel_futures=True)


def _first_frame(item: Item, predictor: Predictor) -> _Prepared:
    return _frame(item, predictor, 0, item.source.count_frames(item.where))


def _frame(item: Item, predictor: Predictor, frame: int, num: int) -> _Prepared:
    name = text_of(f"{item.name}#{frame}" if num > 1 else item.name)
    is_last = frame == num - 1
    try:
        return _Prepared(name, predictor.prepare(item.source.read(item.where, frame)), "", num, is_last)
    except StoreAwayError:  # not the image's fault, and no other image could be read either
        raise
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:_MOST_CHARACTERS] or type(error).__name__
        return _Prepared(name, None, text_of(reason), num, is_last)


def text_of(name: str) -> str:
    """A file name as text that can be encoded: bytes that are not UTF-8 become `\\xff` and so on."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
