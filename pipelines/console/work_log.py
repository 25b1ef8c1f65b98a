"""Sends what libraries print to a log file, so that the terminal has only the command's own lines."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from data_shards.store.disk import temporary_folder

KEPT = 20  # log files of earlier commands to keep
OURS = ("data_shards", "medmamba", "pipelines")


class WorkLog:
    """The file of one command. `terminal` is the real standard error; `path` is None where no file can be written."""

    def __init__(self, terminal: IO[str], path: Path | None, file: IO[str]) -> None:
        self.terminal, self.path, self._file = terminal, path, file

    def write(self, text: str) -> None:
        """Appends a paragraph, for example a traceback."""
        self._file.write(text.rstrip("\n") + "\n")
        self._file.flush()

    def named(self) -> str:
        """The end of a message for which the file has details: its path, and the host inside a Ray job."""
        host = f" on {socket.gethostname()}" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else ""
        try:
            has_text = self.path is not None and self.path.stat().st_size > 0
        except OSError:  # removed in the meantime: the error must still be reported
            return ""
        return f"\ndetails: {self.path}{host}" if has_text else ""


def log_folder() -> Path:
    """The folder of the log files: in the user's cache, readable only by the user (messages may name their files)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medmamba" / "logs"


@contextlib.contextmanager
def work_log(*, through: bool = False) -> Iterator[WorkLog]:
    """Redirects all output of this process, also of native code, to a new file during the block.

    With `through`, output is not redirected and the file gets only what `WorkLog.write` appends.
    An empty file is removed at the end.
    """
    path, file = _open()
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        stack.callback(_close, path, file)
        if through:
            yield WorkLog(sys.stderr, path, file)
            return
        terminal = _kept_stderr(stack)
        for number in (1, 2):
            _redirect(number, file, stack)
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        yield WorkLog(terminal, path, file)


@contextlib.contextmanager
def own_messages(say: Callable[[str], None]) -> Iterator[None]:
    """Passes what our packages log (notices to the user) to `say` during the block."""
    handler = _Handler(say)
    loggers = [logging.getLogger(name) for name in OURS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _Handler(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


class _Forgiving(io.FileIO):
    """A file that ignores write errors (a full disk): no work fails because its log cannot be written."""

    def write(self, data) -> int:  # type: ignore[override, no-untyped-def]
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _open() -> tuple[Path | None, IO[str]]:
    for folder in (log_folder(), Path(temporary_folder()) / f"medmamba-logs-{os.getuid()}"):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.getuid():
                continue
            _prune(folder)
            path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
            number = os.open(path, os.O_CREAT | os.O_NOFOLLOW | os.O_WRONLY | os.O_APPEND, 0o600)
            return path, _text(number)
    return None, _text(os.open(os.devnull, os.O_WRONLY))


def _text(number: int) -> IO[str]:
    raw = _Forgiving(number, "w")
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="replace", line_buffering=True)


def _prune(folder: Path) -> None:
    for old in sorted(folder.glob("*.log"))[: -KEPT + 1]:
        with contextlib.suppress(OSError):
            if not Path(f"/proc/{old.stem.rpartition('-')[2]}").exists():  # a running command may still write to it
                old.unlink()


def _kept_stderr(stack: contextlib.ExitStack) -> IO[str]:
    """A stream to the current standard error that stays valid when descriptor 2 is redirected."""
    try:
        number = sys.stderr.fileno()
    except (OSError, ValueError):  # not a file (in a test or notebook), so it has no descriptor
        return sys.stderr
    copy = os.fdopen(os.dup(number), "w", encoding=sys.stderr.encoding, errors="replace", buffering=1)
    return stack.enter_context(copy)


def _redirect(number: int, file: IO[str], stack: contextlib.ExitStack) -> None:
    try:
        before = os.dup(number)
    except OSError:  # closed, as a daemon's are
        return

    def restore() -> None:
        os.dup2(before, number)
        os.close(before)

    stack.callback(restore)
    os.dup2(file.fileno(), number)


def _close(path: Path | None, file: IO[str]) -> None:
    with contextlib.suppress(OSError):
        file.close()
        if path is not None and path.stat().st_size == 0:
            path.unlink()
