"""What an S3 server's or the connection's failure means for the caller: pure, from an exception to an answer.

Servers differ in how they say the same (Ceph answers a lost create-only race with code `PreconditionFailed` and no
condition, a HEAD of anything missing has no code at all), so codes and HTTP statuses are both looked at.
"""

from __future__ import annotations

import asyncio

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from rl_ckpt.errors import CheckpointError, InvalidInputError, StorageError
from rl_ckpt.store.base import ObjectExistsError, ObjectMissingError

_TRANSIENT_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))
_TRANSIENT_CODES = frozenset(
    (
        "BadDigest",
        "ConditionalRequestConflict",  # 409: another create of this name is just under way
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestLimitExceeded",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
    )
)
_THROTTLED_STATUS = frozenset((429, 503))
_THROTTLED_CODES = frozenset(
    (
        "RequestLimitExceeded",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
    )
)
_OUTDATED = frozenset(
    ("ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "TokenRefreshRequired")
)
_CONNECTION_ERRORS = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.ResponseStreamingError,
    boto.IncompleteReadError,
    aiohttp.ClientError,
    asyncio.TimeoutError,
    ConnectionError,
    ResponseParserError,  # no S3 answer at all: a gateway's page, or one that was cut
)
_NOT_WORTH_A_RETRY = (boto.SSLError, boto.ProxyConnectionError, boto.InvalidProxiesConfigError)
_MISCONFIGURED = (
    boto.PartialCredentialsError,
    boto.ProfileNotFound,
    boto.ConfigNotFound,
    boto.ConfigParseError,
    boto.InvalidConfigError,
    boto.NoRegionError,
    boto.ParamValidationError,
    boto.InvalidEndpointConfigurationError,
)
_DENIED = {
    "SignatureDoesNotMatch": "The secret key does not belong to the access key: check AWS_SECRET_ACCESS_KEY or "
    "storage_options['secret']",
    "InvalidAccessKeyId": "The server does not know the access key: check AWS_ACCESS_KEY_ID or storage_options['key'], "
    "and that the endpoint is the right one",
    "ExpiredToken": "The session token has expired, and no newer one was found: renew the credentials (environment, "
    "profile or role), or give new storage_options; the next save looks for them again",
    "InvalidToken": "The session token is not valid: renew the credentials (environment, profile or role), or give new "
    "storage_options; the next save looks for them again",
    "RequestTimeTooSkewed": "The clocks of this machine and the server are apart: set this one's, by NTP",
}
_OTHER_REGION = (
    "The bucket is in another region: set AWS_DEFAULT_REGION or storage_options={'client_kwargs': {'region_name': …}}"
)
_WRONG_REGION = frozenset(("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"))


def code_and_status(error: BaseException) -> tuple[str, int]:
    """The server's error code and HTTP status; empty and 0 where the error is not an answer of the server."""
    if not isinstance(error, boto.ClientError):
        return "", 0
    said = error.response
    return str(said.get("Error", {}).get("Code", "")), int(said.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


class WrongAnswerError(Exception):
    """The server says that all went well, and the length or the bytes say otherwise."""


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, WrongAnswerError):
        return True
    if isinstance(error, boto.ClientError):
        return _asks_to_come_again(*code_and_status(error))
    return isinstance(error, _CONNECTION_ERRORS) and not isinstance(error, _NOT_WORTH_A_RETRY) and not _is_moved(error)


def _is_moved(error: BaseException) -> bool:
    """Whether aiohttp was sent elsewhere and could not go there, as it can't send a streamed body twice."""
    return isinstance(error.__context__, aiohttp.ClientPayloadError) and "redirect" in str(error.__context__)


def is_throttle(error: BaseException) -> bool:
    """Whether the server asks to come more slowly."""
    code, status = code_and_status(error)
    return code in _THROTTLED_CODES or status in _THROTTLED_STATUS


def is_outdated(error: BaseException) -> bool:
    """Whether newer credentials may help."""
    return code_and_status(error)[0] in _OUTDATED


def is_expected(error: BaseException) -> bool:
    """Whether `explain` has an answer for this; anything else is a bug and passes as it is."""
    return isinstance(error, (WrongAnswerError, boto.BotoCoreError, boto.ClientError, *_CONNECTION_ERRORS, OSError))


def signal(error: BaseException, object_url: str) -> ObjectExistsError | ObjectMissingError | None:
    """The store floor's own signal, where the answer is one: the name is taken, or there is no such object."""
    code, status = code_and_status(error)
    if code == "PreconditionFailed" or status == 412:
        return ObjectExistsError(object_url)
    if code in ("NoSuchKey", "404") or (status == 404 and code in ("", "NotFound")):
        return ObjectMissingError(object_url)
    return None


def explain(error: BaseException, operation: str, object_url: str, endpoint: str, told: str) -> CheckpointError:
    """The public error for a failure: what happened, to what, what the server said, and what to do.

    Args:
        error: What botocore, aiohttp or the server raised.
        operation: S3's name of the request.
        object_url: What it was about.
        endpoint: Address of the server.
        told: How often and how long it was tried.

    Returns:
        The error, not raised.
    """
    what = f"{operation} of {object_url} at {endpoint}"
    code, status = code_and_status(error)
    if isinstance(error, boto.ClientError):
        return _explain_answer(what, code, status, _said(error), told)
    if isinstance(error, WrongAnswerError):
        return StorageError(f"{what} failed after {told}: {error}. Look at the server, or the proxy before it")
    if isinstance(error, ResponseParserError):
        return StorageError(
            f"{what} failed after {told}: the answer is not S3's: {str(error)[:300]}. Check that AWS_ENDPOINT_URL or "
            "storage_options['endpoint_url'] is the S3 endpoint, and what stands before it"
        )
    if isinstance(error, boto.NoCredentialsError):
        return InvalidInputError(
            f"{what}: no credentials found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or "
            "storage_options={'key': …, 'secret': …} ({'anon': True} for a public bucket)"
        )
    if _is_moved(error):
        return InvalidInputError(f"{what}: the server sends the request elsewhere. {_OTHER_REGION}")
    if isinstance(error, _NOT_WORTH_A_RETRY):
        return StorageError(f"{what} failed: {error}. Check the endpoint's certificate and the proxy settings")
    if isinstance(error, (boto.EndpointConnectionError, boto.ConnectTimeoutError, aiohttp.ClientConnectorError)):
        return StorageError(
            f"{what}: cannot reach the server after {told}: {error}. "
            "Check AWS_ENDPOINT_URL or storage_options['endpoint_url'], the network and that the server runs"
        )
    if isinstance(error, _MISCONFIGURED):
        return InvalidInputError(f"{what}: {type(error).__name__}: {error}. Check the url and storage_options")
    return StorageError(f"{what} failed after {told}: {type(error).__name__}: {error}. Try again, or check the network")


def _said(error: boto.ClientError) -> str:
    told = error.response.get("Error", {})
    times = [f"{key} {told[key]}" for key in ("RequestTime", "ServerTime") if key in told]
    return ", ".join(filter(None, [str(told.get("Message") or ""), *times]))


def _explain_answer(what: str, code: str, status: int, message: str, told: str) -> CheckpointError:
    said = f"{code or 'no code'} (HTTP {status}){': ' + message if message else ''}"
    if code == "NoSuchBucket":
        return InvalidInputError(f"{what}: the bucket does not exist. Create the bucket, or correct the url")
    if code in _WRONG_REGION or status in (301, 307):
        return InvalidInputError(f"{what}: the server says {said}. {_OTHER_REGION}")
    if code == "InvalidBucketName":
        return InvalidInputError(f"{what}: the server says {said}. Correct the bucket's name in the url")
    if status in (401, 403) or code in _DENIED:  # AWS says ExpiredToken with 400
        hint = _DENIED.get(
            code,
            "These credentials may not do this: allow s3:GetObject, s3:PutObject, s3:DeleteObject, s3:ListBucket and "
            "s3:AbortMultipartUpload and s3:ListBucketMultipartUploads on the bucket and below the url, and check the "
            "keys",
        )
        return StorageError(f"{what} was refused after {told}: {said}. {hint}")
    if _asks_to_come_again(code, status):
        option = "retry_throttled_s" if code in _THROTTLED_CODES or status in _THROTTLED_STATUS else "retry_deadline_s"
        return StorageError(
            f"{what} failed after {told}: the server says {said}. It is overloaded or broken; "
            f"try again later or raise storage_options['{option}']"
        )
    return StorageError(f"{what} failed after {told}: the server says {said}")


def _asks_to_come_again(code: str, status: int) -> bool:
    return code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS
