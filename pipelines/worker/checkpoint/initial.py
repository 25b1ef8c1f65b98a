"""The weights that a training starts from, as the store keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_shards.store import open_store


def read_kept(uri: str, digest: str) -> tuple[dict, Mapping[str, Any]]:
    """(state, card) of weights that the store keeps. ValueError where they are damaged."""
    from medmamba.checkpoint import MODEL, WEIGHTS, model_digest, parse_model

    folder = open_store(uri)
    weights, described = folder.get(WEIGHTS), folder.get(MODEL)
    if model_digest(weights, described) != digest:
        raise ValueError(
            f"{uri} has other weights than its name says: they were damaged or replaced; delete that folder, and run "
            "the same command to get them again from train.init"
        )
    state, _, card = parse_model(weights, described, where=uri)
    return state, card
