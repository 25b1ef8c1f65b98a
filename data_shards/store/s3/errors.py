"""Errors of S3 requests: whether to retry, and messages for the user."""

from __future__ import annotations

import enum
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError


class Trouble(enum.Enum):
    """Kinds of failed attempts, by how to continue."""

    FINAL = "another attempt would fail too"
    BROKEN = "interrupted or damaged in transfer, or the server failed"
    SLOW_DOWN = "the server asks for fewer requests"
    EXPIRED = "the keys have expired"
    REFUSED = "the keys are not accepted"


class DamagedError(Exception):
    """Bytes were damaged in transfer."""


class ReplacedError(Exception):
    """An object was replaced while it was read."""


_SLOW_DOWN = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "429"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
# Includes bare status codes, because an answer to HEAD has no body with the reason.
_REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId", "403", "400"}
# The request arrived damaged, or at a bad moment.
_BROKEN = {
    "BadDigest",
    "InvalidDigest",
    "XAmzContentSHA256Mismatch",
    "IncompleteBody",
    "MalformedXML",
    "RequestTimeout",
    "ConditionalRequestConflict",
    "OperationAborted",
    "409",
}


def failures() -> tuple[type[Exception], ...]:
    """The exceptions that an attempt may raise."""
    return ClientError, BotoCoreError, ResponseParserError, HTTPError, DamagedError


def code_of(error: Exception) -> str:
    """The code of the server's answer, such as NoSuchKey; "" without an answer."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def trouble_of(error: Exception) -> Trouble:
    """The kind of this error."""
    if isinstance(error, CredentialRetrievalError):
        return Trouble.EXPIRED
    if not isinstance(error, ClientError):
        passing = (ConnectionError, HTTPClientError, IncompleteReadError, FlexibleChecksumError)
        broken = not isinstance(error, BotoCoreError) or isinstance(error, passing)
        return Trouble.BROKEN if broken else Trouble.FINAL
    code, status = code_of(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    for codes, trouble in (
        (_SLOW_DOWN, Trouble.SLOW_DOWN),
        (_EXPIRED, Trouble.EXPIRED),
        (_REFUSED, Trouble.REFUSED),
        (_BROKEN, Trouble.BROKEN),
    ):
        if code in codes:
            return trouble
    return Trouble.BROKEN if status in (500, 502, 503, 504) else Trouble.FINAL


def explain(error: Exception, *, bucket: str, uri: str) -> str:
    """The problem and a remedy, when no further attempt is made."""
    if isinstance(error, DamagedError):
        return (
            f"{error}, repeatedly: something between this machine and the S3 server (a proxy, a network card, memory) "
            "damages the data; fix it, or bypass it with AWS_ENDPOINT_URL_S3"
        )
    return _refusal(error, bucket, uri) if isinstance(error, ClientError) else _failure(error)


def _refusal(error: Any, bucket: str, uri: str) -> str:
    code, message = code_of(error), error.response.get("Error", {}).get("Message", "")
    trouble = trouble_of(error)
    if code == "NoSuchBucket":
        return f"bucket {bucket!r} does not exist; create it, or use another store"
    if trouble is Trouble.EXPIRED:
        return (
            f"the credentials have expired ({code}) and no new ones were found; renew them (AWS_PROFILE and the AWS "
            "files are read again, variables are not) and rerun; finished work is kept"
        )
    if code in ("AccessDenied", "403", "Forbidden"):
        return f"access denied ({code}); allow these credentials to read and write below {uri}"
    if trouble is Trouble.REFUSED and code != "400":
        return f"wrong credentials ({code}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if code == "RequestTimeTooSkewed":
        return "the clocks of this machine and of the S3 server differ; set this machine's clock"
    if trouble is Trouble.SLOW_DOWN:
        return f"the S3 server keeps asking to slow down ({code}); use fewer workers, or rerun when it is less busy"
    if trouble is Trouble.BROKEN:
        return f"the S3 server keeps failing ({code} {message}".rstrip() + "); check its log and rerun"
    return f"the server answered {code} {message}".rstrip() + "; check that AWS_ENDPOINT_URL_S3 is an S3 server"


def _failure(error: Exception) -> str:
    name, said = type(error).__name__, " ".join(str(error).split())
    if name in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"):
        return f"no credentials ({said}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if name == "ResponseParserError":
        return f"the server is not an S3 server ({said}); set AWS_ENDPOINT_URL_S3 to the address of one"
    return f"the S3 server cannot be reached ({said}); start it, or set AWS_ENDPOINT_URL_S3 to its address"
