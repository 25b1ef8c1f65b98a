"""The process that holds a lease, identifiable from other machines."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holder:
    """A process. `place` is equal for processes whose ids can be compared; empty if unknown."""

    host: str
    pid: int
    place: str
    started: int

    @property
    def is_dead(self) -> bool:
        """Whether this process has certainly ended; False if it is not in our place and cannot be checked."""
        if not self.place or self.place != _place():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's process, which may be hidden
            pass
        found = _started(self.pid)
        # A different start time means that the id was reused. 0: ended, but not yet reaped.
        return found is not None and found != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> Holder:
    """This process as the holder of a lease."""
    started = _started(os.getpid())
    place = _place() if started is not None else ""
    return Holder(socket.gethostname(), os.getpid(), place, started or 0)


def _place() -> str:
    """This machine's boot id and process namespace; empty without /proc.

    Host names are not enough: containers often share one, but have separate process ids.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; 0 if it has ended but was not reaped, None if not visible."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # The command's name is in brackets and may contain brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])
    return None
