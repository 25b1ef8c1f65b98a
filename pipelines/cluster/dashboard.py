"""Starts the dashboard of an embedded Ray together with the node; Ray itself starts one after the other."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from pipelines.cluster import ray_internals
from pipelines.cluster.background import in_background


@contextlib.contextmanager
def dashboard_with_node() -> Iterator[None]:
    """A `ray.init` in the block starts both at once, and both are up at its end. Raises what Ray raises if one fails.

    This saves the 2 s in which the dashboard imports its modules.
    """
    if not ray_internals.are_known():
        yield
        return
    from ray._private.node import Node

    begun: list[Future[Any]] = []
    start = Node.start_api_server

    def begin(node: Node, **options: Any) -> None:
        begun.append(in_background(functools.partial(start, node, **options), stays=True))

    Node.start_api_server = begin  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Node.start_api_server = start  # type: ignore[method-assign]
    for each in begun:
        each.result()
