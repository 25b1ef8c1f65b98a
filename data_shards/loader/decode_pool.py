"""Processes that decode images into shared memory, independent of this process's GIL and without torch.

They start with a new interpreter and are never forked: this process may have CUDA, Ray and threads. The shared memory
is an anonymous file, passed as a descriptor: a killed process leaves nothing behind, and the size of /dev/shm is not a
limit. A process ends when the connection to its parent closes, even if the parent was killed.
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

PER_PROCESS = 2  # batches in progress: one being filled and one waiting
# Batches that may be in use outside without being copied: two waiting in the loader, one in transfer to the device and
# one in computation make five.
LENT = 6
# Page faults of new memory made decoding a fifth slower, so glibc must not return memory to the system.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from data_shards.loader.decode_pool import main; main()"
)
_LOOK_EVERY_S = 2.0


class DecodeProcessError(ValueError):
    """A decoding process has ended unexpectedly."""


@dataclass(eq=False)
class Ticket:
    """A batch in progress."""

    slot: int
    child: int
    is_done: bool = False
    error: Exception | None = None


class DecodePool:
    """Processes that share a ring of slots with this one.

    Args:
        reader: Reads encoded images (see `decode_into`); pickled for every process.
        processes: Number of processes.
        shape: (B, H, W, C) of a batch.
        lock: Page-locks the ring, so that a GPU can copy from it, and returns a function that undoes it; None if it
            cannot.
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
        self._waiting: list[Ticket] = []  # in order of `put`
        self._sent: list[deque[Ticket]] = [deque() for _ in range(processes)]  # unanswered, by process
        self._put = 0
        self._children = [_start(self._memory) for _ in range(processes)]
        unlock = lock(np.frombuffer(self._map, np.uint8)) if lock is not None else None
        self.is_locked = unlock is not None
        self._end = weakref.finalize(self, _end, os.getpid(), self._children, self._memory, unlock)
        for child, _ in self._children:
            child.send_bytes(pickle.dumps((reader, shape)))

    @property
    def depth(self) -> int:
        """Number of batches that may be in progress."""
        return self.processes * PER_PROCESS

    @property
    def has_room(self) -> bool:
        """Whether `put` may be called now."""
        return len(self._waiting) < self.depth

    def put(self, coded: Coded) -> Ticket:
        """Sends a batch to a process. DecodeProcessError if the process has ended."""
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
        """The batch (B, H, W, C) of this ticket, or the oldest one in progress.

        It is a view of the ring, whose slot is reused once the last view is gone. It is a copy, in an array from
        `empty` if given, when too many batches are in use or `empty` is given and the ring is not locked.
        Raises the error of decoding, or DecodeProcessError if the process has ended.
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
        """Receives one answer of a process, for its oldest unanswered batch."""
        connection, process = self._children[child]
        try:
            # End of file is not enough: a process forked by other code may hold the other end open.
            while not connection.poll(_LOOK_EVERY_S):
                if process.poll() is not None and not connection.poll(0):
                    raise EOFError
            error = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            raise self._is_gone(child) from None
        answered = self._sent[child].popleft()
        answered.is_done, answered.error = True, error

    def drain(self, tickets: Collection[Ticket] | None = None) -> None:
        """Waits for these batches, or all in progress, and discards them."""
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
            f"decoding process {process.pid} {how} unexpectedly; if memory ran out (SIGKILL), use fewer loader workers "
            "or a smaller micro-batch, then rerun: the loader resumes from its state"
        )


def main() -> None:
    """Main function of a decoding process: `python -c _START SYS_PATH CONNECTION MEMORY PARENT`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the group; the parent decides
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
    """Fills the slot; returns None or the error of decoding, pickled."""
    try:
        decode_into(slot, coded, reader.read_many)
        return pickle.dumps(None)
    except Exception as error:  # raised again in the parent when the batch is taken
        error.add_note("in a decoding process:\n" + traceback.format_exc())
        try:
            return pickle.dumps(pickle.loads(pickle.dumps(error)))
        except Exception:  # an error that cannot be pickled is reported by its text
            return pickle.dumps(DecodeProcessError(f"{type(error).__name__}: {error} (in a decoding process)"))


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.uint8)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("medmamba-batches")
    with tempfile.TemporaryFile() as file:  # an unlinked file outside of Linux
        return os.dup(file.fileno())


def _start(memory: int) -> tuple[Connection, subprocess.Popen[bytes]]:
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
    children: list[tuple[Connection, subprocess.Popen[bytes]]],
    memory: int,
    unlock: Callable[[], None] | None,
) -> None:
    if os.getpid() != owner:  # in a fork of this process
        return
    for connection, process in children:
        connection.close()
        process.kill()  # safe at any time: see local_shard and pixel_file
    for _, process in children:
        process.wait()
    if unlock is not None:
        unlock()
    os.close(memory)
