"""The S3 client of this process and what its answers mean. Its settings come from the environment alone."""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import hashlib
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, NoReturn, TypeVar

import aiohttp
import botocore.exceptions
import botocore.parsers
import botocore.session
import fsspec.asyn
import s3fs

from segpipe.errors import (
    InputError,
    ObjectMissing,
    StorageError,
    StorageFull,
    StorageRefused,
)
from segpipe.storage.retry import Transient

T = TypeVar("T")

MAX_CONNECTIONS: Final = 64
CONNECT_TIMEOUT_S: Final = 10
READ_TIMEOUT_S: Final = 20  # several fit into the time that retry.py allows

_TRANSIENT_CODES: Final = frozenset(
    {
        "BadDigest",  # the body was damaged on its way
        "ExpiredToken",  # renewed by the credential provider before the next try
        "ExpiredTokenException",
        "InternalError",
        "OperationAborted",
        "ProvisionedThroughputExceededException",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
    }
)
_REFUSALS: Final = {
    "NoSuchBucket": ("there is no such bucket", "Make it first, or check the name and the endpoint."),
    "InvalidBucketName": ("the bucket's name is not valid", "Correct the name."),
    "AccessDenied": ("access denied", "Check what these credentials may do in this bucket."),
    "InvalidAccessKeyId": ("the access key is not known", "Check AWS_ACCESS_KEY_ID and the endpoint."),
    "SignatureDoesNotMatch": ("the signature is wrong", "Check AWS_SECRET_ACCESS_KEY and AWS_REGION."),
    "RequestTimeTooSkewed": ("this machine's clock is wrong", "Set the clock."),
    "AuthorizationHeaderMalformed": ("the region is wrong", "Set AWS_REGION to the bucket's region."),
    "PermanentRedirect": ("the bucket is in another region", "Set AWS_REGION to the bucket's region."),
    "NotImplemented": ("the store does not know this request", "It must know If-None-Match on PUT."),
}
_NO_CREDENTIALS: Final = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    "for a public bucket AWS_NO_SIGN_REQUEST=YES."
)
_RESETS: Final = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    botocore.parsers.ResponseParserError,
    botocore.exceptions.ResponseStreamingError,
    aiohttp.ClientError,
    asyncio.IncompleteReadError,
    fsspec.asyn.FSTimeoutError,
    ConnectionError,
    TimeoutError,
)

PUT_TOKEN: Final = "segpipe-put"
"""Name of the metadata entry that tells which call made an object."""

_clients: dict[str, s3fs.S3FileSystem] = {}
_lock = threading.Lock()


def environment_digest() -> str:
    """A digest of every AWS setting: another one means another client."""
    settings = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
    return hashlib.sha256(repr(settings).encode()).hexdigest()


def file_system(environment: str) -> s3fs.S3FileSystem:
    """This process's client for these settings; a forked child gets its own. Nothing is sent."""
    with _lock:
        found = _clients.get(environment)
        if found is None:
            found = _clients[environment] = _make()
    return found


def _make() -> s3fs.S3FileSystem:
    config: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
        "max_pool_connections": MAX_CONNECTIONS,
        "retries": {"total_max_attempts": 1, "mode": "standard"},  # retry.py is the only policy
    }
    if _has_endpoint():
        config["s3"] = {"addressing_style": "path"}
        # Many stores besides AWS do not know the newer checksum trailers.
        if "AWS_REQUEST_CHECKSUM_CALCULATION" not in os.environ:
            config["request_checksum_calculation"] = "when_required"
        if "AWS_RESPONSE_CHECKSUM_VALIDATION" not in os.environ:
            config["response_checksum_validation"] = "when_required"
    return s3fs.S3FileSystem(
        anon=os.environ.get("AWS_NO_SIGN_REQUEST", "").upper() in ("YES", "TRUE", "ON", "1"),
        config_kwargs=config,
        asynchronous=True,  # else s3fs would close a parent's connections when a forked child ends
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def _has_endpoint() -> bool:
    if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        return True
    try:
        profile: dict[str, Any] = botocore.session.Session().get_scoped_config()
    except botocore.exceptions.BotoCoreError:
        return False  # a missing profile is named by the first request
    return "endpoint_url" in profile or "services" in profile


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine function on this process's event loop and wait for it."""
    result: T = fsspec.asyn.sync(fsspec.asyn.get_loop(), work)
    return result


async def call(file_system: s3fs.S3FileSystem, method: str, where: str, **arguments: Any) -> dict[str, Any]:
    """One S3 request, tried once.

    Raises ``Transient``, a ``StorageError`` class for what lasts, and botocore's ``ClientError`` for 404,
    409, 412 and 416, whose meaning is the caller's.
    """
    try:
        client = await file_system.set_session()
        reply: dict[str, Any] = await getattr(client, method)(**arguments)
        return reply
    except Exception as error:
        explain(error, where)


def explain(error: Exception, where: str) -> NoReturn:
    """Raise what ``error`` means; see ``call``."""
    if isinstance(error, botocore.exceptions.ClientError):
        _explain_answer(error, where)
    if isinstance(error, botocore.exceptions.SSLError):
        raise StorageRefused("the server's certificate is not trusted", where, "Set AWS_CA_BUNDLE.") from None
    if isinstance(error, botocore.exceptions.EndpointConnectionError):
        raise Transient("cannot connect (check AWS_ENDPOINT_URL and the network)") from None
    if isinstance(error, _RESETS):
        raise Transient(type(error).__name__) from None
    if isinstance(
        error, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError
    ):
        raise StorageRefused("no S3 credentials found", where, _NO_CREDENTIALS) from None
    if isinstance(error, botocore.exceptions.ParamValidationError):
        raise InputError("no valid bucket or key", where, "Correct the URI.") from None
    if isinstance(error, botocore.exceptions.BotoCoreError | ValueError):
        # The text may hold the endpoint with a password in it, so only the class is named.
        name = type(error).__name__
        raise StorageRefused(
            f"the S3 settings are wrong ({name})", where, "Check the AWS_* variables."
        ) from None
    raise error


def _explain_answer(error: Any, where: str) -> NoReturn:
    status, code = status_of(error), code_of(error)
    if status == 507 or code in ("QuotaExceeded", "XMinioStorageFull"):
        raise StorageFull(f"the store is full ({code})", where, "Free space and run the same command again.")
    if code in _REFUSALS:
        what, fix = _REFUSALS[code]
        raise StorageRefused(f"{what} ({code})", where, fix) from None
    if code in _TRANSIENT_CODES or status in (408, 429) or status >= 500:
        raise Transient(f"{status} {code}") from None
    if status in (404, 409, 412, 416):
        raise error
    raise StorageRefused(
        f"the store says no ({status} {code})", where, "Check credentials, bucket and key."
    ) from None


def status_of(error: Any) -> int:
    """The HTTP status of a botocore ``ClientError``."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: Any) -> str:
    """The S3 error code of a botocore ``ClientError``; the status where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def missing(where: str) -> ObjectMissing:
    return ObjectMissing("no such object", where)


def unexpected(error: Any, where: str) -> StorageError:
    """For an answer that makes no sense for the request."""
    what = f"unexpected answer {status_of(error)} {code_of(error)}"
    return StorageError(what, where, "Run the same command again.")


def put_token(head: dict[str, Any]) -> str | None:
    """The token of the call that made the object, from the headers of a HEAD request."""
    found: str | None = head.get("Metadata", {}).get(PUT_TOKEN)
    return found


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # the parent's may be held by a thread that the child has not
    for each in _clients.values():
        # Freeing it would close the parent's connections, through the epoll that both processes share.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
    _clients.clear()


def _at_exit() -> None:
    async def close(each: s3fs.S3FileSystem) -> None:
        client = await each.set_session()
        await client.close()

    for each in _clients.values():
        with suppress(Exception):  # the process ends anyway
            fsspec.asyn.sync(fsspec.asyn.get_loop(), close, each, timeout=1)


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
