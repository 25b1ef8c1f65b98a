"""Downloads published files: resumed where they stopped, checked, and put in place only when they are complete.

The standard library's urllib is enough: one connection, and it knows the proxies of the environment. During a download
`<name>.part` holds the bytes and `<name>.part.json` what the server called them; an interrupted download resumes there.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import random
import shutil
import ssl
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from data_shards.catalog.cards import PublishedFile
from data_shards.catalog.part_file import FetchError, PartFile, opened_part

_CHUNK_BYTES = 1 << 18
# Too many requests, and what servers and proxies answer while something restarts.
_PASSING = (408, 425, 429, 500, 502, 503, 504)
# What reading from a connection raises; ssl's errors are OSErrors too.
_CONNECTION_FAULTS = (OSError, http.client.HTTPException, EOFError)

Say = Callable[[str], None]
Progress = Callable[[int, int], None]


class _Broken(Exception):  # noqa: N818 - it may pass
    """An attempt that failed in a way that may pass; `wait_s` is how long the server asks to wait."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Patience:
    """How long a download waits for a server."""

    timeout_s: float = 30
    """A connection that sends no byte for so long is closed."""
    attempts: int = 6
    """Failures in a row without a new byte, after which it is an error."""
    first_wait_s: float = 1
    """Doubles with each failure."""
    longest_wait_s: float = 300
    """Where a server asks for more, the user has to try again."""
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Verdict:
    """The result of checking a file on disk. `checked` is the strongest fact that the catalog has about it."""

    path: Path
    size_bytes: int
    checked: Literal["sha256", "md5", "size", "nothing"]
    digest: str
    """In hex: the checked kind, or MD5 where none is known."""
    fault: str
    """How it differs from the published file; empty: no difference is known."""
    state: Literal["fetched", "already there"] = "already there"


def verify(file: PublishedFile, path: Path) -> Verdict:
    """Compares a file on disk with the published one."""
    size = path.stat().st_size
    kind: Literal["sha256", "md5"] = "sha256" if file.sha256 else "md5"
    with path.open("rb") as data:
        digest = hashlib.file_digest(data, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
    expected = file.sha256 or file.md5
    fault = ""
    if file.size_bytes and size != file.size_bytes:
        fault = f"{size:,} bytes long, but {file.size_bytes:,} were published"
    elif expected and digest != expected:
        fault = f"its {kind.upper()} is {digest}, but {expected} was published"
    else:
        fault = _unsound(path, path.name)
    return Verdict(path, size, kind if expected else "size" if file.size_bytes else "nothing", digest, fault)


def fetch(
    file: PublishedFile,
    target: Path,
    *,
    say: Say = lambda text: None,
    progress: Progress = lambda done, total: None,
    patience: Patience | None = None,
) -> Verdict:
    """Downloads a published file to `target`, unless it is there.

    Args:
        file: Where to get it from, and what is known of it.
        target: Where to. A file that is there already is checked and left as it is.
        say: Called with a line for each thing that happens.
        progress: Called with the bytes downloaded and the bytes of the complete file, 0 if unknown.
        patience: How long to wait for the server.

    Raises:
        FetchError: the file does not exist, the server does not send it, the disk is full, or the download is not the
            published file and was quarantined as `<name>.wrong`.
    """
    patience = patience or Patience()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            part = None if target.exists() else stack.enter_context(opened_part(target, file.url))
            if part is None:
                return _already_there(file, target)
            _download(file, part, say, progress, patience)
            verdict = verify(file, part.path)
            fault = verdict.fault or _unsound(part.path, target.name)
            if fault:
                wrong = part.quarantine()
                raise FetchError(
                    f"{file.url} gave another file than the published {target.name}: {fault}; it is "
                    f"quarantined as {wrong}. Fetch it again; if the result is the same, the publisher has replaced it"
                )
            part.finish()
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise FetchError(
            f"cannot write {target}: {error.strerror or error}{where}; name a folder that you may write to with --to"
        ) from error
    return Verdict(target, verdict.size_bytes, verdict.checked, verdict.digest, "", "fetched")


def check_room(wanted: Mapping[str, PublishedFile], folder: Path) -> None:
    """FetchError where the rest of the files of known size does not fit on the folder's disk."""
    known = sum(file.size_bytes for file in wanted.values())
    there = sum(
        path.stat().st_size
        for name, file in wanted.items()
        for path in (folder / name, folder / f"{name}.part")
        if file.size_bytes and path.is_file()
    )
    # The folder is made later; its disk is that of the nearest folder that exists.
    _check_room(next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir()), known - there)


def _already_there(file: PublishedFile, target: Path) -> Verdict:
    verdict = verify(file, target)
    if verdict.fault:
        raise FetchError(
            f"{target} is there and is not the published file ({verdict.fault}): move it away, or fetch to another "
            "folder with --to"
        )
    return verdict


def _download(file: PublishedFile, part: PartFile, say: Say, progress: Progress, patience: Patience) -> None:
    """Tries until the part is complete; any number of times while new bytes arrive."""
    failures, most = 0, part.size
    while not _is_complete(file, part):
        try:
            _attempt(file, part, say, progress, patience)
            return
        except _Broken as error:
            failures = 0 if part.size > most else failures + 1
            most = max(most, part.size)
            if failures >= patience.attempts:
                raise FetchError(
                    f"{file.url} failed {failures} times in a row, at last with: {error}; the downloaded "
                    "part is kept, so give the same command again later"
                ) from error
            wait_s = patience.first_wait_s * 2 ** max(failures - 1, 0) * random.uniform(0.5, 1)
            wait_s = max(wait_s, error.wait_s or 0)
            if wait_s > patience.longest_wait_s:
                raise FetchError(
                    f"{file.url} asks to come back in {wait_s:.0f} s ({error}): give the same command then; the "
                    "downloaded part is kept"
                ) from error
            say(f"{error} at {part.size:,} bytes; again in {wait_s:.0f} s")
            patience.sleep(wait_s)


def _is_complete(file: PublishedFile, part: PartFile) -> bool:
    """Whether a download that was killed had all bytes but had not put them in place."""
    total = part.notes.get("total") or file.size_bytes
    return bool(total) and part.size == total and _resumes(file, part)


def _resumes(file: PublishedFile, part: PartFile) -> bool:
    """Whether the part's bytes must be those of the file, or will be compared with it."""
    return bool(part.size and (part.notes.get("validator") or file.sha256 or file.md5))


def _attempt(file: PublishedFile, part: PartFile, say: Say, progress: Progress, patience: Patience) -> None:
    """One request, for the rest."""
    have = part.size
    headers = {"User-Agent": "medmamba", "Accept-Encoding": "identity"}
    if _resumes(file, part):
        headers["Range"] = f"bytes={have}-"
        if part.notes.get("validator"):
            headers["If-Range"] = part.notes["validator"]
    with _answer(file, headers, part, patience) as response:
        _check_kind(file, response)
        start, total = _extent(response)
        validator = _validator(response.headers)
        if start and (start != have or _differs(part.notes, validator=validator, total=total)):
            # A server that reads Range but not If-Range.
            part.begin({})
            raise _Broken("the file has changed on the server: from the beginning")
        total = total or (part.notes.get("total", 0) if start else 0)  # a partial answer may not say it
        _check_size(file, total)
        _check_room(part.path.parent, (total or file.size_bytes) - start)
        if start == 0:
            if have:
                say("the server sends the file from the beginning: it has changed, or the server has no ranges")
            part.begin({"url": file.url, "validator": validator, "total": total})
        else:
            say(f"resumes at {start:,} bytes")
        for data in _body(response):
            part.write(data)
            progress(part.size, total)
        # The library returns what it has when a connection closes early, without an error.
        if total and part.size != total:
            raise _Broken("the connection was closed early")


def _body(response: Any) -> Iterator[bytes]:
    while True:
        try:
            data = response.read1(_CHUNK_BYTES)
        except _CONNECTION_FAULTS as error:
            raise _lost(error) from error
        if not data:
            return
        yield data


def _lost(error: BaseException) -> _Broken:
    late = isinstance(error, TimeoutError)
    return _Broken("no byte arrived in time" if late else f"the connection broke ({_short(error)})")


def _answer(file: PublishedFile, headers: dict[str, str], part: PartFile, patience: Patience) -> Any:
    """The open response. FetchError where the server refuses, _Broken where trying again may help."""
    opener = urllib.request.build_opener(_StaysSecure)
    try:
        return opener.open(urllib.request.Request(file.url, headers=headers), timeout=patience.timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing is left: the part is of another file, or too long
            part.begin({})
            raise _Broken("the file has changed on the server: from the beginning") from error
        if error.code in _PASSING:
            raise _Broken(f"the server answers {error.code} {error.reason}", _retry_after(error.headers)) from error
        raise FetchError(
            f"{file.url} is refused with {error.code} {error.reason}: the publisher may have moved it, so look at the "
            "dataset's page (`medmamba datasets NAME`), get the file there and put it into the folder by hand"
        ) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise FetchError(
                f"{urlsplit(file.url).hostname} has a certificate that is not trusted here "
                f"({error.reason.verify_message}): name a file with its issuer in SSL_CERT_FILE, or get {file.url} by "
                "other means and put it into the folder"
            ) from error
        raise _Broken(f"{urlsplit(file.url).hostname} cannot be reached ({_short(error.reason)})") from error
    except _CONNECTION_FAULTS as error:
        raise _lost(error) from error


class _StaysSecure(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to anything else."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The request to follow; FetchError where it would not be encrypted any more."""
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise FetchError(
                f"{req.full_url} redirects to {newurl}, where anybody on the way could change the file: get it by "
                "other means and put it into the folder"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_kind(file: PublishedFile, response: Any) -> None:
    kind = response.headers.get_content_type()
    if kind == "text/html":
        raise FetchError(
            f"{file.url} is a web page, not the file (a login, a notice, or another address now): open it in a "
            "browser, get the file there and put it into the folder by hand"
        )
    coding = response.headers.get("Content-Encoding", "identity")
    if coding.lower() not in ("", "identity"):
        raise FetchError(
            f"{file.url} is sent with the encoding {coding}, which was not asked for: get it by other means "
            "and put it into the folder"
        )


def _extent(response: Any) -> tuple[int, int]:
    """Where the answer begins in the file, and the size of the file, 0 if the server does not say."""
    if response.status == 206:
        unit, _, place = response.headers.get("Content-Range", "").strip().partition(" ")
        extent, _, total = place.partition("/")
        start = extent.partition("-")[0]
        if unit != "bytes" or not start.isdecimal():
            raise _Broken("the server sends a part of the file and does not say which")
        return int(start), int(total) if total.isdecimal() else 0
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else 0


def _validator(headers: Any) -> str:
    """What identifies these bytes: a strong ETag, else the date of the last change, else nothing."""
    etag = headers.get("ETag", "")
    return str(etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", ""))


def _differs(notes: Mapping[str, Any], **now: Any) -> bool:
    """Whether something that was known about the file before has another value now."""
    return any(value and notes.get(name) and value != notes[name] for name, value in now.items())


def _check_size(file: PublishedFile, total: int) -> None:
    if file.size_bytes and total and total != file.size_bytes:
        raise FetchError(
            f"{file.url} offers {total:,} bytes, but {file.size_bytes:,} were published: the publisher has replaced "
            "the file, or a proxy has; get it by other means and put it into the folder"
        )


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FetchError(
            f"{folder} has {free:,} bytes free, but {needed:,} are needed: free some, or name another folder with --to"
        )


def _retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait: a number, or a date."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _unsound(path: Path, name: str) -> str:
    """Why the file cannot be what its name says; checks only that an archive has an end."""
    if name.lower().endswith((".zip", ".npz", ".xlsx")) and not zipfile.is_zipfile(path):
        return "it is not a complete zip archive"
    return ""


def _short(error: object) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
