"""Whether the private parts of Ray that are replaced to start faster are those that this was tried with."""

from __future__ import annotations

TRIED = "2.60."


def are_known() -> bool:
    """Whether this is that Ray. With any other one everything runs as Ray has it, a few seconds slower."""
    import ray

    return ray.__version__.startswith(TRIED)
