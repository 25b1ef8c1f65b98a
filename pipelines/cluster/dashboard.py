"""The dashboard of an embedded Ray: it starts beside the node, which Ray by itself begins only once it is up."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from pipelines.cluster import ray_internals
from pipelines.cluster.background import beside


@contextlib.contextmanager
def dashboard_beside_node() -> Iterator[None]:
    """A `ray.init` in the block starts both at once; at its end both are up. Raises what Ray raises where not.

    This saves the 2 s that the dashboard takes to import what it serves.
    """
    if not ray_internals.are_known():
        yield
        return
    from ray._private.node import Node

    begun: list[Future[Any]] = []
    start = Node.start_api_server

    def begin(node: Node, **options: Any) -> None:
        begun.append(beside(functools.partial(start, node, **options), stays=True))

    Node.start_api_server = begin  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Node.start_api_server = start  # type: ignore[method-assign]
    for each in begun:
        each.result()
