"""The checkpoints of one training in the store: `checkpoints/step-0000000123/`, valid once train.json is written.

A folder contains weights.safetensors and model.json (the model), moments.safetensors and usage.json (to resume), and
train.json: the progress and the digests of the other files, protected by a digest of its own. No file can execute
code. Kept are the newest two, those of the best epochs that they name, and the one before each best.
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.store import Store, StoreKeyError
from medmamba.config import MODEL, WEIGHTS
from pipelines.worker.checkpoint.usage import USAGE
from pipelines.worker.state import FIELDS, NewerFormatError, ResumeError, described_bytes, file_digest, read_described

FOLDER = "checkpoints"
STATE, MOMENTS = "train.json", "moments.safetensors"
FILES = (WEIGHTS, MODEL, MOMENTS, USAGE)
OF_MODEL = (WEIGHTS, MODEL)
OF_STEP = (*OF_MODEL, MOMENTS)
KEPT = 2
_NAME = re.compile(rf"{FOLDER}/(step-\d{{10}})/(.+)")


@dataclass(frozen=True)
class Found:
    """A complete checkpoint whose files match their recorded digests."""

    name: str
    described: Mapping[str, Any]
    """The fields of its train.json."""
    files: Mapping[str, Path]
    best: Mapping[str, Path]
    """The files of the best epoch's model; empty before the end of the first epoch."""


class Checkpoints:
    """The checkpoints of the training in the folder `out` of a store.

    `check` is called before each write and raises if another driver has taken over the run.
    """

    def __init__(self, out: Store, *, check: Callable[[], None] = lambda: None) -> None:
        self.out, self._check = out, check
        # Digests of stored files by checkpoint, known from writing or verifying them.
        self._digests: dict[str, dict[str, str]] = {}

    def __repr__(self) -> str:
        return f"Checkpoints({self.out!r})"

    def names(self) -> list[str]:
        """Names of the committed checkpoints, oldest first."""
        return [name for name, files in sorted(self._folders().items()) if STATE in files]

    def newest(self, folder: Path, *, say: Callable[[str], None] = lambda text: None) -> Found | None:
        """The newest complete checkpoint, or None if none was written. Fetches files of a remote store into `folder`.

        Damaged checkpoints are skipped with a line to `say`. Raises ResumeError if all are damaged, NewerFormatError
        if a later version wrote one.
        """
        names = self.names()
        for name in reversed(names):
            try:
                return self._fetch(name, folder)
            except NewerFormatError:
                raise
            except ResumeError as error:
                say(f"checkpoint {name} is damaged ({error}); trying the one before it")
        if names:
            raise ResumeError(
                f"all {len(names)} checkpoints in {self.out.uri}/{FOLDER} are damaged: delete that folder to train "
                "from the beginning, or use another --run NAME"
            )
        return None

    def newest_state(self) -> dict[str, Any] | None:
        """The fields of the newest readable train.json; the checkpoint's other files are not checked."""
        for name in reversed(self.names()):
            with contextlib.suppress(ResumeError):
                return self._read(name)
        return None

    def age_s(self) -> float:
        """Seconds since the newest checkpoint was stored; infinity if there is none."""
        names = self.names()
        return self.out.age_s(f"{FOLDER}/{names[-1]}/{STATE}") if names else math.inf

    def write(self, step: int, files: Mapping[str, Path], described: Mapping[str, Any]) -> None:
        """Stores the checkpoint of `step`: its `files`, then train.json, which makes it valid. Removes older ones.

        `described` are the fields of train.json except digests. Its `best_step` is this step or that of a stored
        checkpoint. Raises StoreError.
        """
        assert set(files) == set(FILES), f"a checkpoint has the files {FILES}, not {sorted(files)}"
        self._check()
        name, best = name_of(step), name_of(described["best_step"])
        self._remove([other for other in self._folders() if other > name])  # damaged ones that `newest` skipped
        digests = {file: file_digest(path) for file, path in files.items()}
        stored = self._digests.get(name, {})
        if all(stored.get(file) == digests[file] for file in OF_STEP):
            digests = stored  # the same step after its validation: only train.json changes
        else:
            self._clear(name)
            self.out.delete(f"{FOLDER}/{name}/{STATE}")  # it must not validate the new files
            for file, path in files.items():
                self.out.put(f"{FOLDER}/{name}/{file}", path)
        of_best = digests if best == name else self._digests.get(best, {})
        self._digests[name] = digests
        digests_of_best = {file: of_best[file] for file in OF_MODEL} if described["best_epoch"] else {}
        data = described_bytes({**described, "digests": digests, "best_digests": digests_of_best})
        self._check()  # again, because uploading the files may take minutes
        self.out.put(f"{FOLDER}/{name}/{STATE}", data)
        self._prune()

    def keep_model(self, step: int, files: Mapping[str, Path]) -> None:
        """Stores only a model, so that later checkpoints can name it as their best."""
        self._check()
        for file in OF_MODEL:
            self.out.put(f"{FOLDER}/{name_of(step)}/{file}", files[file])
        self._digests[name_of(step)] = {file: file_digest(files[file]) for file in OF_MODEL}

    def _folders(self) -> dict[str, list[str]]:
        """Name of each checkpoint -> names of its files."""
        folders: dict[str, list[str]] = {}
        for key in self.out.list(f"{FOLDER}/"):
            if found := _NAME.fullmatch(key):
                folders.setdefault(found[1], []).append(found[2])
        return folders

    def _read(self, name: str) -> dict[str, Any]:
        try:
            described = read_described(self.out.get(f"{FOLDER}/{name}/{STATE}"))
        except StoreKeyError as error:
            raise ResumeError(f"{STATE} is missing") from error
        missing = FIELDS - described.keys()
        if missing or set(described["digests"]) != set(FILES):
            what = ", ".join(sorted(missing)) or "the digests of all its files"
            raise ResumeError(f"{STATE} lacks {what}")
        if name_of(described["step"]) != name:
            raise ResumeError(f"{STATE} belongs to step {described['step']}")
        return described

    def _fetch(self, name: str, folder: Path) -> Found:
        described = self._read(name)
        files = {file: self._file(name, file, digest, folder) for file, digest in described["digests"].items()}
        best = name_of(described["best_step"])
        of_best = {file: self._file(best, file, digest, folder) for file, digest in described["best_digests"].items()}
        self._digests[name] = described["digests"]
        self._digests.setdefault(best, described["best_digests"])
        return Found(name, described, files, of_best)

    def _file(self, name: str, file: str, digest: str, folder: Path) -> Path:
        """The local path of a file, fetched if needed. Raises ResumeError if it is missing or has another digest."""
        key = f"{FOLDER}/{name}/{file}"
        local = self.out.path(key)
        path = local or folder / name / file
        try:
            if local is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.out.fetch(key, path)
            found = file_digest(path)
        except (StoreKeyError, FileNotFoundError) as error:
            raise ResumeError(f"{file} of {name} is missing") from error
        except OSError as error:
            raise ResumeError(f"{file} of {name} cannot be read ({error.strerror})") from error
        if found != digest:
            raise ResumeError(f"{file} of {name} has digest {found[:12]}, but {digest[:12]} is recorded")
        return path

    def _prune(self) -> None:
        names = self.names()
        newest = names[-KEPT:]
        best = self._best_of(newest)
        # Every later checkpoint depends on the best model; if that is damaged, the one before it still works.
        before = {name for each in best for name in [other for other in names if other < each][-1:]}
        kept = {*newest, *best, *before, *self._best_of(before)}
        self._remove([name for name in self._folders() if name not in kept])

    def _best_of(self, names: Collection[str]) -> set[str]:
        """The checkpoints that these name as their best."""
        found = set()
        for name in names:
            with contextlib.suppress(ResumeError):
                found.add(name_of(self._read(name)["best_step"]))
        return found

    def _remove(self, names: Sequence[str]) -> None:
        folders = self._folders() if names else {}
        for name in names:
            for file in sorted(folders.get(name, ()), key=lambda file: file != STATE):  # train.json first: invalidates
                self.out.delete(f"{FOLDER}/{name}/{file}")
            if (place := self.out.path(f"{FOLDER}/{name}")) is not None:  # a local store keeps empty folders
                shutil.rmtree(place, ignore_errors=True)

    def _clear(self, name: str) -> None:
        """In a local store, removes a file in place of the checkpoint's folder and folders in place of its files."""
        if (place := self.out.path(f"{FOLDER}/{name}")) is None:
            return
        if place.is_file():
            place.unlink()
        for file in (*FILES, STATE):
            if (place / file).is_dir():
                shutil.rmtree(place / file, ignore_errors=True)


def name_of(step: int) -> str:
    """The name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:010d}"
