"""Sending a local file to S3, in parts where it is long."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from botocore.exceptions import ClientError

from segpipe.errors import StorageError
from segpipe.storage import s3client
from segpipe.storage.retry import Transient, retry_async

PART_BYTES: Final = 16 << 20
MAX_PARTS: Final = 9_000  # the limit is 10,000
PARALLEL_PARTS: Final = 4


class FileUpload:
    """One file on its way to ``key``. A kill leaves at most parts that no reader sees.

    At most ``PARALLEL_PARTS`` parts are in memory. Such leftovers cost space until the bucket's life-cycle
    rule for incomplete multipart uploads removes them.
    """

    def __init__(self, file_system: Any, bucket: str, key: str, where: str, path: Path) -> None:
        self._file_system = file_system
        self._target = {"Bucket": bucket, "Key": key}
        self._where = where
        self._path = path
        self._size = path.stat().st_size
        self._token = {s3client.PUT_TOKEN: uuid4().hex}  # see S3Storage.put_if_absent

    def run(self, *, create_only: bool) -> bool:
        """True = the object holds the file's bytes because of this call.

        False = with ``create_only`` there was one before; else one is replaced.
        """
        conditions = {"IfNoneMatch": "*"} if create_only else {}
        return s3client.run(lambda: retry_async(lambda: self._attempt(conditions), self._where))

    async def _attempt(self, conditions: dict[str, str]) -> bool:
        try:
            if self._size <= PART_BYTES:
                body = await asyncio.to_thread(self._read, 0, PART_BYTES)
                await self._call("put_object", Body=body, Metadata=self._token, **conditions)
            else:
                await self._send_parts(conditions)
            return True
        except ClientError as error:
            status = s3client.status_of(error)
            if status not in (404, 409, 412):  # 404: the upload is gone, perhaps because it was completed
                raise s3client.unexpected(error, self._where) from None
        try:
            head = await self._call("head_object")
        except ClientError as error:
            if s3client.status_of(error) == 404:
                raise Transient("another write of this object was in the way") from None
            raise s3client.unexpected(error, self._where) from None
        if s3client.put_token(head) == self._token[s3client.PUT_TOKEN]:
            return True
        if conditions:
            return False
        raise Transient("another write of this object was in the way")

    async def _send_parts(self, conditions: dict[str, str]) -> None:
        started = await self._call("create_multipart_upload", Metadata=self._token)
        upload = {"UploadId": started["UploadId"]}
        try:
            part_bytes = max(PART_BYTES, -(-self._size // MAX_PARTS))
            starts = range(0, self._size, part_bytes)
            gate = asyncio.Semaphore(PARALLEL_PARTS)

            async def send(number: int, start: int) -> dict[str, Any]:
                async with gate:
                    body = await asyncio.to_thread(self._read, start, min(part_bytes, self._size - start))
                    arguments = {"PartNumber": number, "Body": body, **upload}
                    reply = await retry_async(lambda: self._call("upload_part", **arguments), self._where)
                    return {"PartNumber": number, "ETag": reply["ETag"]}

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(send(number, start)) for number, start in enumerate(starts, 1)]
            parts = {"Parts": [task.result() for task in tasks]}
            complete = {"MultipartUpload": parts, **upload, **conditions}
            await retry_async(lambda: self._call("complete_multipart_upload", **complete), self._where)
        except BaseException as error:
            with suppress(Exception):
                await self._call("abort_multipart_upload", **upload)
            raise _first(error) from None

    def _read(self, start: int, length: int) -> bytes:
        with open(self._path, "rb") as file:
            file.seek(start)
            data = file.read(length)
        if len(data) != min(length, self._size - start):
            what = "the file changed while it was sent"
            raise StorageError(what, str(self._path), "Run the same command again.")
        return data

    async def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return await s3client.call(self._file_system, method, self._where, **self._target, **arguments)


def _first(error: BaseException) -> BaseException:
    """The first error inside a group of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
