"""Machine code built on first use, kept in the user's cache under the digest of all that decides it."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """Code that cannot be built or loaded here."""


def cache_folder() -> Path:
    """The folder of this user on this machine for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medmamba"


def kept(source: Path, suffix: str, decides: tuple[Any, ...], compiled: Callable[[bytes], bytes]) -> Path:
    """Where the machine code of `source` lies; built by `compiled(code)` where it does not lie there yet.

    The key is the code and the repr of `decides`. Several processes may build the same at once: each writes a file
    of its own beside and moves it into place. Raises BuildError.
    """
    code = source.read_bytes()
    key = hashlib.sha256(repr((code, *decides)).encode()).hexdigest()[:32]
    path = cache_folder() / source.suffix.removeprefix(".") / f"{key}.{suffix}"
    if not path.exists():
        log.info("compiling %s", source.name)
        began = time.monotonic()
        image = compiled(code)
        beside = path.with_name(f".{key}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(image)
            os.replace(beside, path)
        except OSError as error:
            raise BuildError(f"{path} cannot be written ({error}): name another folder in XDG_CACHE_HOME") from None
        log.info("compiled %s in %.1f s; kept in %s", source.name, time.monotonic() - began, path.parent)
    return path
