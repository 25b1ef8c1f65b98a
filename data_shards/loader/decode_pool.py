"""Processes that decode images, so that neither the GIL nor torch is in their way, into memory shared with this one.

They are started with a fresh interpreter, never forked: this process may hold CUDA, Ray and threads. The shared memory
has no name (an anonymous file, handed on as a descriptor), so nothing is left in /dev/shm whoever is killed, and a
small /dev/shm is no limit. A process ends when the connection to its parent closes, which a SIGKILL of the parent does.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np

from data_shards.loader.pixels import Coded, decode_into

PER_PROCESS = 2  # batches on their way: one that is filled and one that waits
# Batches that may be in use outside at once without being copied: two that wait in the loader, one on its way to the
# device and the one that is computed with make five.
LENT = 6
# Fresh memory costs page faults, which made decoding a fifth slower: glibc keeps what it has.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from data_shards.loader.decode_pool import main; main()"
)
_LOOK_EVERY_S = 2.0


class DecodeProcessError(ValueError):
    """A decoding process that is gone."""


@dataclass(eq=False)
class Ticket:
    """A batch that was put in."""

    slot: int
    child: int
    is_done: bool = False
    error: Exception | None = None


class DecodePool:
    """Processes that share a ring of slots with this one.

    Args:
        reader: Reads coded images (see `decode_into`); it is pickled into every process.
        processes: How many.
        shape: (B, H, W, C) of a batch.
        lock: Page-locks the ring, so that a GPU copies from it, and returns what undoes that; None where it cannot.
    """

    def __init__(
        self,
        reader: Any,
        processes: int,
        shape: tuple[int, ...],
        lock: Callable[[np.ndarray], Callable[[], None] | None] | None = None,
    ):
        self.processes, self.shape = processes, shape
        self._memory = _anonymous_file()
        self._size = math.prod(shape)
        slots = processes * PER_PROCESS + LENT
        os.ftruncate(self._memory, slots * self._size)
        self._map = mmap.mmap(self._memory, slots * self._size)
        self._free = list(range(slots))
        self._waiting: list[Ticket] = []  # in the order in which they were put in
        self._sent: list[deque[Ticket]] = [deque() for _ in range(processes)]  # not yet answered, by process
        self._put = 0
        self._children = [_start(self._memory) for _ in range(processes)]
        unlock = lock(np.frombuffer(self._map, np.uint8)) if lock is not None else None
        self.is_locked = unlock is not None
        self._end = weakref.finalize(self, _end, os.getpid(), self._children, self._memory, unlock)
        for child, _ in self._children:
            child.send_bytes(pickle.dumps((reader, shape)))

    @property
    def depth(self) -> int:
        """How many batches may be put in before one is taken out."""
        return self.processes * PER_PROCESS

    @property
    def has_room(self) -> bool:
        """Whether another batch may be put in now."""
        return len(self._waiting) < self.depth

    def put(self, coded: Coded) -> Ticket:
        """Hands a batch to a process."""
        ticket = Ticket(self._free.pop(), self._put % self.processes)
        self._put += 1
        try:
            self._children[ticket.child][0].send_bytes(pickle.dumps((ticket.slot, coded)))
        except OSError:
            raise self._is_gone(ticket.child) from None
        self._waiting.append(ticket)
        self._sent[ticket.child].append(ticket)
        return ticket

    def take(
        self, ticket: Ticket | None = None, empty: Callable[[tuple[int, ...]], np.ndarray] | None = None
    ) -> np.ndarray:
        """The batch (B, H, W, C) of this ticket, or that was put in first of those which are still in.

        It is in the ring, where its memory is used again when the last view of it is gone; or a copy, where too many
        are in use outside, or `empty` is given and the ring is not locked: then in an array that `empty` makes.
        Raises what decoding raised, or DecodeProcessError where the process is gone.
        """
        slot = self._taken(ticket or self._waiting[0])
        images = np.frombuffer(self._map, np.uint8, self._size, slot * self._size)
        if len(self._free) < self.depth - len(self._waiting) or (empty is not None and not self.is_locked):
            copy = (empty or _empty)(self.shape)
            np.copyto(copy, images.reshape(self.shape))
            self._free.append(slot)
            return copy
        weakref.finalize(images, self._free.append, slot).atexit = False
        return images.reshape(self.shape)

    def _taken(self, ticket: Ticket) -> int:
        self._wait(ticket)
        if ticket.error is not None:
            raise ticket.error
        return ticket.slot

    def _wait(self, ticket: Ticket) -> None:
        self._waiting.remove(ticket)
        while not ticket.is_done:
            self._receive(ticket.child)

    def _receive(self, child: int) -> None:
        """One answer of a process: to what it was sent first."""
        connection, process = self._children[child]
        try:
            # End of file alone is not relied on: a process that something else forked may hold the other end.
            while not connection.poll(_LOOK_EVERY_S):
                if process.poll() is not None and not connection.poll(0):
                    raise EOFError
            error = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            raise self._is_gone(child) from None
        answered = self._sent[child].popleft()
        answered.is_done, answered.error = True, error

    def drain(self, tickets: Collection[Ticket] | None = None) -> None:
        """Waits for these batches, or all that were put in, and forgets them."""
        for ticket in list(self._waiting if tickets is None else tickets):
            self._wait(ticket)
            self._free.append(ticket.slot)

    def close(self) -> None:
        """Ends the processes."""
        self._end()

    def _is_gone(self, child: int) -> DecodeProcessError:
        process = self._children[child][1]
        try:
            code = process.wait(timeout=_LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            code = None
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        return DecodeProcessError(
            f"decoding process {process.pid} {how} in the middle of its work; where memory ran out (SIGKILL), use "
            "fewer loader workers or a smaller micro-batch, then run again: the loader goes on from its state"
        )


def main() -> None:
    """What a decoding process runs: `python -c _START SYS_PATH CONNECTION MEMORY PARENT`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    connection, memory, parent = Connection(int(sys.argv[2])), int(sys.argv[3]), int(sys.argv[4])
    try:
        reader, shape = pickle.loads(connection.recv_bytes())
        slots = np.frombuffer(mmap.mmap(memory, 0), np.uint8).reshape(-1, *shape)
        while True:
            while not connection.poll(_LOOK_EVERY_S):
                if os.getppid() != parent:
                    return
            slot, coded = pickle.loads(connection.recv_bytes())
            connection.send_bytes(_decoded(reader, coded, slots[slot]))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        return


def _decoded(reader: Any, coded: Coded, slot: np.ndarray) -> bytes:
    """Fills the slot; the error that ended it, pickled, or None."""
    try:
        decode_into(slot, coded, reader.read_many)
        return pickle.dumps(None)
    except Exception as error:  # it is raised again, as what it is, where the batch is asked for
        error.add_note("in a decoding process:\n" + traceback.format_exc())
        try:
            return pickle.dumps(pickle.loads(pickle.dumps(error)))
        except Exception:
            return pickle.dumps(DecodeProcessError(f"{type(error).__name__}: {error} (in a decoding process)"))


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.uint8)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("medmamba-batches")
    with tempfile.TemporaryFile() as file:  # not Linux: an unlinked file
        return os.dup(file.fileno())


def _start(memory: int) -> tuple[Connection, subprocess.Popen]:
    ours, theirs = Pipe()
    with theirs:
        numbers = [str(number) for number in (theirs.fileno(), memory, os.getpid())]
        process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path), *numbers],
            pass_fds=(theirs.fileno(), memory),
            stdin=subprocess.DEVNULL,
            env={**_KEEP_MEMORY, **os.environ},
        )
    return ours, process


def _end(
    owner: int,
    children: list[tuple[Connection, subprocess.Popen]],
    memory: int,
    unlock: Callable[[], None] | None,
) -> None:
    if os.getpid() != owner:  # a copy of this process made by fork
        return
    for connection, process in children:
        connection.close()
        process.kill()  # it holds nothing that could be left half done: see local_shard and pixel_file
    for _, process in children:
        process.wait()
    if unlock is not None:
        unlock()
    os.close(memory)
