"""The one retry policy, and what the answers of S3 and of other stores mean to it."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import aiohttp
import botocore.exceptions
import pytest

from segpipe.errors import (
    InputError,
    ObjectChanged,
    ObjectMissing,
    SegpipeError,
    StorageError,
    StorageFull,
    StorageRefused,
)
from segpipe.storage import open_storage, retry, s3client
from segpipe.storage.generic import FsspecStorage
from segpipe.storage.retry import ATTEMPTS, FIRST_WAIT_S, LONGEST_WAIT_S, Transient


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the policy would have slept, without sleeping."""
    slept: list[float] = []
    policy = retry._WAIT

    def wait(state: Any) -> float:
        slept.append(policy(state))
        return 0.0

    monkeypatch.setattr(retry, "_WAIT", wait)
    return slept


def answer(status: int, code: str = "") -> botocore.exceptions.ClientError:
    reply = {
        "Error": {"Code": code or str(status), "Message": "a text with hidden in it"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return botocore.exceptions.ClientError(reply, "PutObject")


def test_a_transient_fault_is_tried_again_until_it_passes(waits: list[float]) -> None:
    left = [Transient("503"), Transient("reset"), None]

    def call() -> str:
        if fault := left.pop(0):
            raise fault
        return "done"

    assert retry.retry(call, "s3://b/k") == "done"
    assert len(waits) == 2


def test_waits_grow_are_jittered_and_capped(waits: list[float]) -> None:
    def call() -> None:
        raise Transient("503 SlowDown")

    for _ in range(20):
        with pytest.raises(StorageError, match=r"s3://b/k: .*503 SlowDown"):
            retry.retry(call, "s3://b/k")
    assert len(waits) == 20 * ATTEMPTS  # the last of each is worked out, not slept
    for tries in range(ATTEMPTS):
        of_this_try = waits[tries::ATTEMPTS]
        assert max(of_this_try) <= min(FIRST_WAIT_S * 2**tries, LONGEST_WAIT_S)
        assert len(set(of_this_try)) > 10


def test_tries_that_take_long_are_given_up_after_a_minute(
    waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("tenacity.time.monotonic", lambda: clock[0])

    def call() -> None:
        clock[0] += 25
        raise Transient("timeout")

    with pytest.raises(StorageError, match="or for 60 s: timeout"):
        retry.retry(call, "k")
    assert clock == [75.0]


@pytest.mark.parametrize("error", [StorageRefused("no"), ObjectMissing("gone"), ValueError("slip")])
def test_what_lasts_fails_at_once(waits: list[float], error: Exception) -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        retry.retry(call, "k")
    assert len(calls) == 1
    assert waits == []


def test_the_policy_is_the_same_for_coroutines(waits: list[float]) -> None:
    calls = []

    async def call() -> None:
        calls.append(1)
        raise Transient("short body")

    with pytest.raises(StorageError, match="short body"):
        asyncio.run(retry.retry_async(call, "k"))
    assert len(calls) == ATTEMPTS


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (answer(503, "SlowDown"), Transient),
        (answer(500, "InternalError"), Transient),
        (answer(502), Transient),
        (answer(429), Transient),
        (answer(408), Transient),
        (answer(400, "RequestTimeout"), Transient),
        (answer(400, "ExpiredToken"), Transient),
        (answer(400, "BadDigest"), Transient),
        (answer(400, "InvalidArgument"), StorageRefused),
        (answer(401), StorageRefused),
        (answer(403, "AccessDenied"), StorageRefused),
        (answer(403, "RequestTimeTooSkewed"), StorageRefused),
        (answer(404, "NoSuchBucket"), StorageRefused),
        (answer(301, "PermanentRedirect"), StorageRefused),
        (answer(501, "NotImplemented"), StorageRefused),
        (answer(507), StorageFull),
        (answer(404, "NoSuchKey"), botocore.exceptions.ClientError),
        (answer(412, "PreconditionFailed"), botocore.exceptions.ClientError),
        (answer(409, "ConditionalRequestConflict"), botocore.exceptions.ClientError),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="http://hidden"), Transient),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://hidden"), Transient),
        (botocore.exceptions.SSLError(endpoint_url="http://hidden", error="hidden"), StorageRefused),
        (botocore.exceptions.NoCredentialsError(), StorageRefused),
        (botocore.exceptions.ProfileNotFound(profile="hidden"), StorageRefused),
        (botocore.exceptions.ParamValidationError(report="hidden"), InputError),
        (ValueError("Invalid endpoint: http://hidden"), StorageRefused),
        (aiohttp.ClientPayloadError("hidden"), Transient),
        (ConnectionResetError("hidden"), Transient),
        (TimeoutError("hidden"), Transient),
        (KeyError("a slip of ours"), KeyError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value)[:60],
)
def test_an_s3_error_becomes_what_a_handler_can_act_on_and_repeats_no_text(
    error: Exception, meaning: type
) -> None:
    with pytest.raises(meaning) as caught:
        s3client.explain(error, "s3://b/k")
    assert type(caught.value) is meaning
    if isinstance(caught.value, SegpipeError):
        assert "s3://b/k" in str(caught.value)
        assert caught.value.fix
    if isinstance(caught.value, SegpipeError | Transient):
        assert "hidden" not in str(caught.value)


class _Faulty:
    """Stands before a store's file system; raises the given errors first."""

    def __init__(self, real: Any, errors: list[Exception]) -> None:
        self._real, self._errors = real, errors

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if name not in ("info", "cat_file", "pipe_file", "find"):
            return real

        def method(*args: Any, **kwargs: Any) -> Any:
            if self._errors:
                raise self._errors.pop(0)
            return real(*args, **kwargs)

        return method


def faulty(errors: list[Exception]) -> FsspecStorage:
    store = FsspecStorage(f"memory://{uuid.uuid4().hex}")
    store.put("k", b"data")
    store._fs = _Faulty(store._fs, errors)
    return store


def test_another_stores_resets_are_tried_again(waits: list[float]) -> None:
    store = faulty([ConnectionResetError("hidden"), TimeoutError("hidden")])
    assert store.read("k") == b"data"
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (FileNotFoundError("hidden"), ObjectMissing),
        (PermissionError("hidden"), StorageRefused),
        (RuntimeError("hidden"), StorageError),
    ],
)
def test_another_stores_errors_become_ours_and_repeat_no_text(error: Exception, meaning: type) -> None:
    with pytest.raises(meaning) as caught:
        faulty([error]).read("k")
    assert type(caught.value) is meaning
    assert "hidden" not in str(caught.value)


def test_memory_pins_versions_by_content() -> None:
    store = open_storage(f"memory://{uuid.uuid4().hex}")
    store.put("k", b"old")
    pinned = store.stat("k")
    assert pinned is not None
    store.put("k", b"new")
    with pytest.raises(ObjectChanged):
        store.read_range("k", 0, 1, pinned.etag)
    store.put("k", b"old")
    assert store.read_range("k", 0, 1, pinned.etag) == b"o"
