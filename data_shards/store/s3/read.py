"""An object of S3, or a range of it, as far as it has arrived: goes on where a body broke off, checks what came."""

from __future__ import annotations

import contextlib
import logging
import re
from typing import Any

from data_shards.store.s3.errors import DamagedError, ReplacedError, code_of
from data_shards.store.s3.upload import comparable_etag, etag_of
from data_shards.store.store import StoreError

# What has arrived is kept in such pieces: so much at most is asked for again after a break.
_PIECE_BYTES = 64 << 10
_log = logging.getLogger(__name__)


class Reading:
    """The bytes [start, start + length) of the object at `place`; with `etag` only of that very object."""

    def __init__(self, place: dict[str, str], start: int = 0, length: int | None = None, *, etag: str = ""):
        self.total = 0  # bytes of the whole object, once the server has answered
        self.etag, self._only = etag, etag
        self.tag = ""  # the ETag as far as it tells of the bytes
        self._place, self._start, self._length = place, start, length
        self._pieces: list[bytes] = []
        self._received, self._end = 0, 0
        self._seen = ""

    def go_on(self, client: Any) -> bytes:
        """Asks for what is missing; all the bytes once they are there, fewer where the object ends.

        Raises:
            ReplacedError: `etag` was given, and the object is another one now.
            Exception: it broke off or came damaged; go on with the same reading.
        """
        from botocore.exceptions import ClientError, FlexibleChecksumError

        if self._received and self._start + self._received == self._end:
            self._begin_anew()  # nothing is missing: it failed at the very end
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
            self._begin_anew()
            raise
        except ClientError as error:
            if code_of(error) == "InvalidRange" and not self.etag:  # beyond the end, as with a file
                return b""
            if code_of(error) in ("InvalidRange", "PreconditionFailed", "412"):
                raise self._replaced() from error
            raise
        if self._start + self._received != self._end:
            arrived = f"{self._received} of {self._end - self._start} bytes arrived"
            if not is_range or self._start + self._received > self._end:
                self._begin_anew()
            raise DamagedError(arrived)
        data = b"".join(self._pieces)
        if len(data) == self.total:
            self._check(data)
        return data

    def _end_of(self, answer: dict[str, Any], at: int, is_range: bool) -> int:
        """Where the wanted bytes end in the object; raises where the answer is about others."""
        etag = answer.get("ETag", "")
        if self.etag and etag != self.etag:  # a server that does not heed If-Match
            raise self._replaced()
        self.etag, self.tag = etag, comparable_etag(answer)
        if not is_range:
            self.total = answer["ContentLength"]
            return self.total
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange", ""))
        if found is None or int(found[1]) != at:
            raise StoreError(
                f"the server was asked for {self._place['Key']} from byte {at} on and answered with "
                f"{answer.get('ContentRange', 'all of it')}: use an S3 server that heeds Range"
            )
        self.total = int(found[3])
        return self.total if self._length is None else min(self._start + self._length, self.total)

    def _check(self, data: bytes) -> None:
        """Compares a whole object with its ETag. Two readings that agree are believed: then it is no MD5."""
        found, wanted = etag_of(data, like=self.tag), self.tag
        if found in (wanted, ""):
            return
        if found == self._seen:
            _log.info("%s: its ETag is %s, but its bytes make %s", self._place["Key"], wanted, found)
            return
        self._begin_anew()
        self._seen = found
        raise DamagedError(f"its bytes make the ETag {found}, but it has {wanted}")

    def _replaced(self) -> Exception:
        self._begin_anew()
        return ReplacedError("it was replaced while it was read") if self._only else DamagedError("it was replaced")

    def _begin_anew(self) -> None:
        self._pieces, self._received, self.etag = [], 0, self._only
