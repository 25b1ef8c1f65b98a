"""What went wrong between us and an S3 server: whether to try again, and how to tell a person."""

from __future__ import annotations

import enum
from typing import Any


class Trouble(enum.Enum):
    """What a failed attempt means for the next one."""

    FINAL = "another attempt would fail as well"
    BROKEN = "broken off, damaged on the way, or the server failed"
    SLOW_DOWN = "the server asks for fewer requests"
    EXPIRED = "the keys were good and are so no longer"
    REFUSED = "the keys are not accepted"


class DamagedError(Exception):
    """Bytes did not arrive as they were sent."""


class ReplacedError(Exception):
    """An object is another one than before."""


_SLOW_DOWN = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "429"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
# An answer to HEAD has no body that could say why.
_REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId", "403", "400"}
# Of these the server says that the request was not as we meant it, or came at a bad moment.
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
    """What an attempt may raise."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    return ClientError, BotoCoreError, ResponseParserError, HTTPError, DamagedError


def code_of(error: Exception) -> str:
    """The code of an answer of the server's, such as NoSuchKey; "" if it was none."""
    from botocore.exceptions import ClientError

    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def trouble_of(error: Exception) -> Trouble:
    """What this error means for another attempt."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        CredentialRetrievalError,
        FlexibleChecksumError,
        HTTPClientError,
        IncompleteReadError,
    )

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
    """What is wrong and what to do, once no further attempt is made."""
    from botocore.exceptions import ClientError

    if isinstance(error, DamagedError):
        return (
            f"{error}, again and again: something between here and the S3 server (a proxy, a network card, memory) "
            "damages what passes; mend it, or go round it with AWS_ENDPOINT_URL_S3"
        )
    return _refusal(error, bucket, uri) if isinstance(error, ClientError) else _failure(error)


def _refusal(error: Any, bucket: str, uri: str) -> str:
    code, message = code_of(error), error.response.get("Error", {}).get("Message", "")
    trouble = trouble_of(error)
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket!r}: create it, or name another store"
    if trouble is Trouble.EXPIRED:
        return (
            f"the credentials have expired ({code}) and no new ones were found: renew them (AWS_PROFILE and the files "
            "of AWS are read again, variables are not) and run again, what is finished is kept"
        )
    if code in ("AccessDenied", "403", "Forbidden"):
        return f"refused ({code}): these credentials must be allowed to read and write below {uri}"
    if trouble is Trouble.REFUSED and code != "400":
        return f"wrong credentials ({code}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if code == "RequestTimeTooSkewed":
        return "this machine's clock is not that of the S3 server: set it"
    if trouble is Trouble.SLOW_DOWN:
        return f"the S3 server keeps asking to slow down ({code}): use fewer workers, or run again when it is less busy"
    if trouble is Trouble.BROKEN:
        return f"the S3 server keeps failing ({code} {message}".rstrip() + "): look at its log, and run again"
    return f"the server said {code} {message}".rstrip() + ": does AWS_ENDPOINT_URL_S3 name an S3 server?"


def _failure(error: Exception) -> str:
    name, said = type(error).__name__, " ".join(str(error).split())
    if name in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"):
        return f"no credentials ({said}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if name == "ResponseParserError":
        return f"no S3 server answers there ({said}): set AWS_ENDPOINT_URL_S3 to where one listens"
    return f"the S3 server cannot be reached ({said}): start it, or set AWS_ENDPOINT_URL_S3 to where it listens"
