"""Objects in an S3 bucket: AWS, Ceph, MinIO and whatever else speaks the protocol.

Small objects are one PUT; larger ones a multipart upload whose parts go in parallel straight from the caller's buffers
and which is aborted when it fails. Ranges are fetched in parallel straight into the caller's buffers. `create` is a
single PUT with `If-None-Match: *`, never multipart, as servers exist that ignore the condition there.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from botocore.exceptions import ClientError

from rl_ckpt.errors import CheckpointError, CorruptionError, StorageError
from rl_ckpt.store import s3_errors
from rl_ckpt.store.base import (
    Buffer,
    ObjectMissingError,
    StorageOptions,
    Store,
    StoredObject,
    check_name,
    check_prefix,
    flat_segments,
    spare_none,
)
from rl_ckpt.store.local import short_message
from rl_ckpt.store.ranges import Span, plan_spans
from rl_ckpt.store.retry import RetryPolicy, Tries
from rl_ckpt.store.s3_body import Body, cut
from rl_ckpt.store.s3_client import S3Connection, receive
from rl_ckpt.store.s3_small import SmallReads

T = TypeVar("T")

Listing = list[StoredObject]

_PART_BYTES = 16 << 20
_MAX_PARTS = 10_000
_SPAN_BYTES = 16 << 20
_GAP_BYTES = 256 << 10
_AT_ONCE = 16
_FINISH_PARTS_S = 30.0
_TAGGED_BYTES = 1 << 20
_KMS = "x-amz-server-side-encryption"
_WRONG_ANSWERS = 3
"""Tries of a request whose answer has a wrong length: a proxy may be broken for a moment, or for good."""
_ABORT = RetryPolicy(retry_deadline_s=10.0)
"""Not the caller's: after a failure that used up its deadline the clean-up still gets a fair try, and no more."""


class S3Store(Store):
    """Objects below one prefix of a bucket.

    Args:
        url: `s3://bucket` or `s3://bucket/prefix`, as `open_store` normalises it.
        storage_options: As s3fs takes them, and the fields of `RetryPolicy`. Nothing given: the environment and the AWS
            configuration files decide (`AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, `AWS_PROFILE`, keys, roles).
    """

    def __init__(self, url: str, storage_options: StorageOptions | None = None) -> None:
        super().__init__(url, storage_options)
        self._policy, options = RetryPolicy.take(self.storage_options)
        self._connection = S3Connection(options)
        self._connection.open()
        self._bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._bucket_seen = False

    def put(self, name: str, segments: Sequence[Buffer]) -> None:
        """Store by one PUT up to 16 MiB, by a multipart upload of 16 parts at once above."""
        key = self._key(name)
        views = flat_segments(segments)
        if sum(view.nbytes for view in views) <= _PART_BYTES:
            self._run(self._put_one(name, key, views))
        else:
            self._run(self._put_parts(name, key, views))

    def create(self, name: str, data: bytes) -> None:
        """Create by one PUT with `If-None-Match: *`."""
        key = self._key(name)
        self._run(self._put_one(name, key, flat_segments([data]), IfNoneMatch="*"))

    def get(self, name: str) -> bytes:
        """Fetch the whole object in one request."""
        key = self._key(name)

        async def attempt() -> bytes:
            answer = await self._connection.call("get_object", Bucket=self._bucket, Key=key)
            async with answer["Body"] as body:
                data: bytes = await body.raw_stream.read()
            if len(data) <= _TAGGED_BYTES and not _is_encrypted(answer) and not _has_tag(answer, [data]):
                await self._check_length(key, len(data))
            return data

        data = self._run(self._request("GetObject", name, attempt))
        self.stats.count_read(len(data))
        return data

    def getter(self) -> Callable[[str], bytes]:
        """As `get`; all but the first are sent without botocore's work, see `s3_small`."""

        def good(headers: Mapping[str, str], data: bytes) -> bool:
            told = {"ETag": headers.get("etag", ""), "ServerSideEncryption": headers.get(_KMS, "")}
            if headers.get("content-length") != str(len(data)) or not (_is_encrypted(told) or _has_tag(told, [data])):
                return False
            self.stats.count_read(len(data))
            return True

        def ordinary(key: str) -> bytes:
            return self.get(key.removeprefix(self._prefix))

        reads = SmallReads(ordinary, self._connection.last_get, good)
        return lambda name: reads.get(self._key(name))

    def read_into(self, name: str, reads: Sequence[tuple[int, memoryview]]) -> None:
        """Fetch ranges of at most 16 MiB, 16 at once, each received in its place."""
        key = self._key(name)
        spans = plan_spans(reads, span_bytes=_SPAN_BYTES, gap_bytes=_GAP_BYTES)
        if spans:
            self._run(_all_of((self._fetch(name, key, span) for span in spans), _AT_ONCE))
        elif not self.exists(name):
            raise ObjectMissingError(self.object_url(name))

    def list(self, prefix: str = "") -> list[StoredObject]:
        """List page by page; keys that stand for folders, or are hidden, are left out."""
        check_prefix(prefix)
        return self._run(self._list(prefix))

    def delete(self, names: Sequence[str]) -> None:
        """Delete one by one, 16 at once: the request for many at a time is not understood everywhere."""
        keys = [(name, self._key(name)) for name in names]
        self._run(_all_of((self._delete(name, key) for name, key in keys), _AT_ONCE))

    def exists(self, name: str) -> bool:
        """Ask for the object's head."""
        key = self._key(name)
        try:
            self._run(self._api("HeadObject", name, "head_object", Bucket=self._bucket, Key=key))
        except ObjectMissingError:
            self._run(self._check_bucket())
            return False
        return True

    def clean_partial(self, older_than_s: float, spare: Callable[[str], bool] = spare_none) -> int:
        """Abort unfinished multipart uploads below the prefix: one listing, and a request for each."""
        return self._run(self._abort_uploads(datetime.now(UTC) - timedelta(seconds=older_than_s), spare))

    def endpoint(self) -> str:
        """Address of the server, for people."""
        return self._connection.endpoint()

    def _key(self, name: str) -> str:
        return self._prefix + check_name(name)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._connection.run(coroutine)

    async def _request(
        self, operation: str, name: str, attempt: Callable[[], Awaitable[T]], policy: RetryPolicy | None = None
    ) -> T:
        """Try until it succeeds, fails for good or the deadline has passed; errors come out as this floor's."""
        tries, connection = Tries(policy or self._policy), self._connection
        renewed = False
        while True:
            era = connection.era()
            try:
                async with connection.pace.turn() as began:
                    result = await attempt()
                    connection.pace.went_well()
                return result
            except Exception as error:
                if not s3_errors.is_expected(error):
                    raise
                if not renewed and s3_errors.is_outdated(error) and await connection.renew(era):
                    renewed, wait = True, tries.next_wait_s()
                else:
                    wait = self._wait_s(error, tries, began)
                if wait is None:
                    url = self.object_url(name)
                    endpoint, told = self._connection.endpoint(), tries.told()
                    # In no variable: a cycle with its traceback would keep the caller's buffers.
                    raise (
                        s3_errors.signal(error, url) or s3_errors.explain(error, operation, url, endpoint, told)
                    ) from error
            self.stats.count_retry()
            await asyncio.sleep(wait)

    def _wait_s(self, error: Exception, tries: Tries, began: int) -> float | None:
        """How long to wait before the next try; None where there is none."""
        if not s3_errors.is_transient(error):
            return None
        if isinstance(error, s3_errors.WrongAnswerError) and tries.count >= _WRONG_ANSWERS:
            return None
        throttled = s3_errors.is_throttle(error)
        if throttled:
            self._connection.pace.slow_down(began)
        return tries.next_wait_s(known=self._connection.answered, throttled=throttled)

    async def _api(
        self, operation: str, name: str, method: str, *, has: str = "ResponseMetadata", **parameters: Any
    ) -> dict[str, Any]:
        """A request whose answer has the field `has`: botocore takes a gateway's page for an answer without fields."""

        async def attempt() -> dict[str, Any]:
            answer = await self._connection.call(method, **parameters)
            if has not in answer:
                raise s3_errors.WrongAnswerError(f"the answer is not S3's: it has no {has}")
            return answer

        return await self._request(operation, name, attempt)

    async def _put_one(self, name: str, key: str, views: Sequence[memoryview], **condition: str) -> None:
        body = Body(views) if views else b""

        async def attempt() -> None:
            answer = await self._connection.call("put_object", Bucket=self._bucket, Key=key, Body=body, **condition)
            if not _has_tag(answer, views):
                await self._check_length(key, len(body))

        await self._request("PutObject", name, attempt)
        self.stats.count_write(len(body))

    async def _check_length(self, key: str, size_bytes: int) -> None:
        head = await self._connection.call("head_object", Bucket=self._bucket, Key=key)
        if head["ContentLength"] != size_bytes:
            raise s3_errors.WrongAnswerError(
                f"{size_bytes} bytes went over the wire, the object has {head['ContentLength']}"
            )

    async def _put_parts(self, name: str, key: str, views: Sequence[memoryview]) -> None:
        where = {"Bucket": self._bucket, "Key": key}
        parts = cut(views, part_bytes(sum(view.nbytes for view in views)))
        begun = await self._api("CreateMultipartUpload", name, "create_multipart_upload", has="UploadId", **where)
        upload = where | {"UploadId": begun["UploadId"]}
        try:
            # A part that the server handles after the abort would bring the upload back: those on their way must arrive
            # first.
            uploads = (self._put_part(name, upload, n, p) for n, p in enumerate(parts, 1))
            etags = await _all_of(uploads, _AT_ONCE, finish_s=_FINISH_PARTS_S)
            await self._complete(name, upload, etags, sum(view.nbytes for view in views))
        except BaseException:
            # Also on cancellation. A crash before this line leaves an upload for clean_partial, never an object.
            await self._abort(name, upload)
            raise

    async def _put_part(self, name: str, upload: dict[str, str], number: int, views: Sequence[memoryview]) -> str:
        body = Body(views)
        answer = await self._api("UploadPart", name, "upload_part", PartNumber=number, Body=body, **upload)
        self.stats.count_write(len(body))
        return str(answer["ETag"])

    async def _complete(self, name: str, upload: dict[str, str], etags: Sequence[str], size_bytes: int) -> None:
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]

        async def attempt() -> None:
            try:
                answer = await self._connection.call(
                    "complete_multipart_upload", MultipartUpload={"Parts": parts}, **upload
                )
                if "ETag" not in answer:
                    raise s3_errors.WrongAnswerError("the answer is not S3's: it has no ETag")
            except ClientError as error:
                # The reply to an earlier try was lost after it landed: then the upload is gone and the object there.
                if s3_errors.code_and_status(error)[0] != "NoSuchUpload" or not await self._landed(upload, parts):
                    raise

        await self._request("CompleteMultipartUpload", name, attempt)
        await self._check_size(name, upload["Key"], size_bytes)

    async def _landed(self, upload: dict[str, str], parts: Sequence[Any]) -> bool:
        head = await self._connection.call("head_object", Bucket=upload["Bucket"], Key=upload["Key"])
        return str(head.get("ETag", "")).strip('"').endswith(f"-{len(parts)}")

    async def _check_size(self, name: str, key: str, size_bytes: int) -> None:
        head = await self._api("HeadObject", name, "head_object", Bucket=self._bucket, Key=key)
        if head["ContentLength"] != size_bytes:
            raise StorageError(
                f"upload of {self.object_url(name)} ended with {head['ContentLength']} bytes instead of {size_bytes}: "
                "another writer used the same name, or the server lost a part. Save again"
            )

    async def _abort(self, name: str, upload: dict[str, str]) -> None:
        try:
            call = partial(self._connection.call, "abort_multipart_upload", **upload)
            await self._request("AbortMultipartUpload", name, call, _ABORT)
        except (ObjectMissingError, CheckpointError):
            return  # The failure that led here is what the caller must hear; clean_partial removes what is left.

    async def _fetch(self, name: str, key: str, span: Span) -> None:
        await self._request("GetObject", name, lambda: self._fetch_once(name, key, span))
        self.stats.count_read(span.size_bytes)

    async def _fetch_once(self, name: str, key: str, span: Span) -> None:
        where = {"Bucket": self._bucket, "Key": key}
        try:
            answer = await self._connection.call(
                "get_object", Range=f"bytes={span.offset_bytes}-{span.end_bytes - 1}", **where
            )
        except ClientError as error:
            if s3_errors.code_and_status(error)[1] != 416:
                raise
            head = await self._connection.call("head_object", **where)
            raise CorruptionError(
                short_message(self.object_url(name), span.end_bytes, head["ContentLength"])
            ) from error
        async with answer["Body"] as body:
            self._check_range(name, span, answer)
            await receive(body.raw_stream, span)

    def _check_range(self, name: str, span: Span, answer: dict[str, Any]) -> None:
        said = answer.get("ContentRange")
        if said is None:
            raise s3_errors.WrongAnswerError("the server ignores ranges (no Content-Range)")
        first, _, last = said.removeprefix("bytes ").partition("/")[0].partition("-")
        asked = (str(span.offset_bytes), str(span.end_bytes - 1))
        if (first, last) == asked and answer.get("ContentLength", span.size_bytes) == span.size_bytes:
            return  # a body without a length is counted as it comes
        size = said.rpartition("/")[2]
        if first == asked[0] and size.isdecimal() and int(size) < span.end_bytes:
            raise CorruptionError(short_message(self.object_url(name), span.end_bytes, int(size)))
        raise s3_errors.WrongAnswerError(
            f"bytes {'-'.join(asked)} were asked for, the server sends {said!r}, "
            f"{answer.get('ContentLength', 'an unknown number of')} bytes long"
        )

    async def _list(self, prefix: str) -> Listing:
        found: list[StoredObject] = []
        page: dict[str, str] = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        while True:
            answer = await self._api("ListObjectsV2", prefix, "list_objects_v2", has="Name", **page)
            for entry in answer.get("Contents", ()):
                name = entry["Key"].removeprefix(self._prefix)
                if not any(part[:1] in ("", ".") for part in name.split("/")):
                    found.append(StoredObject(name, entry["Size"], entry["LastModified"].timestamp()))
            if not answer.get("IsTruncated"):
                return sorted(found, key=lambda o: o.name)
            page["ContinuationToken"] = answer["NextContinuationToken"]

    async def _delete(self, name: str, key: str) -> None:
        try:
            await self._api("DeleteObject", name, "delete_object", Bucket=self._bucket, Key=key)
        except ObjectMissingError:
            return

    async def _check_bucket(self) -> None:
        """A head of something missing does not say whether it is the object or the bucket: ask once."""
        if not self._bucket_seen:
            await self._api("ListObjectsV2", "", "list_objects_v2", Bucket=self._bucket, MaxKeys=1)
            self._bucket_seen = True

    async def _abort_uploads(self, before: datetime, spare: Callable[[str], bool]) -> int:
        page: dict[str, str] = {"Bucket": self._bucket, "Prefix": self._prefix}
        stale: list[dict[str, str]] = []
        while True:
            answer = await self._api("ListMultipartUploads", "", "list_multipart_uploads", has="Bucket", **page)
            stale.extend(
                {"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                for upload in answer.get("Uploads", ())
                if upload["Initiated"] <= before and not spare(upload["Key"].removeprefix(self._prefix))
            )
            if not answer.get("IsTruncated"):
                break
            page |= {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}
        await _all_of((self._abort(upload["Key"], upload) for upload in stale), _AT_ONCE)
        return len(stale)


def _has_tag(answer: dict[str, Any], views: Sequence[Buffer]) -> bool:
    """Whether an answer's ETag is the MD5 of these bytes, as it is where the bucket does not encrypt by a key of KMS.

    Otherwise nothing is known, and the length must be asked for. Of large bodies that is cheaper from the start.
    """
    if sum(len(view) for view in views) > _TAGGED_BYTES:
        return False
    found = hashlib.md5(usedforsecurity=False)
    for view in views:
        found.update(view)
    return str(answer.get("ETag", "")).strip('"') == found.hexdigest()


def _is_encrypted(answer: dict[str, Any]) -> bool:
    """Whether the ETag says nothing about the bytes; records and manifests tell for themselves."""
    return str(answer.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in answer


def part_bytes(size_bytes: int) -> int:
    """Part size, a whole number of MiB, with which an object fits in the 10,000 parts that S3 allows."""
    needed = -(-size_bytes // _MAX_PARTS)
    return max(_PART_BYTES, -(-needed >> 20) << 20)


async def _all_of(coroutines: Iterable[Coroutine[Any, Any, T]], at_once: int, finish_s: float = 0.0) -> list[T]:
    """Run coroutines, some at once, results in order; after the first failure no more are begun.

    Those under way then get `finish_s` seconds to end by themselves, are cancelled, and are waited for.
    """
    waiting = list(enumerate(coroutines))[::-1]
    results: dict[int, T] = {}

    async def work() -> None:
        while waiting:
            number, coroutine = waiting.pop()
            results[number] = await coroutine

    count = len(waiting)
    workers = [asyncio.ensure_future(work()) for _ in range(min(at_once, count))]
    try:
        await asyncio.gather(*workers)
    finally:
        for _, coroutine in waiting:
            coroutine.close()
        waiting.clear()
        if finish_s and workers:
            await asyncio.wait(workers, timeout=finish_s)
        await _end(workers)
        workers.clear()  # their error has this frame in its traceback: a cycle, which would keep the caller's buffers
    return [results[number] for number in range(count)]


async def _end(workers: Sequence[asyncio.Future[None]]) -> None:
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
