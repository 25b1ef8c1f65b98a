"""Failures of a group of training workers that are not a user's mistake; each says what to do."""

from __future__ import annotations

from pipelines.wording import counted

RESUME = "run the same command to resume"


class GroupFault(RuntimeError):  # noqa: N818  (a base class; its subclasses end in Error)
    """A group of workers does not start or makes no progress. The message is for the user."""


class StalledError(GroupFault):
    """A rank has stalled."""

    def __init__(self, who: str) -> None:
        super().__init__(who)
        self.who = who

    def __str__(self) -> str:
        return (
            f"{self.who}, and the training stalled: the process may be stopped, its machine overloaded or its GPU "
            f"broken; check that node, then {RESUME}"
        )


class NoPlaceError(GroupFault):
    """The nodes have no room for the minimum number of workers."""

    def __init__(self, workers: int, wait_s: float, nodes: str) -> None:
        super().__init__(workers, wait_s, nodes)
        self.workers, self.wait_s, self.nodes = workers, wait_s, nodes

    def __str__(self) -> str:
        return (
            f"no room for {counted(self.workers, 'training worker')} on the nodes of this Ray ({self.nodes}) within "
            f"{self.wait_s / 60:.0f} min: add nodes, or allow fewer workers (--placement.workers-min), then {RESUME}"
        )
