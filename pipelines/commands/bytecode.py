"""Where Python keeps what it makes of imported modules, on machines that keep it nowhere.

Images for containers often set PYTHONDONTWRITEBYTECODE, and some installers (uv) leave compiling to the first import.
Together every process then compiles all that it imports: on one such machine torch with its compiler took 12 s, Ray,
DeepSpeed and the rest as long again, in each worker.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from medmamba.ops.build_cache import cache_folder

LARGEST = "torch"  # of what every worker imports: where its modules are kept, those of the others are


def keep_bytecode() -> None:
    """Lets this process and those it starts keep compiled modules in the user's cache, if they are kept nowhere else.

    Who has named a folder in PYTHONPYCACHEPREFIX is left alone. A folder that cannot be written to does no harm.
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
