"""The board: a small actor without a CPU where workers post progress for the driver's terminal."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from data_shards.store.outage import listening
from pipelines.cluster.monitor import Monitor

POLL_S = 0.5
LOOK_S = 10.0  # timeout of one poll; the last one, after the work, waits less
LAST_LOOK_S = 3.0


class Board(Monitor):
    """Keeps posts until the driver takes them, and monitors the workers. Runs as a Ray actor."""

    def __init__(self) -> None:
        super().__init__()
        self._posts: list[tuple[str, dict]] = []

    def post(self, name: str, values: dict) -> None:
        """Adds a post; `name` says which training or trial it is about."""
        self._posts.append((name, values))

    def take(self) -> list[tuple[str, dict]]:
        """Returns all posts since the last call, oldest first."""
        posts, self._posts = self._posts, []
        return posts


def post(board: Any, name: str, values: dict) -> None:
    """Posts to a board, from a worker. Never fails: a training must not end because its progress cannot be shown."""
    with contextlib.suppress(Exception):  # Ray raises many kinds when it is shutting down
        board.post.remote(name, values)


def hear_outages(board: Any, name: str) -> contextlib.AbstractContextManager[None]:
    """Posts what this process learns about services that are down, during the block."""
    return listening(lambda notice: post(board, name, {"outage": asdict(notice)}))


class Watch:
    """Opens a board and shows its posts during the block: `with Watch(show) as board: ...`.

    A board that dies is restarted empty, and later posts are shown again.
    """

    def __init__(self, show: Callable[[str, dict], None]) -> None:
        self._show = show
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Any:
        self._board = _open_board()
        self._thread.start()
        return self._board

    def __exit__(self, *error: object) -> None:
        import ray

        self._over.set()
        self._thread.join(LOOK_S + LAST_LOOK_S)
        # If Ray itself is gone, the error that ended the block must be reported instead.
        with contextlib.suppress(ray.exceptions.RayError, ConnectionError, RuntimeError):
            ray.kill(self._board)

    def _look(self) -> None:
        import ray

        last = False
        while not last:
            last = self._over.wait(POLL_S)
            try:
                posts = ray.get(self._board.take.remote(), timeout=LAST_LOOK_S if last else LOOK_S)
            except ray.exceptions.RayError:
                continue  # restarting, or gone with Ray; then the error of the work says what happened
            for name, values in posts:
                self._show(name, values)


def _open_board() -> Any:
    """Starts the actor on the driver's node, because other nodes may be lost, and the progress with them."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Without a CPU of its own it takes no place from a worker.
    return ray.remote(num_cpus=0, max_restarts=-1)(Board).options(scheduling_strategy=here).remote()
