"""An S3 server that is slow at will: requests that write shard files wait at a gate until the test opens it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rl_ckpt import Checkpointer
from tests.ray.holders import WAIT_S
from tests.s3_servers import S3Server
from tests.store.faulty_proxy import Fault, run_proxy


@dataclass
class Gate:
    """The server behind the gate, open at first."""

    server: S3Server
    gate: threading.Event = field(default_factory=threading.Event)
    waiting: threading.Event = field(default_factory=threading.Event)
    """Set once a request has come to the closed gate."""

    def close(self) -> None:
        self.waiting.clear()
        self.gate.clear()

    def open(self) -> None:
        self.gate.set()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Closed now, and open at the end of the block even where the test fails: what waits could not end else."""
        self.close()
        try:
            yield
        finally:
            self.open()

    def storage_options(self) -> dict[str, Any]:
        return self.server.storage_options()

    def new_url(self) -> str:
        """Of a run that is not there yet, in a bucket of its own."""
        return f"s3://{self.server.new_bucket()}/run"

    def new_run(self, **options: Any) -> Checkpointer:
        """On such a run, behind the gate."""
        return Checkpointer(self.new_url(), storage_options=self.storage_options(), **options)


@contextmanager
def run_gated(server: S3Server, paths: str = "/shards/") -> Iterator[Gate]:
    """A gate in front of a server, for what is written to such paths."""
    with run_proxy(server) as proxy:
        gate = Gate(S3Server("gated", proxy.url, server.key, server.secret))
        gate.open()
        take = proxy.take

        def hold(method: str, path: str) -> Fault | None:
            if method in ("PUT", "POST") and paths in path and not gate.gate.is_set():
                gate.waiting.set()
                gate.gate.wait(WAIT_S)
            return take(method, path)

        setattr(proxy, "take", hold)  # noqa: B010 - one proxy is told, not the class
        try:
            yield gate
        finally:
            gate.open()
