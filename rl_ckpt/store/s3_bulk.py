"""Bulk bytes between the caller's memory and an S3 server, over blocking sockets in threads.

s3fs's client finds the credentials, signs every request and understands every answer; this room only replaces how the
bytes of parts and of reads pass the socket: parts are sent straight from the caller's buffers, and bodies of ranged
reads are received straight into them, each in a thread that holds no lock meanwhile. On an event loop all of them share
one core, and are copied once more. Other requests, and whatever needs more than a plain connection (a proxy, a
redirect, the caller's own connector), take aiohttp's way.

Promises that when a request has ended, by an answer, a failure or cancellation, no thread uses its buffers any more.
Does not retry, and tells failures in botocore's words, as aiohttp's way does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from aiobotocore.awsrequest import AioAWSResponse
from aiobotocore.httpsession import AIOHTTPSession
from botocore.httpsession import ProxyConfiguration

from rl_ckpt.store.ranges import Span
from rl_ckpt.store.s3_body import Body
from rl_ckpt.store.s3_wire import Exchange, WirePool, WireSettings

T = TypeVar("T")

_FROM_BYTES = 64 << 10
"""Smaller bodies are not worth a thread."""


class BulkSession(AIOHTTPSession):  # type: ignore[misc]  # aiobotocore has no types
    """The HTTP side of aiobotocore's client, by its option `http_session_cls`; the arguments are aiobotocore's."""

    def __init__(
        self,
        verify: bool | str = True,
        proxies: Mapping[str, str] | None = None,
        timeout: Any = None,
        max_pool_connections: int = 10,
        socket_options: Sequence[tuple[int, int, int]] | None = None,
        client_cert: str | tuple[str, str] | None = None,
        proxies_config: Mapping[str, Any] | None = None,
        connector_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            verify, proxies, timeout, max_pool_connections, socket_options, client_cert, proxies_config, connector_args
        )
        connect_s, read_s = timeout if isinstance(timeout, list | tuple) else (timeout, timeout)
        self.wires = WirePool(WireSettings(connect_s, read_s, verify, client_cert, tuple(socket_options or ())))
        """Connections; for `s3_small` too."""
        self.last_get: tuple[str, dict[str, str | bytes]] | None = None
        """Url and headers of the last GET of a whole object that was sent from here; None where others send them."""
        self._threads = ThreadPoolExecutor(max_pool_connections, "rl_ckpt-s3")
        self._proxies = ProxyConfiguration(proxies=proxies)
        self._own_connector = set(connector_args or ()) - {"keepalive_timeout"}

    async def __aexit__(self, *exc: Any) -> None:
        self.wires.close()
        self._threads.shutdown(wait=False)
        await super().__aexit__(*exc)

    async def send(self, request: Any) -> Any:
        """Send one signed request; of a range of an object that was found, the body is left for `BulkAnswer`."""
        get = request.method == "GET"
        ours = get or (isinstance(request.body, Body) and len(request.body) >= _FROM_BYTES)
        if not ours or self._own_connector or self._proxies.proxy_url_for(request.url):
            return await super().send(request)
        body = request.body.views if isinstance(request.body, Body) else ()
        exchange = Exchange(self.wires, request.method, request.url, request.headers, body)
        raw = BulkAnswer(self._threads, exchange)
        ranged = get and "Range" in request.headers
        if get and not ranged:
            self.last_get = (request.url, dict(request.headers.items()))
        run = partial(exchange.run, lambda status: not ranged or status >= 300)
        status, headers, raw.data = await raw.in_thread(run)
        if 300 <= status < 400:  # to the bucket's own region
            return await super().send(request)
        return AioAWSResponse(request.url, status, headers, raw)


class BulkAnswer:
    """The body of an answer, on its connection until it is read or closed."""

    def __init__(self, threads: ThreadPoolExecutor, exchange: Exchange) -> None:
        self._threads = threads
        self._exchange = exchange
        self.data: bytes | None = None
        """The body, where it has been read already."""

    async def read(self) -> bytes:
        """The whole body."""
        if self.data is None:
            self.data = await self.in_thread(self._exchange.read)
        return self.data

    async def read_span(self, span: Span) -> None:
        """Receive the body into the pieces of a span."""
        await self.in_thread(lambda: self._exchange.read_span(span))

    def close(self) -> None:
        """Let go of the connection, if it is not free yet."""
        self._exchange.close()

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run a blocking step; on cancellation the connection is cut and the thread waited for."""
        job = self._threads.submit(work)
        future = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self._exchange.cut()
            while not (future.done() or job.cancel()):  # who cancels may do so twice
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            if future.done() and not future.cancelled():
                future.exception()  # that it was cut; marks it as seen
            self._exchange.close()  # an answer may have come just before the cut, and nobody will read it
            raise
        finally:
            del job, future  # their error has this frame in its traceback: a cycle, which would keep the buffers
