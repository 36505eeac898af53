"""S3 as a store: ranges pinned to a version, create-only puts that survive lost replies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar, cast
from uuid import uuid4

from botocore.exceptions import ClientError

from segpipe.errors import InputError, ObjectChanged, ObjectMissing, StorageError, StorageRefused
from segpipe.storage import s3client
from segpipe.storage.api import PAGE_ITEMS, ObjectInfo, check_key, check_prefix, check_range
from segpipe.storage.rangefile import RangeFile
from segpipe.storage.retry import Transient, retry_async
from segpipe.storage.s3upload import FileUpload
from segpipe.storage.uris import join_uri

T = TypeVar("T")

PARALLEL_RANGES: Final = 16


class S3Storage:
    """Objects below ``s3://bucket/prefix``. See ``Storage`` for the methods."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._bucket, _, self._prefix = root.removeprefix("s3://").partition("/")
        if not self._bucket:
            raise InputError(f"{root} names no bucket", "", "Write s3://bucket/prefix.")
        self._environment = s3client.environment_digest()
        self._bucket_seen = False

    def __reduce__(self) -> tuple[type[S3Storage], tuple[str]]:
        return S3Storage, (self._root,)

    def __repr__(self) -> str:
        return f"S3Storage({self._root!r})"

    @property
    def root(self) -> str:
        return self._root

    def uri(self, key: str) -> str:
        return join_uri(self._root, check_key(key))

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def stat(self, key: str) -> ObjectInfo | None:
        where = self.uri(key)
        reply = self._wait(lambda: retry_async(lambda: self._head(key, where), where))
        if reply is None:
            return None
        return ObjectInfo(key, int(reply["ContentLength"]), reply["ETag"].strip('"'))

    def read(self, key: str) -> bytes:
        where = self.uri(key)
        return self._wait(lambda: retry_async(lambda: self._get(key, where), where))

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        return self.read_ranges(key, [(start, length)], etag)[0]

    def read_ranges(
        self, key: str, ranges: Sequence[tuple[int, int]], etag: str | None = None
    ) -> list[bytes]:
        where = self.uri(key)
        for start, length in ranges:
            check_range(start, length)

        async def one(start: int, length: int) -> bytes:
            return await retry_async(lambda: self._get_range(key, where, start, length, etag), where)

        async def work() -> list[bytes]:
            return await _gather([partial(one, *span) for span in ranges], PARALLEL_RANGES)

        return self._wait(work)

    def open_range(self, key: str, etag: str | None = None, size_bytes: int | None = None) -> BinaryIO:
        if etag is None or size_bytes is None:
            found = self.stat(key)
            if found is None:
                raise s3client.missing(self.uri(key))
            if etag is not None and etag != found.etag:
                raise _changed(self.uri(key))
            etag, size_bytes = found.etag, found.size_bytes
        pinned = etag
        file = RangeFile(lambda ranges: self.read_ranges(key, ranges, pinned), size_bytes, self.uri(key))
        return cast(BinaryIO, file)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        where = self.uri(key)
        # A 412 may answer our own write whose reply was lost, even unseen: the HTTP client below sends a PUT
        # again by itself when a kept connection breaks. The token tells whose object it is.
        token = uuid4().hex

        async def attempt() -> bool:
            try:
                await self._put(key, where, data, IfNoneMatch="*", Metadata={s3client.PUT_TOKEN: token})
                return True
            except ClientError as error:
                if s3client.status_of(error) not in (409, 412):
                    raise s3client.unexpected(error, where) from None
            head = await self._head(key, where)
            if head is None:  # 409: both writers may have lost
                raise Transient("another write of this object was in the way")
            return s3client.put_token(head) == token

        return self._wait(lambda: retry_async(attempt, where))

    def put_file_if_absent(self, key: str, path: Path) -> bool:
        if self.stat(key) is not None:
            return False  # saves sending what may be gigabytes
        return self._upload(key, path).run(create_only=True)

    def put(self, key: str, data: bytes) -> None:
        where = self.uri(key)

        async def attempt() -> None:
            try:
                await self._put(key, where, data)
            except ClientError as error:
                if s3client.status_of(error) == 409:
                    raise Transient("another write of this object was in the way") from None
                raise s3client.unexpected(error, where) from None

        self._wait(lambda: retry_async(attempt, where))

    def put_file(self, key: str, path: Path) -> None:
        self._upload(key, path).run(create_only=False)

    def delete(self, key: str) -> None:
        where = self.uri(key)
        self._wait(lambda: retry_async(lambda: self._delete(key, where), where))

    def list(self, prefix: str = "") -> Iterator[list[ObjectInfo]]:
        check_prefix(prefix)
        where = join_uri(self._root, prefix)
        base = self._prefix + "/" if self._prefix else ""
        arguments: dict[str, Any] = {"Prefix": base + prefix, "MaxKeys": PAGE_ITEMS}
        while True:
            reply = self._wait(lambda: retry_async(lambda: self._list_page(where, dict(arguments)), where))
            page = [
                ObjectInfo(item["Key"][len(base) :], int(item["Size"]), item["ETag"].strip('"'))
                for item in reply.get("Contents", ())
                if not item["Key"].endswith("/")  # markers that stand for folders
            ]
            if page:
                yield page
            if not reply.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = reply["NextContinuationToken"]

    def _full_key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _upload(self, key: str, path: Path) -> FileUpload:
        return FileUpload(self._file_system(), self._bucket, self._full_key(key), self.uri(key), path)

    def _file_system(self) -> Any:
        return s3client.file_system(self._environment)

    def _wait(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return s3client.run(work)

    async def _call(self, method: str, where: str, **arguments: Any) -> dict[str, Any]:
        return await s3client.call(self._file_system(), method, where, Bucket=self._bucket, **arguments)

    async def _head(self, key: str, where: str) -> dict[str, Any] | None:
        """The object's headers; None where there is no such object in an existing bucket."""
        try:
            return await self._call("head_object", where, Key=self._full_key(key))
        except ClientError as error:
            if s3client.status_of(error) != 404:
                raise s3client.unexpected(error, where) from None
        except StorageRefused:  # the answer to a HEAD has no body that tells why: a GET has
            with suppress(ClientError, ObjectMissing):
                await self._fetch(key, where, {"Range": "bytes=0-0"})
            raise Transient("a HEAD was refused where a GET was not") from None
        await self._check_bucket(where)
        return None

    async def _check_bucket(self, where: str) -> None:
        """A HEAD's 404 does not tell a missing bucket from a missing object: ask once."""
        if self._bucket_seen:
            return
        try:
            await self._call("head_bucket", where)
        except ClientError as error:
            if s3client.status_of(error) == 404:
                raise StorageRefused(
                    f"there is no such bucket ({self._bucket})", where, "Make it first, or check its name."
                ) from None
            raise s3client.unexpected(error, where) from None
        except StorageRefused:
            pass  # reading objects may be allowed where asking for the bucket is not
        self._bucket_seen = True

    async def _get(self, key: str, where: str) -> bytes:
        reply, data = await self._fetch(key, where, {})
        expected = reply.get("ContentLength")
        if expected is None:  # a chunked answer does not tell its length
            head = await self._head(key, where)
            expected = -1 if head is None else head["ContentLength"]
        if len(data) != int(expected):
            raise Transient(f"short body: {len(data)} of {expected} bytes")
        return data

    async def _get_range(self, key: str, where: str, start: int, length: int, etag: str | None) -> bytes:
        if not length:
            return b""
        arguments = {"Range": f"bytes={start}-{start + length - 1}"}
        if etag is not None:
            arguments["IfMatch"] = f'"{etag}"'
        try:
            reply, data = await self._fetch(key, where, arguments)
        except ClientError as error:
            status = s3client.status_of(error)
            if status == 412:
                raise _changed(where) from None
            if status == 416:
                return b""  # the object ends before the range begins
            raise s3client.unexpected(error, where) from None
        if etag is not None and reply["ETag"].strip('"') != etag:
            raise _changed(where)  # a store that does not know If-Match
        expected = _expected_bytes(reply, start, length, where)
        if len(data) != expected:
            raise Transient(f"short body: {len(data)} of {expected} bytes")
        return data

    async def _fetch(self, key: str, where: str, arguments: dict[str, str]) -> tuple[dict[str, Any], bytes]:
        try:
            reply = await self._call("get_object", where, Key=self._full_key(key), **arguments)
        except ClientError as error:
            if s3client.status_of(error) == 404:
                raise s3client.missing(where) from None
            raise
        try:
            async with reply["Body"] as body:
                return reply, await body.read()
        except Exception as error:
            s3client.explain(error, where)

    async def _put(self, key: str, where: str, data: bytes, **conditions: Any) -> None:
        await self._call("put_object", where, Key=self._full_key(key), Body=data, **conditions)

    async def _delete(self, key: str, where: str) -> None:
        try:
            await self._call("delete_object", where, Key=self._full_key(key))
        except ClientError as error:
            status = s3client.status_of(error)
            if status == 409:
                raise Transient("a write of this object was in the way") from None
            if status != 404:  # S3 itself says 204 where there is no object, others 404
                raise s3client.unexpected(error, where) from None

    async def _list_page(self, where: str, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            return await self._call("list_objects_v2", where, **arguments)
        except ClientError as error:
            raise s3client.unexpected(error, where) from None


def _expected_bytes(reply: dict[str, Any], start: int, length: int, where: str) -> int:
    """How long the body must be, from the answer's Content-Range."""
    text = str(reply.get("ContentRange", ""))
    try:
        span, _, total = text.removeprefix("bytes ").partition("/")
        first, _, last = span.partition("-")
        if int(first) == start and int(last) + 1 == min(start + length, int(total)):
            return int(last) + 1 - start
    except ValueError:
        size = int(reply.get("ContentLength", -1))
        if not text and start == 0 and 0 <= size <= length:  # the whole object, asked for as a range
            return size
    what = f"the store answers another range than was asked for ({text or 'none'})"
    raise StorageError(what, where, "It must honour range requests: use another endpoint.")


def _changed(where: str) -> ObjectChanged:
    return ObjectChanged("the object changed since it was planned", where, "Run the same command again.")


async def _gather(works: Sequence[Callable[[], Awaitable[T]]], parallel: int) -> list[T]:
    """Run coroutine functions, at most ``parallel`` at a time; the first error ends the others."""
    gate = asyncio.Semaphore(parallel)

    async def one(work: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await work()

    tasks = [asyncio.ensure_future(one(work)) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
