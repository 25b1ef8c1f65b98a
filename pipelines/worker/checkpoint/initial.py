"""Reads the initial weights that the store keeps for a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_shards.store import open_store
from medmamba.checkpoint import model_digest, parse_model
from medmamba.config import MODEL, WEIGHTS


def read_kept(uri: str, digest: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Returns (state, card) of weights in the store. Raises ValueError if their digest does not match."""
    folder = open_store(uri)
    weights, described = folder.get(WEIGHTS), folder.get(MODEL)
    if model_digest(weights, described) != digest:
        raise ValueError(
            f"the weights in {uri} do not match the digest in its name: they were damaged or replaced; delete that "
            "folder and run the same command to copy them again from train.init"
        )
    state, _, card = parse_model(weights, described, where=uri)
    return state, card
