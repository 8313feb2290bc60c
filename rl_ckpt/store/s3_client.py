"""One process's connection to an S3 server: s3fs's own client, tuned, and the bodies that go through it uncopied.

s3fs finds endpoint, credentials and region as every AWS tool does, and takes the same storage options as ever; its
client runs on fsspec's event loop thread, which all threads of the process share. What is tuned, and why (1 GiB,
loopback): payload signing and the default checksums cost half of the speed and our digests cover the bytes end to end;
botocore's own retries are off as they cannot be counted; listings and instances are not cached; the bytes of parts and
reads go over `s3_bulk`'s sockets unless the caller names another `http_session_cls`.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakSet

from botocore import exceptions as boto
from botocore.exceptions import ClientError
from s3fs import S3FileSystem

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.store.pace import Pace
from rl_ckpt.store.ranges import Span, SpanWriter
from rl_ckpt.store.s3_body import Body
from rl_ckpt.store.s3_bulk import BulkAnswer, BulkSession
from rl_ckpt.store.s3_errors import WrongAnswerError
from rl_ckpt.store.s3_small import Sent

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 4
_READ_TIMEOUT_S = 30
_POOL_CONNECTIONS = 64
_WATCHED_BYTES = 64 << 10
"""Smaller bodies fit into the socket's buffers."""

_LEFT_BY_FORK: list[S3FileSystem] = []
"""Clients of the parent process: closing one here would wait for a loop thread that does not exist in this process."""


class S3Connection:
    """The client of this process, made at first use and again after a fork.

    Args:
        options: As s3fs takes them; the caller's settings win over ours.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._lock = threading.Lock()
        self._fs: S3FileSystem | None = None
        self._pid = 0
        self._registered = WeakSet[Any]()
        self._retired: list[S3FileSystem] = []
        self._renewing: asyncio.Lock | None = None
        self.pace = Pace()
        """Of this process's requests."""
        self.answered = False
        """Whether the server has answered anything yet."""

    def open(self) -> asyncio.AbstractEventLoop:
        """Make the client of this process unless it is there; the loop that it runs on.

        Raises:
            InvalidInputError: s3fs does not take the options.
        """
        loop: asyncio.AbstractEventLoop = self._filesystem().loop
        return loop

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop thread and wait; an interrupt of the waiting thread cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.open())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            del future  # its error has this frame in its traceback: a cycle, which would keep the caller's buffers

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One request, one try; errors are botocore's and aiohttp's own.

        Args:
            method: Name of the client's method, such as `put_object`.
            **parameters: Of S3's request, as boto3 documents them.
        """
        fs = self._filesystem()
        client = await self._client(fs, parameters["Bucket"])
        bound, body = getattr(client, method), parameters.get("Body")
        try:
            under_way = bound(**fs._get_s3_method_kwargs(bound, **parameters))
            if isinstance(body, Body) and len(body) >= _WATCHED_BYTES:
                under_way = _unless_stuck(under_way, body, client.meta.config.read_timeout)
            answer: dict[str, Any] = await under_way
        except ClientError:
            self.answered = True
            raise
        self.answered = True
        return answer

    def last_get(self) -> tuple[BulkSession, Sent] | None:
        """The last GET of a whole object, and the session that sent it; None where it is not one of ours."""
        client: Any = self._filesystem()._s3
        if client is None:
            return None
        session, credentials = client._endpoint.http_session, client._request_signer._credentials
        if not isinstance(session, BulkSession) or session.last_get is None or credentials is None:
            return None
        keys = self.run(_frozen(credentials))
        return session, Sent(*session.last_get, keys.secret_key)

    def era(self) -> object:
        """What `renew` is told: it changes with the credentials."""
        return self._fs

    async def renew(self, era: object) -> bool:
        """Look for newer credentials where the first ones came from: environment, files, role, the options.

        Args:
            era: What `era` said when the request was sent that they did not serve for.

        Returns:
            Whether there are any; requests from here on use them.
        """
        if self._renewing is None:
            self._renewing = asyncio.Lock()
        async with self._renewing:
            old = self._filesystem()
            if old is not era:
                return True  # another request has found them meanwhile
            try:
                new = S3FileSystem(**_tuned(self._options))
                await new.set_session()
                found = await _keys(new)
            except (boto.BotoCoreError, OSError, ValueError, TypeError, KeyError):
                return False  # their file is just being written, say: what the server said is told
            if found == await _keys(old):
                await new._s3creator.__aexit__(None, None, None)
                return False
            with self._lock:
                # Answers are still being read through the old one: it ends with the next renewal.
                self._retired, self._fs = [old], new
            return True

    async def _client(self, fs: S3FileSystem, bucket: str) -> Any:
        try:
            await fs.set_session()
            client = await fs.get_s3(bucket)
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidInputError(f"cannot open s3://{bucket}: {error}. Check storage_options") from error
        if client not in self._registered:
            # Else each part waits for "100 Continue", which some servers and proxies never send.
            client.meta.events.register_first("before-sign.s3", _drop_expect)
            self._registered.add(client)
        return client

    def endpoint(self) -> str:
        """Address of the server for messages, or how it would be found."""
        client = self._fs and self._fs._s3
        return str(client.meta.endpoint_url) if client else "the S3 endpoint"

    def _filesystem(self) -> S3FileSystem:
        with self._lock:
            if self._fs is not None and self._pid != os.getpid():
                _LEFT_BY_FORK.append(self._fs)
                self._fs = None
                self._renewing, self.pace, self.answered = None, Pace(), False
            if self._fs is None:
                try:
                    self._fs = S3FileSystem(**_tuned(self._options))
                except (ValueError, TypeError, KeyError) as error:
                    raise InvalidInputError(f"storage_options do not fit s3fs: {error}") from error
                self._pid = os.getpid()
            return self._fs


def _tuned(options: Mapping[str, Any]) -> dict[str, Any]:
    config = {
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "read_timeout": _READ_TIMEOUT_S,
        "max_pool_connections": _POOL_CONNECTIONS,
        "http_session_cls": BulkSession,
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        **options.get("config_kwargs", {}),
    }
    config["s3"] = {"payload_signing_enabled": False, **config.get("s3", {})}
    return {**options, "config_kwargs": config, "use_listings_cache": False, "skip_instance_cache": True}


async def _frozen(credentials: Any) -> Any:
    return await credentials.get_frozen_credentials()


async def _keys(fs: S3FileSystem) -> object:
    found = fs._s3._request_signer._credentials
    return tuple(await found.get_frozen_credentials()) if found is not None else None


async def _unless_stuck(under_way: Coroutine[Any, Any, T], body: Body, stall_s: float | None) -> T:
    """A request that aiohttp sends, unless the server takes no more of its body: aiohttp waits for ever then.

    The limit is of standing still, not of the whole: what is slow and moves goes on.
    """
    task = asyncio.ensure_future(under_way)
    try:
        while stall_s:
            sent = body.sent
            await asyncio.wait([task], timeout=stall_s)
            if task.done() or (sent is not None and body.sent == sent < len(body)):
                break
        if not task.done() and stall_s:
            raise boto.ReadTimeoutError(endpoint_url="the server", error=f"it took no more bytes for {stall_s} s")
        return await task
    finally:
        task.cancel()
        while not task.done():  # who cancels may do so twice
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # marks it as seen
        del task  # its error has this frame in its traceback: a cycle, which would keep the caller's buffers


def _drop_expect(request: Any, **_: Any) -> None:
    del request.headers["Expect"]


async def receive(raw: Any, span: Span) -> None:
    """Spread the body of an answer over the pieces of a span.

    Args:
        raw: The answer's raw stream, of `BulkSession` or of another of aiobotocore's sessions.
        span: Of the body's size.
    """
    if isinstance(raw, BulkAnswer):
        await raw.read_span(span)
        return
    writer = SpanWriter(span)
    async for chunk in raw.content.iter_any():
        writer.write(chunk)
    if writer.position != span.end_bytes:
        raise WrongAnswerError(f"{writer.position - span.offset_bytes} bytes came instead of {span.size_bytes}")
