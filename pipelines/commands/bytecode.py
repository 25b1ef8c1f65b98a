"""Stores Python's bytecode in the user's cache on machines where it would not be stored.

Container images often set PYTHONDONTWRITEBYTECODE, and some installers (uv) leave compilation to the first import.
Then every process compiles everything that it imports: on one such machine, torch and its compiler took 12 s in each
worker, and Ray, DeepSpeed and the rest took another 12 s.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from medmamba.ops.build_cache import cache_folder

LARGEST = "torch"  # the largest import of every worker; if its bytecode is stored, so is that of the others


def keep_bytecode() -> None:
    """Makes this process and its children store bytecode in the user's cache, if it is not stored elsewhere.

    Does nothing if PYTHONPYCACHEPREFIX is set. A cache that is not writable does no harm.
    """
    if not sys.dont_write_bytecode or sys.pycache_prefix is not None or _is_kept(LARGEST):
        return
    folder = str(cache_folder() / "bytecode")
    sys.dont_write_bytecode, sys.pycache_prefix = False, folder
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = folder


def _is_kept(module: str) -> bool:
    found = importlib.util.find_spec(module)
    return bool(found and found.origin and Path(importlib.util.cache_from_source(found.origin)).exists())
