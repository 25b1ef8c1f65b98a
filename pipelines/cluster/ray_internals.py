"""The version of Ray whose private parts may be replaced for a faster start."""

from __future__ import annotations

TRIED = "2.60."


def are_known() -> bool:
    """Whether this is that version. With any other one nothing is replaced, and Ray starts a few seconds later."""
    import ray

    return ray.__version__.startswith(TRIED)
