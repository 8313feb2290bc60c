"""Server calls: the coordinator's handles of shard servers, by name."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any

import msgspec
import ray

from rl_ckpt.errors import StorageError
from rl_ckpt.format.digest import digest
from rl_ckpt.plan.parts import Held
from rl_ckpt.runtime.messages import Failure, decode, encode
from rl_ckpt.runtime.spec import NAMESPACE, NODE_CHARS, RunSpec

_SERVE_S = 5.0  # for a range of what is all there, or not at all


class Servers:
    """See the module."""

    def __init__(self) -> None:
        """None known."""
        self._handles: dict[str, Any] = {}
        self._forgetting: dict[str, set[asyncio.Task[None]]] = {}

    def note(self, name: str) -> None:
        """A server takes part."""
        self._handles.setdefault(name, None)

    def names(self) -> list[str]:
        """Of those that took part so far."""
        return sorted(name for name in self._handles if name)

    def look_again(self) -> None:
        """A call failed: a server may come back under its name, as another actor."""
        self._handles = dict.fromkeys(self._handles)

    def get(self, name: str) -> Any:
        """The handle.

        Raises:
            StorageError: It is gone.
        """
        if self._handles.get(name) is None:
            try:
                self._handles[name] = ray.get_actor(name, namespace=NAMESPACE)
            except ValueError as error:
                raise StorageError(f"shard server {name} is gone, with its node or because it was ended") from error
        return self._handles[name]

    async def call(self, name: str, method: str, message: msgspec.Struct, kind: Any) -> Any:
        """Calls a method that takes a message and answers with one.

        Args:
            name: Of the server.
            method: Of it.
            message: What to send.
            kind: Which answers there may be, beside `Failure`.

        Raises:
            CheckpointError: What the server answered, or that it is gone.
            ray.exceptions.RayError: It could not be reached.
        """
        answer = decode(await getattr(self.get(name), method).remote(encode(message)), kind | Failure)
        if isinstance(answer, Failure):
            raise answer.error()
        return answer

    def forget(self, names: Iterable[str], keys: Iterable[str]) -> None:
        """Has servers give up memory of restores; `forgotten` waits for it.

        Args:
            names: Of the servers.
            keys: Of the orders whose memory it is.
        """
        for name in names:
            task = asyncio.get_running_loop().create_task(self._forget(name, tuple(keys)))
            pending = self._forgetting.setdefault(name, set())
            pending.add(task)
            task.add_done_callback(pending.discard)

    async def _forget(self, name: str, keys: tuple[str, ...]) -> None:
        with contextlib.suppress(StorageError, ray.exceptions.RayError):  # gone, and its memory with it
            for ref in [self.get(name).forget.remote(key) for key in keys]:
                await ref

    async def forgotten(self, name: str) -> None:
        """Waits until a server has given up what it was told to."""
        pending = self._forgetting.get(name)
        if pending:
            await asyncio.wait(set(pending))

    async def held_chunk(self, copies: Iterable[Held], chunk: bytes, size_bytes: int) -> bytes | None:
        """A chunk out of one of its holders' memory, through Ray; the first that is good.

        Args:
            copies: Where it may be.
            chunk: Its digest.
            size_bytes: Its size.

        Returns:
            Its bytes; None where no holder gives them.
        """
        for copy in copies:
            try:
                server = self.get(copy.server)
                parts = await server.serve.remote(copy.part, [(copy.offset, size_bytes)], _SERVE_S)
            except (StorageError, ray.exceptions.RayError):  # this one is gone, or does not have it any more
                continue
            data = bytes(parts[0].data)
            if digest(data) == chunk:
                return data
        return None

    def configure(self, spec: RunSpec) -> None:
        """Tells all of them of a driver's options and credentials."""
        for name in self._handles:
            with contextlib.suppress(StorageError):  # it is gone
                self.get(name).configure.remote(spec)


def node_is_dead(name: str) -> bool:
    """Whether a shard server's node is known to be dead: then the server does not come back."""
    return not any(node["Alive"] and name.endswith(f"-{node['NodeID'][:NODE_CHARS]}") for node in ray.nodes())
