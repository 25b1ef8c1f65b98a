"""Where workers post how far they are and the driver's terminal looks: one small actor, no CPU of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

POLL_S = 0.5


class Board:
    """Keeps what was posted since the last look. Runs as a Ray actor."""

    def __init__(self) -> None:
        self._posts: list[tuple[str, dict]] = []

    def post(self, name: str, values: dict) -> None:
        """Adds a post; `name` says which training or trial it is about."""
        self._posts.append((name, values))

    def take(self) -> list[tuple[str, dict]]:
        """Returns all posts since the last call, oldest first."""
        posts, self._posts = self._posts, []
        return posts


class Watch:
    """Opens a board and shows its posts while the block runs: `with Watch(show) as board: ...`."""

    def __init__(self, show: Callable[[str, dict], None]) -> None:
        self._show = show
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Any:
        import ray

        # Anywhere but on a worker's CPU: it holds none, and Ray's own scheduling decides.
        self._board: Any = ray.remote(num_cpus=0)(Board).remote()
        self._thread.start()
        return self._board

    def __exit__(self, *error: object) -> None:
        import ray

        self._over.set()
        self._thread.join()
        ray.kill(self._board)

    def _look(self) -> None:
        import ray

        while True:
            last = self._over.wait(POLL_S)
            try:
                posts = ray.get(self._board.take.remote(), timeout=10)
            except ray.exceptions.RayError:
                return  # the display ends with its board; the training's own error tells what happened
            for name, values in posts:
                self._show(name, values)
            if last:
                return
