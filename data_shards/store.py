"""One seam to a folder and to S3: objects by key, whole or by range, never half-written.

Keys are '/'-separated and relative to the store's uri. A store is picklable by its uri; credentials and endpoint
come from the standard AWS variables and files of the process that uses it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    import pyarrow.fs

# Files of an unfinished write; no key may begin a path component with it.
_UNFINISHED = ".tmp-"


class StoreError(ValueError):
    """The store cannot do what was asked: says which store, what is wrong and what to do."""


class StoreKeyError(StoreError, KeyError):
    """No object of this key in the store."""

    __str__ = ValueError.__str__  # KeyError would print the repr


class Store(ABC):
    """A place that holds objects by key. `uri` is an absolute folder or `s3://bucket/prefix`."""

    uri: str
    is_local: bool

    @abstractmethod
    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False) -> bool:
        """Writes an object whole or not at all; with `if_absent`, False if another one was there first."""

    @abstractmethod
    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """The bytes [start, start + length) of an object, shorter at its end; StoreKeyError if it is missing."""

    @abstractmethod
    def head(self, key: str) -> int | None:
        """The object's size in bytes; None if it is missing."""

    @abstractmethod
    def tag(self, key: str) -> str:
        """A short text that changes when the object is replaced; StoreKeyError if it is missing."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[str]:
        """All keys that begin with `prefix`, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object; a missing one is no error."""

    @abstractmethod
    def path(self, key: str) -> Path | None:
        """The local file of an object; None where objects are not files."""

    def at(self, *parts: str) -> Store:
        """The part of this store below `parts`."""
        return open_store("/".join([self.uri, *(_checked(part) for part in parts)]))

    def check(self) -> None:
        """Writes, reads and deletes a probe object; StoreError within 15 s, naming what is wrong."""
        key, data = f".probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
        probe = self._impatient()
        probe.put(key, data, if_absent=True)
        try:
            if probe.get(key) != data:
                raise StoreError(f"{self.uri} gave back other bytes than were written: use another store")
            # Some S3 servers ignore If-None-Match; two writers would then both believe to have won.
            if probe.put(key, b"second", if_absent=True):
                raise StoreError(
                    f"{self.uri} overwrites where it was told not to (If-None-Match is ignored), so two runs could "
                    "destroy each other's work: use a server with conditional writes"
                )
        finally:
            with contextlib.suppress(StoreError):
                probe.delete(key)

    def reach(self) -> None:
        """Looks for an object, and writes nothing; StoreError within 15 s where nobody answers."""
        self._impatient().head(".probe")

    def _impatient(self) -> Store:
        return self

    def __reduce__(self):
        return open_store, (self.uri,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)


def open_store(uri: str) -> Store:
    """The store at a folder ('./x', '/x', 'file:///x') or at 's3://bucket/prefix'. Touches neither disk nor network."""
    uri = str(uri)
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise StoreError(f"{uri!r} names no bucket: write s3://bucket/prefix")
        return S3Store(bucket, "/".join(part for part in prefix.split("/") if part))
    if uri.startswith("file://"):
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise StoreError(f"{uri!r} names another host or no folder: write file:///folder with three slashes")
        uri = unquote(parts.path)
    if not uri or "://" in uri:
        raise StoreError(f"{uri!r} is no store: give a folder or s3://bucket/prefix")
    return FileStore(Path(os.path.abspath(os.path.expanduser(uri))))


def _checked(key: str) -> str:
    parts = PurePosixPath(key).parts
    plain = bool(key) and not key.startswith("/") and ".." not in parts and "/".join(parts) == key
    if not plain or any(part.startswith(_UNFINISHED) for part in parts):
        raise StoreError(f"{key!r} is no key: a key is parts joined by single '/', without '..' or a leading '/'")
    return key


class FileStore(Store):
    """Objects as files below a folder."""

    is_local = True

    def __init__(self, folder: Path):
        self.folder = folder
        self.uri = str(folder)

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False) -> bool:
        """See Store. Written beside, synced, then put in place: a reader never sees a part of it."""
        target = self.folder / _checked(key)
        beside = target.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}")
        with self._errors(f"cannot write {key}"):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with beside.open("wb") as file:
                    if isinstance(data, Path):
                        with data.open("rb") as source:
                            shutil.copyfileobj(source, file, 1 << 20)
                    else:
                        file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if not if_absent:
                    os.replace(beside, target)
                    return True
                try:
                    os.link(beside, target)
                except FileExistsError:
                    return False
                return True
            finally:
                with contextlib.suppress(OSError):
                    beside.unlink()

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        with self._errors(f"cannot read {key}", key=key), (self.folder / _checked(key)).open("rb") as file:
            file.seek(start)
            return file.read() if length is None else file.read(length)

    def head(self, key: str) -> int | None:
        path = self.folder / _checked(key)
        with self._errors(f"cannot read {key}"):
            return path.stat().st_size if path.is_file() else None

    def tag(self, key: str) -> str:
        with self._errors(f"cannot read {key}", key=key):
            stat = (self.folder / _checked(key)).stat()
            return f"{stat.st_size}-{stat.st_mtime_ns}"

    def list(self, prefix: str = "") -> Iterator[str]:
        # Only the folder that the prefix leads into can hold matching keys.
        top = self.folder / prefix.rpartition("/")[0]
        with self._errors("cannot list"):
            keys = [
                (Path(folder) / name).relative_to(self.folder).as_posix()
                for folder, _, names in os.walk(top)
                for name in names
                if not name.startswith(_UNFINISHED)
            ]
        yield from sorted(key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        with self._errors(f"cannot delete {key}"):
            (self.folder / _checked(key)).unlink(missing_ok=True)

    def path(self, key: str) -> Path:
        return self.folder / _checked(key)

    @contextlib.contextmanager
    def _errors(self, doing: str, *, key: str | None = None) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as error:
            if key is not None:
                raise StoreKeyError(f"{self.uri} has no object {key}") from error
            raise StoreError(f"{self.uri}: {doing}: {error}") from error
        except (NotADirectoryError, FileExistsError) as error:
            raise StoreError(
                f"{self.uri}: {doing}: a file stands where a folder must be ({error.filename}): move it, or use "
                "another store"
            ) from error
        except OSError as error:
            raise StoreError(
                f"{self.uri}: {doing}: {error.strerror or error}; the store must be a folder you may write to, with "
                "room left: mend that, or use another store"
            ) from error


class S3Store(Store):
    """Objects below a prefix of an S3 bucket."""

    is_local = False

    def __init__(self, bucket: str, prefix: str, *, attempts: int = 6, read_timeout_s: float = 20):
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client_options = {"attempts": attempts, "read_timeout_s": read_timeout_s}

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False) -> bool:
        """See Store. S3 shows an object only when all of it has arrived."""
        from botocore.exceptions import ClientError

        place = {"Bucket": self.bucket, "Key": self._full(key)}
        with self._errors(f"cannot write {key}"):
            client = self._client()
            if not if_absent and isinstance(data, Path):
                client.upload_file(str(data), **place)  # in parts: put_object ends at 5 GB
                return True
            condition = {"IfNoneMatch": "*"} if if_absent else {}
            with data.open("rb") if isinstance(data, Path) else contextlib.nullcontext(data) as body:
                try:
                    client.put_object(Body=body, **place, **condition)
                except ClientError as error:
                    # 412: it exists. 409: another write of the same key is under way, and it came first.
                    if if_absent and _code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                        return False
                    raise
            return True

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, ResponseStreamingError

        if length == 0:
            return b""
        end = "" if length is None else start + length - 1
        extra = {} if start == 0 and length is None else {"Range": f"bytes={start}-{end}"}
        with self._errors(f"cannot read {key}", key=key):
            for attempt in range(3):
                try:
                    return self._client().get_object(Bucket=self.bucket, Key=self._full(key), **extra)["Body"].read()
                except ClientError as error:
                    if _code(error) == "InvalidRange":  # beyond the end, as with a file
                        return b""
                    raise
                except (ResponseStreamingError, HTTPClientError, ConnectionError):
                    # botocore retries requests but not a body that breaks off.
                    if attempt == 2 or self._client_options["attempts"] < 3:
                        raise
        raise AssertionError("unreachable")

    def head(self, key: str) -> int | None:
        from botocore.exceptions import ClientError

        with self._errors(f"cannot read {key}"):
            try:
                return self._client().head_object(Bucket=self.bucket, Key=self._full(key))["ContentLength"]
            except ClientError as error:
                if _code(error) in ("404", "NoSuchKey", "NotFound"):
                    return None
                raise

    def tag(self, key: str) -> str:
        with self._errors(f"cannot read {key}", key=key):
            return self._client().head_object(Bucket=self.bucket, Key=self._full(key))["ETag"]

    def list(self, prefix: str = "") -> Iterator[str]:
        return (key for key in self.raw_keys(prefix) if key and not key.endswith("/"))

    def raw_keys(self, prefix: str = "") -> Iterator[str]:
        """As `list`, with the empty objects that consoles and pyarrow put where a folder is meant ("x/", "")."""
        root = f"{self.prefix}/" if self.prefix else ""
        with self._errors("cannot list"):
            pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=root + prefix)
            for page in pages:
                for entry in page.get("Contents", ()):
                    yield entry["Key"].removeprefix(root)

    def delete(self, key: str) -> None:
        with self._errors(f"cannot delete {key}"):
            self._client().delete_object(Bucket=self.bucket, Key=self._full(key))

    def path(self, key: str) -> None:
        return None

    def _full(self, key: str) -> str:
        return f"{self.prefix}/{_checked(key)}" if self.prefix else _checked(key)

    def _client(self) -> Any:
        return _s3_client(os.getpid(), _aws_environment(), **self._client_options)

    def _impatient(self) -> Store:
        return S3Store(self.bucket, self.prefix, attempts=2, read_timeout_s=4)

    @contextlib.contextmanager
    def _errors(self, doing: str, *, key: str | None = None) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            if key is not None and _code(error) in ("NoSuchKey", "404"):
                raise StoreKeyError(f"{self.uri} has no object {key}") from error
            raise StoreError(f"{self.uri}: {doing}: {self._refusal(error)}") from error
        except (BotoCoreError, Boto3Error) as error:
            raise StoreError(f"{self.uri}: {doing}: {self._failure(error)}") from error

    def _refusal(self, error: Any) -> str:
        code, message = _code(error), error.response.get("Error", {}).get("Message", "")
        if code == "NoSuchBucket":
            return f"there is no bucket {self.bucket!r}: create it, or name another store"
        if code in (
            "InvalidAccessKeyId",
            "SignatureDoesNotMatch",
            "InvalidToken",
            "ExpiredToken",
            "InvalidClientTokenId",
        ):
            return f"wrong credentials ({code}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        if code in ("AccessDenied", "403", "Forbidden"):
            return f"refused ({code}): these credentials must be allowed to read and write below {self.uri}"
        return f"the server said {code} {message}".rstrip() + ": does AWS_ENDPOINT_URL_S3 name an S3 server?"

    def _failure(self, error: Exception) -> str:
        name = type(error).__name__
        if name in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"):
            return f"no credentials ({error}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        return (
            f"the S3 server cannot be reached ({' '.join(str(error).split())}): start it, or set AWS_ENDPOINT_URL_S3 "
            "to where it listens"
        )


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _aws_environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


# One client per process (a forked one must not share sockets) and environment (tests change keys).
@functools.lru_cache(maxsize=4)
def _s3_client(pid: int, environment: tuple, *, attempts: int, read_timeout_s: float) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=3,
        read_timeout=read_timeout_s,
        # adaptive slows down after 503 SlowDown and comes back; the default keeps hammering.
        retries={"total_max_attempts": attempts, "mode": "adaptive" if attempts > 2 else "standard"},
        max_pool_connections=32,
    )
    return boto3.session.Session().client("s3", config=config)


def arrow_filesystem(store: Store) -> tuple[pyarrow.fs.FileSystem, str]:
    """pyarrow's file system and the path of the store in it, at the store's own endpoint.

    It holds no keys: Ray pickles it, also into the store. Whoever unpickles it finds the keys in its own AWS
    variables and files (AWS_PROFILE too), as boto3 does.
    """
    import pyarrow.fs

    if not isinstance(store, S3Store):
        return pyarrow.fs.LocalFileSystem(), store.uri
    import boto3

    with store._errors("cannot connect"):
        endpoint = urlsplit(store._client().meta.endpoint_url)
        region = boto3.session.Session().region_name or store._client().meta.region_name
    options: dict[str, Any] = {"connect_timeout": 3, "request_timeout": 20, "region": region}
    if not (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        options |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    if options["region"] in (None, "aws-global"):
        options["region"] = "us-east-1"
    return pyarrow.fs.S3FileSystem(**options), f"{store.bucket}/{store.prefix}".rstrip("/")
