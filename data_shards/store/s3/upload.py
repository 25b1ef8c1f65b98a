"""A large object sent to S3 in parts, and the ETags of objects.

boto3's own transfer of files in parts cannot be told to write only where nothing is.
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

MULTIPART_BYTES = 64 << 20  # larger objects go in parts
_PART_BYTES = 16 << 20  # one part is in memory at a time
_MOST_PARTS = 10_000  # S3's limit


class Parts:
    """An upload in parts; nobody sees it before `complete`."""

    def __init__(self, place: dict[str, str], upload_id: str):
        self._upload = {**place, "UploadId": upload_id}
        self._sent: list[dict[str, Any]] = []

    def send(self, data: bytes | Path, tries: Callable[[], Tries]) -> None:
        """Sends all parts, each tried again on its own."""
        for number, part in enumerate(pieces(data, part_bytes(size_of(data))), 1):
            self._sent.append({"PartNumber": number, "ETag": self._send(number, part, tries())})

    def complete(self, client: Any, **condition: str) -> None:
        """Puts the parts together: the object is there."""
        client.complete_multipart_upload(**self._upload, MultipartUpload={"Parts": self._sent}, **condition)

    def abort(self, client: Any) -> None:
        """Throws the parts away, if they are still there."""
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
                # Twice the same for the same bytes: then it is the server's own idea of an ETag.
                if found in ("", md5.hexdigest(), seen):
                    return answer["ETag"]
                seen = found
                raise DamagedError(f"part {number} has the MD5 {md5.hexdigest()}, but the server stored {found}")
            except failures() as error:
                tries.failed(error)


def size_of(data: bytes | Path) -> int:
    """In bytes."""
    return data.stat().st_size if isinstance(data, Path) else len(data)


def part_bytes(size_bytes: int) -> int:
    """The size of the parts of an object that goes in parts."""
    return max(_PART_BYTES, -(-size_bytes // _MOST_PARTS))


def pieces(data: bytes | Path, piece_bytes: int) -> Iterator[bytes]:
    """The data cut into pieces, one in memory at a time."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            while piece := file.read(piece_bytes):
                yield piece
    else:
        for start in range(0, len(data), piece_bytes):
            yield data[start : start + piece_bytes]


def comparable_etag(answer: dict[str, Any]) -> str:
    """The ETag of an answer as 32 hex digits, with "-N" for N parts; "" where it says nothing about the bytes."""
    if "kms" in answer.get("ServerSideEncryption", "") or "SSECustomerAlgorithm" in answer:
        return ""
    etag = answer.get("ETag", "").strip('"').lower()
    return etag if re.fullmatch(r"[0-9a-f]{32}(-\d+)?", etag) else ""


def etag_of(data: bytes | Path, *, like: str) -> str:
    """The ETag of these bytes, made as `like` was: their MD5, or the MD5 of the MD5s of our parts; "" if otherwise."""
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
