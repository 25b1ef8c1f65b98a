"""Objects below a prefix of an S3 bucket, over an unreliable network: with retries, resumed reads and checksums."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import math
import operator
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from data_shards.store.outage import PATIENCE_S, span
from data_shards.store.s3.client import LONGEST_PAUSE_S, SILENCE_S, Tries, connect, store_outage
from data_shards.store.s3.conditional import (
    ONLY_IF_ABSENT,
    heeds_conditions,
    is_conflict,
    is_there,
    is_unknown,
    learn_conditions,
)
from data_shards.store.s3.errors import DamagedError, ReplacedError, code_of, explain, failures
from data_shards.store.s3.read import Reading
from data_shards.store.s3.upload import MULTIPART_BYTES, Parts, comparable_etag, etag_of, size_of
from data_shards.store.store import Store, StoreAwayError, StoreError, StoreKeyError, checked_key

RESUME = "run the same command to resume"
_WINDOW_BYTES = 16 << 20
_MARKERS = {  # arguments for the next page of a listing -> fields of the previous page
    "list_objects_v2": {"ContinuationToken": "NextContinuationToken"},
    "list_multipart_uploads": {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"},
}
_T = TypeVar("_T")


class S3Store(Store):
    """Objects below a prefix of an S3 bucket.

    Time: no attempt begins later than `patience_s` (15 minutes) after the start of its operation or of an outage of the
    server (see `outage`, which also reports it), and an attempt ends after `silence_s` (20 s) without data. So a
    permanent outage is an error after `patience_s` + `silence_s`, for all operations together; expired keys are an
    error after 20 s, wrong ones almost at once. An object of more than 64 MiB is written in parts, and `fetch` reads in
    windows of 16 MiB: each of them is a separate operation.

    Content: every body is compared with its announced length, and a complete object with its ETag, which is its MD5
    unless the bucket encrypts with keys of KMS or of the customer. S3 has no checksum for ranges and listings: callers
    that read ranges need their own digest.

    Conditions: see conditional.py. If a server ignores them at the end of a multipart upload, two writers of one large
    object both succeed, and the later one's remains.
    """

    is_local = False

    def __init__(
        self,
        bucket: str,
        prefix: str,
        *,
        patience_s: float = PATIENCE_S,
        silence_s: float = SILENCE_S,
        left_s: float = math.inf,
    ):
        """`left_s`: for how long from now attempts of all operations may begin."""
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._root = f"{prefix}/" if prefix else ""
        self.patience_s, self.silence_s = patience_s, silence_s
        self._until = time.monotonic() + left_s

    @property
    def conditional(self) -> bool:
        """See Store. Tested with a probe object, once per process and bucket."""
        if self._heeds is None:
            self._learn(self._heeds_conditions())
        return bool(self._heeds)

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False) -> bool:
        """See Store. S3 shows an object only when it is complete."""
        with self._errors(f"cannot write {key}"):
            if if_absent and self._heeds is False:
                if self._head(key) is not None:
                    return False
                if_absent = False  # another writer may still interfere
            if size_of(data) > MULTIPART_BYTES:
                return self._put_in_parts(key, data, if_absent=if_absent)
            return self._put_whole(key, data.read_bytes() if isinstance(data, Path) else data, if_absent=if_absent)

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        with self._errors(f"cannot read {key}", key=key):
            return self._read(Reading(self._place(key), start, length))

    def fetch(self, key: str, path: Path) -> None:
        """See Store. All windows are of the same version; a file that does not match its ETag is fetched again."""
        seen = ""
        with self._errors(f"cannot read {key}", key=key):
            for _ in range(5):
                try:
                    wanted = self._copy(key, path)
                except ReplacedError:
                    continue
                found = etag_of(path, like=wanted)
                if found in ("", wanted, seen):
                    return
                seen = found
        raise StoreError(
            f"{self.uri}: {key} was replaced or damaged five times while it was read; try again when no process writes "
            "it"
        )

    def head(self, key: str) -> int | None:
        answer = self._head(key)
        return None if answer is None else answer["ContentLength"]

    def tag(self, key: str) -> str:
        return str(self._found(key)["ETag"])

    def age_s(self, key: str) -> float:
        answer = self._found(key)
        written: datetime = answer["LastModified"]
        return (_server_time(answer) - written).total_seconds()

    def holds(self, key: str, data: bytes | Path) -> bool:
        """See Store. Compares size and ETag; the bytes are fetched only if the ETag differs."""
        answer = self._head(key)
        if answer is None or answer["ContentLength"] != size_of(data):
            return False
        tag = comparable_etag(answer)
        return (tag != "" and etag_of(data, like=tag) == tag) or super().holds(key, data)

    def list(self, prefix: str = "") -> Iterator[str]:
        return (key for key in self.raw_keys(prefix) if key and not key.endswith("/"))

    def raw_keys(self, prefix: str = "") -> Iterator[str]:
        """Like `list`, with the empty objects that consoles and pyarrow write for folders ("x/", "")."""
        return (key for key, _ in self.raw_tags(prefix))

    def raw_tags(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        """The keys of `raw_keys` with their objects' tags, without extra requests."""
        for page in self._pages("list_objects_v2", prefix):
            for entry in page.get("Contents", ()):
                yield entry["Key"].removeprefix(self._root), entry.get("ETag", "")

    def delete(self, key: str) -> None:
        place = self._place(key)
        with self._errors(f"cannot delete {key}"):
            self._ask(lambda client: client.delete_object(**place))

    def clean(self, *, older_than_s: float) -> tuple[str, ...]:
        """See Store: aborts unfinished multipart uploads, which are invisible but cost money."""
        aborted = []
        for page in self._pages("list_multipart_uploads", ""):
            for upload in page.get("Uploads", ()):
                age_s = (_server_time(page) - upload["Initiated"]).total_seconds()
                if max(0, age_s) >= older_than_s:  # only one of the times is in whole seconds
                    parts = Parts({"Bucket": self.bucket, "Key": upload["Key"]}, upload["UploadId"])
                    with self._errors("cannot abort an upload"):
                        self._ask(parts.abort)
                    aborted.append(upload["Key"].removeprefix(self._root))
        return tuple(sorted(aborted))

    def path(self, key: str) -> None:
        return None

    def at(self, *parts: str) -> Self:
        return self._with(prefix="/".join(filter(None, [self.prefix, *map(checked_key, parts)])))

    def with_patience(self, total_s: float) -> Self:
        """See Store; an attempt also ends after `total_s` without data."""
        return self._with(silence_s=min(total_s, self.silence_s), left_s=min(total_s, self._left_s))

    def __reduce__(self) -> tuple[Callable[[], Self], tuple[()]]:
        return functools.partial(type(self), **self._settings()), ()

    @property
    def client(self) -> Any:
        """This process's boto3 client."""
        with self._errors("cannot connect"):
            return connect(self.silence_s).client

    def _put_whole(self, key: str, body: bytes, *, if_absent: bool) -> bool:
        place, condition = self._place(key), ONLY_IF_ABSENT if if_absent else {}
        checksum = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        tries = self._tries()
        while True:
            try:
                answer = tries.client().put_object(Body=body, ContentMD5=checksum, **place, **condition)
                tries.answered()
                tag = comparable_etag(answer)
                if etag_of(body, like=tag) == tag or self._read(Reading(place)) == body:
                    return True
                # A server that ignores Content-MD5 has stored damaged bytes. Overwrite them, unless another writer has
                # replaced the object since.
                condition = {"IfMatch": answer["ETag"]} if if_absent else {}
                raise DamagedError(f"the server stored other bytes than were sent (ETag {tag})")
            except failures() as error:
                if if_absent and is_there(error):
                    tries.answered()
                    # Our own attempt may have written it if its answer was lost.
                    return tries.unsure and self.holds(key, body)
                if condition and is_unknown(error):
                    self._learn(False)
                    condition = {}
                    continue
                tries.failed(error)

    def _put_in_parts(self, key: str, data: bytes | Path, *, if_absent: bool) -> bool:
        place = self._place(key)
        for _ in range(3):
            if if_absent and self._head(key) is not None:
                return False  # avoids a useless upload
            begun = self._ask(lambda client: client.create_multipart_upload(**place))
            parts, done = Parts(place, begun["UploadId"]), None
            try:
                parts.send(data, self._tries)
                done = self._completed(parts, key, data, if_absent=if_absent)
            finally:
                if not done:
                    with contextlib.suppress(*failures()):
                        parts.abort(self.client)
            if done is not None:
                return done
        raise StoreError(
            f"{self.uri}: cannot write {key}: three times another writer interfered or the server lost its parts; rerun"
        )

    def _completed(self, parts: Parts, key: str, data: bytes | Path, *, if_absent: bool) -> bool | None:
        """True: written; False: another object already exists; None: the server needs all parts again."""
        tries, condition = self._tries(), ONLY_IF_ABSENT if if_absent else {}
        while True:
            try:
                parts.complete(tries.client(), **condition)
                tries.answered()
                return True
            except failures() as error:
                exists, is_lost = is_there(error), code_of(error) in ("NoSuchUpload", "404")
                if (exists or is_lost) and tries.unsure and self.holds(key, data):
                    return True  # an attempt whose answer was lost has completed it
                if exists:
                    return False
                if is_lost or is_conflict(error):
                    return None
                if condition and is_unknown(error):
                    self._learn(False)
                    condition = {}
                    continue
                tries.failed(error)

    def _copy(self, key: str, path: Path) -> str:
        """Fetches window by window; returns the ETag still to verify, or "" if there is none."""
        with path.open("wb") as out:
            reading = Reading(self._place(key), 0, _WINDOW_BYTES)
            while True:
                data = self._read(reading)
                if reading.total and not data:
                    raise ReplacedError("it became shorter while it was read")
                out.write(data)
                if out.tell() >= reading.total:
                    return reading.tag if reading.total > _WINDOW_BYTES else ""  # a single window is already verified
                reading = Reading(self._place(key), out.tell(), _WINDOW_BYTES, etag=reading.etag)

    def _read(self, reading: Reading) -> bytes:
        return self._ask(reading.resume)

    def _head(self, key: str) -> dict[str, Any] | None:
        place = self._place(key)

        def look(client: Any) -> dict[str, Any] | None:
            answer: dict[str, Any]
            try:
                answer = client.head_object(**place)
                return answer
            except failures() as error:
                if code_of(error) in ("404", "NoSuchKey", "NotFound"):
                    return None
                if code_of(error) not in ("400", "403"):
                    raise
            # HEAD has no body with the reason of a refusal. GET gives the reason, or succeeds after a brief failure.
            try:
                answer = client.get_object(**place)
            except failures() as error:
                if code_of(error) == "NoSuchKey":
                    return None
                raise
            answer["Body"].close()
            return answer

        with self._errors(f"cannot read {key}"):
            return self._ask(look)

    def _found(self, key: str) -> dict[str, Any]:
        answer = self._head(key)
        if answer is None:
            raise StoreKeyError(f"{self.uri} has no object {key}")
        return answer

    def _pages(self, operation: str, prefix: str) -> Iterator[dict[str, Any]]:
        """The pages of a listing below our prefix; each has its own attempts."""
        ask = {"Bucket": self.bucket, "Prefix": self._root + prefix}
        while True:
            with self._errors("cannot list"):
                page = self._ask(operator.methodcaller(operation, **ask))
            yield page
            if not page.get("IsTruncated"):
                return
            ask |= {name: page[next_name] for name, next_name in _MARKERS[operation].items()}

    def _ask(self, call: Callable[[Any], _T]) -> _T:
        tries = self._tries()
        while True:
            try:
                found = call(tries.client())
                tries.answered()
                return found
            except failures() as error:
                tries.failed(error)

    def _tries(self) -> Tries:
        until = min(time.monotonic() + self.patience_s, self._until)
        return Tries(self.bucket, until=until, patience_s=self.patience_s, silence_s=self.silence_s)

    @property
    def _heeds(self) -> bool | None:
        """Whether the server supports conditional writes; None if not probed yet."""
        return heeds_conditions(self.client.meta.endpoint_url, self.bucket)

    def _learn(self, heeds: bool) -> None:
        learn_conditions(self.client.meta.endpoint_url, self.bucket, heeds, uri=self.uri)

    def _heeds_conditions(self) -> bool:
        key = f".probe-{secrets.token_hex(8)}"
        self.put(key, secrets.token_bytes(16), if_absent=True)
        try:
            return self._heeds is None and not self.put(key, b"second", if_absent=True)
        finally:
            with contextlib.suppress(StoreError):
                self.delete(key)

    @property
    def _left_s(self) -> float:
        return self._until - time.monotonic()

    def _settings(self) -> dict[str, Any]:
        times = {"patience_s": self.patience_s, "silence_s": self.silence_s, "left_s": self._left_s}
        return {"bucket": self.bucket, "prefix": self.prefix, **times}

    def _with(self, **changes: Any) -> Self:
        return type(self)(**{**self._settings(), **changes})

    def _place(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._root + checked_key(key)}

    @contextlib.contextmanager
    def _errors(self, doing: str, *, key: str | None = None) -> Iterator[None]:
        try:
            yield
        except failures() as error:
            if key is not None and code_of(error) in ("NoSuchKey", "404"):
                raise StoreKeyError(f"{self.uri} has no object {key}") from error
            reason = explain(error, bucket=self.bucket, uri=self.uri)
            away_s = store_outage(self.bucket).away_s
            if math.isinf(self._until) and 0 < self.patience_s - LONGEST_PAUSE_S <= away_s:
                reason += f"; gave up after {span(self.patience_s)} (--placement.patience-s); {RESUME}"
                raise StoreAwayError(f"{self.uri}: {doing}: {reason}") from error
            raise StoreError(f"{self.uri}: {doing}: {reason}") from error


def _server_time(answer: dict[str, Any]) -> datetime:
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(date) if date else datetime.now(UTC)
