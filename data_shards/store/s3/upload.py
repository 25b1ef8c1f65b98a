"""Multipart uploads to S3, and the ETags of objects.

boto3's multipart transfer does not support writing only if the object is absent.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_shards.store.s3.client import Tries
from data_shards.store.s3.errors import DamagedError, code_of, failures

MULTIPART_BYTES = 64 << 20  # larger objects are uploaded in parts
_PART_BYTES = 16 << 20  # one part at a time is in memory
_MOST_PARTS = 10_000  # S3's limit


class Parts:
    """A multipart upload; the object is not visible before `complete`."""

    def __init__(self, place: dict[str, str], upload_id: str):
        self._upload = {**place, "UploadId": upload_id}
        self._sent: list[dict[str, Any]] = []

    def send(self, data: bytes | Path, tries: Callable[[], Tries]) -> None:
        """Sends all parts; each has its own attempts."""
        for number, part in enumerate(pieces(data, part_bytes(size_of(data))), 1):
            self._sent.append({"PartNumber": number, "ETag": self._send(number, part, tries())})

    def complete(self, client: Any, **condition: str) -> None:
        """Joins the parts, which makes the object visible."""
        client.complete_multipart_upload(**self._upload, MultipartUpload={"Parts": self._sent}, **condition)

    def abort(self, client: Any) -> None:
        """Deletes the parts, if they still exist."""
        try:
            client.abort_multipart_upload(**self._upload)
        except failures() as error:
            if code_of(error) not in ("NoSuchUpload", "404"):
                raise

    def _send(self, number: int, part: bytes, tries: Tries) -> str:
        md5, seen = hashlib.md5(part, usedforsecurity=False), ""
        checksum = base64.b64encode(md5.digest()).decode()
        while True:
            try:
                answer = tries.client().upload_part(**self._upload, PartNumber=number, Body=part, ContentMD5=checksum)
                tries.answered()
                found = comparable_etag(answer)
                # Twice the same for the same bytes: the server computes ETags in its own way.
                if found in ("", md5.hexdigest(), seen):
                    return str(answer["ETag"])
                seen = found
                raise DamagedError(f"part {number} has the MD5 {md5.hexdigest()}, but the server stored {found}")
            except failures() as error:
                tries.failed(error)


def size_of(data: bytes | Path) -> int:
    """Size in bytes."""
    return data.stat().st_size if isinstance(data, Path) else len(data)


def part_bytes(size_bytes: int) -> int:
    """The part size for the multipart upload of an object."""
    return max(_PART_BYTES, -(-size_bytes // _MOST_PARTS))


def pieces(data: bytes | Path, piece_bytes: int) -> Iterator[bytes]:
    """The data in pieces; one at a time is in memory."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            while piece := file.read(piece_bytes):
                yield piece
    else:
        for start in range(0, len(data), piece_bytes):
            yield data[start : start + piece_bytes]


def comparable_etag(answer: dict[str, Any]) -> str:
    """The ETag of an answer as 32 hex digits, with "-N" for N parts; "" if it does not depend on the bytes."""
    if "kms" in answer.get("ServerSideEncryption", "") or "SSECustomerAlgorithm" in answer:
        return ""
    etag = answer.get("ETag", "").strip('"').lower()
    return etag if re.fullmatch(r"[0-9a-f]{32}(-\d+)?", etag) else ""


def etag_of(data: bytes | Path, *, like: str) -> str:
    """The ETag of these bytes in the form of `like`: their MD5, or the MD5 of our parts' MD5s; "" for other forms."""
    digest, _, number = like.partition("-")
    if not digest:
        return ""
    size = size_of(data)
    if not number:
        md5 = hashlib.md5(usedforsecurity=False)
        for piece in pieces(data, _PART_BYTES):
            md5.update(piece)
        return md5.hexdigest()
    if int(number) != -(-size // part_bytes(size)):
        return ""
    md5s = [hashlib.md5(part, usedforsecurity=False).digest() for part in pieces(data, part_bytes(size))]
    return f"{hashlib.md5(b''.join(md5s), usedforsecurity=False).hexdigest()}-{len(md5s)}"
