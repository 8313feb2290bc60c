"""Server calls: the coordinator's handles of shard servers, by name."""

from __future__ import annotations

from typing import Any

import msgspec
import ray

from rl_ckpt.errors import StorageError
from rl_ckpt.runtime.messages import Failure, decode, encode
from rl_ckpt.runtime.spec import NAMESPACE, NODE_CHARS, RunSpec


class Servers:
    """See the module."""

    def __init__(self) -> None:
        """None known."""
        self._handles: dict[str, Any] = {}

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

    def configure(self, spec: RunSpec) -> None:
        """Tells all of them of a driver's options and credentials."""
        for name in self._handles:
            self.get(name).configure.remote(spec)


def node_is_dead(name: str) -> bool:
    """Whether a shard server's node is known to be dead: then the server does not come back."""
    return not any(node["Alive"] and name.endswith(f"-{node['NodeID'][:NODE_CHARS]}") for node in ray.nodes())
