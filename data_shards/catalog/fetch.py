"""Published files to a folder: gone on with where they broke off, checked, and put in place only when they are whole.

The standard library's urllib is enough: one connection, and it knows the proxies of the environment. While a file
comes, `<name>.part` holds its bytes and `<name>.part.json` what the server called them; a killed fetch goes on there.
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
# Too many requests, and what servers and the proxies before them answer while something restarts.
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
    """How long a fetch bears with a server."""

    timeout_s: float = 30
    """A connection that gives no byte for so long is given up."""
    attempts: int = 6
    """Failures in a row without a new byte, after which it is an error."""
    first_wait_s: float = 1
    """Doubles with each failure."""
    longest_wait_s: float = 300
    """A server that asks for more is come back to by hand."""
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Verdict:
    """What was found out about a file on disk. `checked` is the strongest thing that the catalogue knows of it."""

    path: Path
    size_bytes: int
    checked: Literal["sha256", "md5", "size", "nothing"]
    digest: str
    """In hex: the checked kind, or MD5 where none is known."""
    fault: str
    """How it differs from the published file; empty: in nothing that is known."""
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
    """Brings a published file to `target`, unless it is there.

    Args:
        file: Where to get it from, and what is known of it.
        target: Where to. A file that is there already is checked and left as it is.
        say: Told of what happens, a line each.
        progress: Called with the bytes that are here and the bytes of the whole, 0 if unknown.
        patience: How long to bear with the server.

    Raises:
        FetchError: there is no such file, the server does not give it, the disk has no room, or what came is not the
            published file, which is then set aside as `<name>.wrong`.
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
                aside = part.set_aside()
                raise FetchError(
                    f"{file.url} gave another file than the published {target.name}: {fault}; it is set aside as "
                    f"{aside}. Fetch it again; if that gives the same, the publisher has replaced it"
                )
            part.finish()
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise FetchError(
            f"cannot write {target}: {error.strerror or error}{where}; name a folder that you may write to with --to"
        ) from error
    return Verdict(target, verdict.size_bytes, verdict.checked, verdict.digest, "", "fetched")


def check_room(wanted: Mapping[str, PublishedFile], folder: Path) -> None:
    """FetchError where the files of known size, less what of them is there, do not fit on the folder's disk."""
    known = sum(file.size_bytes for file in wanted.values())
    there = sum(
        path.stat().st_size
        for name, file in wanted.items()
        for path in (folder / name, folder / f"{name}.part")
        if file.size_bytes and path.is_file()
    )
    # The folder is made later; its disk is that of the nearest one that is there.
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
    """Attempts until the part is whole; those that bring new bytes may be any number."""
    failures, most = 0, part.size
    while not _whole(file, part):
        try:
            _attempt(file, part, say, progress, patience)
            return
        except _Broken as error:
            failures = 0 if part.size > most else failures + 1
            most = max(most, part.size)
            if failures >= patience.attempts:
                raise FetchError(
                    f"{file.url} failed {failures} times in a row, at last with: {error}; what has come is kept, so "
                    "give the same command again later"
                ) from error
            wait_s = patience.first_wait_s * 2 ** max(failures - 1, 0) * random.uniform(0.5, 1)
            wait_s = max(wait_s, error.wait_s or 0)
            if wait_s > patience.longest_wait_s:
                raise FetchError(
                    f"{file.url} asks to come back in {wait_s:.0f} s ({error}): give the same command then, what has "
                    "come is kept"
                ) from error
            say(f"{error} at {part.size:,} bytes; again in {wait_s:.0f} s")
            patience.sleep(wait_s)


def _whole(file: PublishedFile, part: PartFile) -> bool:
    """Whether a run that was killed had all bytes, and only not yet put them in place."""
    total = part.notes.get("total") or file.size_bytes
    return bool(total) and part.size == total and _goes_on(file, part)


def _goes_on(file: PublishedFile, part: PartFile) -> bool:
    """Whether the part's bytes can only be, or will be proved to be, those of the file."""
    return bool(part.size and (part.notes.get("validator") or file.sha256 or file.md5))


def _attempt(file: PublishedFile, part: PartFile, say: Say, progress: Progress, patience: Patience) -> None:
    """One request, for what is still to come."""
    have = part.size
    headers = {"User-Agent": "medmamba", "Accept-Encoding": "identity"}
    if _goes_on(file, part):
        headers["Range"] = f"bytes={have}-"
        if part.notes.get("validator"):
            headers["If-Range"] = part.notes["validator"]
    with _answer(file, headers, part, patience) as response:
        _check_kind(file, response)
        start, total = _extent(response, have)
        validator = _validator(response.headers)
        if start and (start != have or _differs(part.notes, validator=validator, total=total)):
            # A server that looks at Range but not at If-Range.
            part.begin({})
            raise _Broken("the file has changed on the server: from the beginning")
        total = total or (part.notes.get("total", 0) if start else 0)  # a part may leave the whole unsaid
        _check_size(file, total)
        _check_room(part.path.parent, (total or file.size_bytes) - start)
        if start == 0:
            if have:
                say("the server sends the file from its beginning again: it has changed, or knows no ranges")
            part.begin({"url": file.url, "validator": validator, "total": total})
        else:
            say(f"goes on at {start:,} bytes")
        for data in _body(response):
            part.write(data)
            progress(part.size, total)
        # The library returns what has come when a connection closes early, and says nothing.
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
    return _Broken("no byte came in time" if late else f"the connection broke ({_short(error)})")


def _answer(file: PublishedFile, headers: dict[str, str], part: PartFile, patience: Patience) -> Any:
    """The open response. FetchError where the server means it, _Broken where it may pass."""
    opener = urllib.request.build_opener(_StaysSecure)
    try:
        return opener.open(urllib.request.Request(file.url, headers=headers), timeout=patience.timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing beyond what is here: the part is of another file, or longer than it may be
            part.begin({})
            raise _Broken("the file has changed on the server: from the beginning") from error
        if error.code in _PASSING:
            raise _Broken(f"the server says {error.code} {error.reason}", _retry_after(error.headers)) from error
        raise FetchError(
            f"{file.url} is refused with {error.code} {error.reason}: the publisher may have moved it, so look at the "
            "dataset's page (`medmamba datasets NAME`), get the file there and put it into the folder by hand"
        ) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise FetchError(
                f"{urlsplit(file.url).hostname} shows a certificate that is not trusted here "
                f"({error.reason.verify_message}): name a file with its issuer in SSL_CERT_FILE, or get {file.url} by "
                "other means and put it into the folder"
            ) from error
        raise _Broken(f"{urlsplit(file.url).hostname} cannot be reached ({_short(error.reason)})") from error
    except _CONNECTION_FAULTS as error:
        raise _lost(error) from error


class _StaysSecure(urllib.request.HTTPRedirectHandler):
    """Follows redirections, but none from https to anything else."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise FetchError(
                f"{req.full_url} leads on to {newurl}, where anybody on the way could change the file: get it by other "
                "means and put it into the folder"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_kind(file: PublishedFile, response: Any) -> None:
    kind = response.headers.get_content_type()
    if kind == "text/html":
        raise FetchError(
            f"{file.url} gives a web page, not the file (a login, a notice, or another address now): open it in a "
            "browser, get the file there and put it into the folder by hand"
        )
    coding = response.headers.get("Content-Encoding", "identity")
    if coding.lower() not in ("", "identity"):
        raise FetchError(
            f"{file.url} comes coded as {coding}, though the bytes themselves were asked for: get it by other means "
            "and put it into the folder"
        )


def _extent(response: Any, have: int) -> tuple[int, int]:
    """Where the answer begins in the file, and how long the file is, 0 if the server does not say."""
    if response.status == 206:
        unit, _, place = response.headers.get("Content-Range", "").strip().partition(" ")
        extent, _, total = place.partition("/")
        start = extent.partition("-")[0]
        if unit != "bytes" or not start.isdecimal():
            raise _Broken("the server answers with a part and does not say which")
        return int(start), int(total) if total.isdecimal() else 0
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else 0


def _validator(headers: Any) -> str:
    """What the server calls these very bytes: a strong ETag, else the date of the last change, else nothing."""
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")


def _differs(notes: Mapping[str, Any], **now: Any) -> bool:
    """Whether something that was known of the file before, and is known now, is another."""
    return any(value and notes.get(name) and value != notes[name] for name, value in now.items())


def _check_size(file: PublishedFile, total: int) -> None:
    if file.size_bytes and total and total != file.size_bytes:
        raise FetchError(
            f"{file.url} offers {total:,} bytes, but {file.size_bytes:,} were published: the publisher has replaced "
            "the file, or something stands between; get it by other means and put it into the folder"
        )


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FetchError(
            f"{folder} has {free:,} bytes free, but {needed:,} are still to come: make room, or name another folder "
            "with --to"
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
    """Why the file cannot be what its name says; checks nothing but that an archive has an end."""
    if name.lower().endswith((".zip", ".npz", ".xlsx")) and not zipfile.is_zipfile(path):
        return "it is no whole zip archive"
    return ""


def _short(error: object) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
