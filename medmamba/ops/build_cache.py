"""Caches machine code that is built on first use, by the digest of everything that determines it."""

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
    """Code could not be built or loaded on this machine."""


def cache_folder() -> Path:
    """This project's folder in the user's cache on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medmamba"


def kept(source: Path, suffix: str, decides: tuple[Any, ...], compiled: Callable[[bytes], bytes]) -> Path:
    """The path of the machine code of `source`, built by `compiled(code)` if it is not cached yet.

    The key is the code and the repr of `decides`. Several processes may build the same code at once: each writes a
    temporary file and renames it. Raises BuildError.
    """
    code = source.read_bytes()
    key = hashlib.sha256(repr((code, *decides)).encode()).hexdigest()[:32]
    path = cache_folder() / source.suffix.removeprefix(".") / f"{key}.{suffix}"
    if not path.exists():
        log.info("compiling %s", source.name)
        began = time.monotonic()
        image = compiled(code)
        temporary = path.with_name(f".{key}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(image)
            os.replace(temporary, path)
        except OSError as error:
            raise BuildError(f"{path} cannot be written ({error}): set XDG_CACHE_HOME to another folder") from None
        log.info("compiled %s in %.1f s; cached in %s", source.name, time.monotonic() - began, path.parent)
    return path
