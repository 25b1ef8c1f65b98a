"""Objects as files below a folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from data_shards.store.disk import full_disk, says_full, size_text
from data_shards.store.store import (
    UNFINISHED,
    Store,
    StoreError,
    StoreFullError,
    StoreKeyError,
    StorePathError,
    checked_key,
)


class FileStore(Store):
    """Objects as files below a folder."""

    is_local = True
    conditional = True

    def __init__(self, folder: Path):
        self.folder = folder
        self.uri = str(folder)

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False) -> bool:
        """See Store. Written to a temporary file, synced, then renamed: readers never see a partial file."""
        target = self.folder / checked_key(key)
        temporary = target.with_name(f"{UNFINISHED}{secrets.token_hex(8)}")
        with self._errors(f"cannot write {key}", data=data):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as file:
                    if isinstance(data, Path):
                        with data.open("rb") as source:
                            shutil.copyfileobj(source, file, 1 << 20)
                    else:
                        file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if not if_absent:
                    os.replace(temporary, target)
                    return True
                try:
                    os.link(temporary, target)
                except FileExistsError:
                    return False
                return True
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        with self._errors(f"cannot read {key}", key=key), (self.folder / checked_key(key)).open("rb") as file:
            file.seek(start)
            return file.read() if length is None else file.read(length)

    def fetch(self, key: str, path: Path) -> None:
        source = self.folder / checked_key(key)
        with self._errors(f"cannot read {key}", key=key), source.open("rb") as file, path.open("wb") as out:
            shutil.copyfileobj(file, out, 1 << 20)

    def head(self, key: str) -> int | None:
        path = self.folder / checked_key(key)
        with self._errors(f"cannot read {key}"):
            return path.stat().st_size if path.is_file() else None

    def tag(self, key: str) -> str:
        with self._errors(f"cannot read {key}", key=key):
            stat = (self.folder / checked_key(key)).stat()
            return f"{stat.st_size}-{stat.st_mtime_ns}"

    def age_s(self, key: str) -> float:
        with self._errors(f"cannot read {key}", key=key):
            return time.time() - (self.folder / checked_key(key)).stat().st_mtime

    def list(self, prefix: str = "") -> Iterator[str]:
        # Only the folder of the prefix can have matching keys.
        top = self.folder / prefix.rpartition("/")[0]
        with self._errors("cannot list"):
            keys = [
                (Path(folder) / name).relative_to(self.folder).as_posix()
                for folder, _, names in os.walk(top)
                for name in names
                if not name.startswith(UNFINISHED)
            ]
        yield from sorted(key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        with self._errors(f"cannot delete {key}"):
            (self.folder / checked_key(key)).unlink(missing_ok=True)

    def clean(self, *, older_than_s: float) -> tuple[str, ...]:
        """See Store; returns names of the removed files, because their keys are unknown."""
        old = []
        with self._errors("cannot clean"):
            for folder, _, names in os.walk(self.folder):
                for path in (Path(folder) / name for name in names if name.startswith(UNFINISHED)):
                    with contextlib.suppress(FileNotFoundError):  # its writer has just finished
                        if time.time() - path.stat().st_mtime >= older_than_s:
                            path.unlink()
                            old.append(path.relative_to(self.folder).as_posix())
        return tuple(sorted(old))

    def path(self, key: str) -> Path:
        return self.folder / checked_key(key)

    def at(self, *parts: str) -> Self:
        return type(self)(self.folder.joinpath(*(checked_key(part) for part in parts)))

    def with_patience(self, total_s: float) -> Self:
        """See Store: returns the same store, because folders have no outages."""
        return self

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.folder,)

    @contextlib.contextmanager
    def _errors(self, doing: str, *, key: str | None = None, data: bytes | Path | None = None) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as error:
            if key is not None:
                raise StoreKeyError(f"{self.uri} has no object {key}") from error
            if isinstance(error, IsADirectoryError):
                raise StorePathError(
                    f"{self.uri}: {doing}: found a folder instead of a file "
                    f"({error.filename2 or error.filename}); move it, or use another store"
                ) from error
            raise StoreError(f"{self.uri}: {doing}: {error}") from error
        except (NotADirectoryError, FileExistsError) as error:
            raise StorePathError(
                f"{self.uri}: {doing}: found a file instead of a folder ({error.filename}); move it, or use another "
                "store"
            ) from error
        except OSError as error:
            if says_full(error):
                raise StoreFullError(self._no_room(doing, data)) from error
            raise StoreError(
                f"{self.uri}: {doing}: {error.strerror or error}; make the folder writable, or use another store"
            ) from error

    def _no_room(self, doing: str, data: bytes | Path | None) -> str:
        size = None if data is None else data.stat().st_size if isinstance(data, Path) else len(data)
        needed = "" if size is None else f"{size_text(size)} needed for this object"
        what = doing.removeprefix("cannot write ")
        return f"{full_disk(self.uri, what, needed)}, or use another store"
