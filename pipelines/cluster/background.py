"""Work next to the main thread, such as importing a library while another one starts its processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def in_background(work: Callable[[], Result], *, stays: bool = False) -> Future[Result]:
    """Starts `work` in a daemon thread; `result()` waits for it and raises its exception.

    With `stays` the thread lives as long as the process: the kernel can end children with the thread that started them.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised again by `result()`
            future.set_exception(error)
        if stays:
            threading.Event().wait()

    threading.Thread(target=run, daemon=True).start()
    return future
