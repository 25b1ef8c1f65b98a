"""Reads an S3 object or a range of it: resumes interrupted reads and verifies the bytes."""

from __future__ import annotations

import contextlib
import logging
import re
from typing import Any

from botocore.exceptions import ClientError, FlexibleChecksumError

from data_shards.store.s3.errors import DamagedError, ReplacedError, code_of
from data_shards.store.s3.upload import comparable_etag, etag_of
from data_shards.store.store import StoreError

# Received data is kept in pieces of this size, so at most one piece is requested again after an interruption.
_PIECE_BYTES = 64 << 10
_log = logging.getLogger(__name__)


class Reading:
    """The bytes [start, start + length) of the object at `place`; with `etag`, only of that version."""

    def __init__(self, place: dict[str, str], start: int = 0, length: int | None = None, *, etag: str = ""):
        self.total = 0  # bytes of the complete object, once the server has answered
        self.etag, self._only = etag, etag
        self.tag = ""  # the ETag, if it depends on the bytes
        self._place, self._start, self._length = place, start, length
        self._pieces: list[bytes] = []
        self._received, self._end = 0, 0
        self._seen = ""

    def resume(self, client: Any) -> bytes:
        """Requests the missing bytes; returns all bytes once they have arrived, fewer at the end of the object.

        Raises:
            ReplacedError: `etag` was given, and the object has been replaced.
            Exception: the read was interrupted or damaged; call `resume` again.
        """

        if self._received and self._start + self._received == self._end:
            self._restart()  # nothing is missing, so the final check failed
        at = self._start + self._received
        is_range = at > 0 or self._length is not None
        ask = {"IfMatch": self.etag} if self.etag else {}
        if is_range:
            ask["Range"] = f"bytes={at}-{'' if self._length is None else self._start + self._length - 1}"
        try:
            answer = client.get_object(**self._place, **ask)
            with contextlib.closing(answer["Body"]) as body:
                self._end = self._end_of(answer, at, is_range)
                while piece := body.read(_PIECE_BYTES):
                    self._pieces.append(piece)
                    self._received += len(piece)
        except FlexibleChecksumError:
            self._restart()
            raise
        except ClientError as error:
            if code_of(error) == "InvalidRange" and not self.etag:  # beyond the end, like a file
                return b""
            if code_of(error) in ("InvalidRange", "PreconditionFailed", "412"):
                raise self._replaced() from error
            raise
        if self._start + self._received != self._end:
            arrived = f"{self._received} of {self._end - self._start} bytes arrived"
            if not is_range or self._start + self._received > self._end:
                self._restart()
            raise DamagedError(arrived)
        data = b"".join(self._pieces)
        if len(data) == self.total:
            self._check(data)
        return data

    def _end_of(self, answer: dict[str, Any], at: int, is_range: bool) -> int:
        """End of the requested bytes in the object; raises if the answer has other bytes."""
        etag = answer.get("ETag", "")
        if self.etag and etag != self.etag:  # the server ignores If-Match
            raise self._replaced()
        self.etag, self.tag = etag, comparable_etag(answer)
        if not is_range:
            self.total = answer["ContentLength"]
            return self.total
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange", ""))
        if found is None or int(found[1]) != at:
            raise StoreError(
                f"the server was asked for {self._place['Key']} from byte {at}, but answered with "
                f"{answer.get('ContentRange', 'all of it')}; use an S3 server that supports Range"
            )
        self.total = int(found[3])
        return self.total if self._length is None else min(self._start + self._length, self.total)

    def _check(self, data: bytes) -> None:
        """Compares a complete object with its ETag. If two reads agree with each other, the ETag is not an MD5."""
        found, wanted = etag_of(data, like=self.tag), self.tag
        if found in (wanted, ""):
            return
        if found == self._seen:
            _log.info("%s has the ETag %s, but its bytes give %s", self._place["Key"], wanted, found)
            return
        self._restart()
        self._seen = found
        raise DamagedError(f"its bytes give the ETag {found}, but it has {wanted}")

    def _replaced(self) -> Exception:
        self._restart()
        return ReplacedError("it was replaced while it was read") if self._only else DamagedError("it was replaced")

    def _restart(self) -> None:
        self._pieces, self._received, self.etag = [], 0, self._only
