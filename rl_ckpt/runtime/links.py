"""Links: a run's actors, found or started from any process of the cluster."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import ray

from rl_ckpt.errors import CheckpointError, InvalidInputError
from rl_ckpt.runtime.coordinator import Coordinator
from rl_ckpt.runtime.messages import Failure, decode, encode
from rl_ckpt.runtime.server_actor import start_server
from rl_ckpt.runtime.spec import NAMESPACE, RunSpec

_RANKS_AT_ONCE = 20_000  # calls that may wait in the coordinator: more than there are ranks

_coordinators: dict[str, Any] = {}
_servers: dict[str, str] = {}  # service id → this node's shard server, once it has answered
_handles: dict[str, Any] = {}  # service id → the handle of that server


def start_coordinator(spec: RunSpec) -> RunSpec:
    """Finds the run's coordinator or starts it.

    Returns:
        The spec with the coordinator's id in it.
    """
    actor: Any = ray.remote(Coordinator)
    handle = actor.options(
        name=spec.coordinator,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        num_cpus=0,
        max_concurrency=_RANKS_AT_ONCE,
    ).remote(spec)
    service: str = handle._actor_id.hex()
    _coordinators[service] = handle
    return dataclasses.replace(spec, service=service)


def coordinator(spec: RunSpec) -> Any:
    """The handle of the run's coordinator, in any process.

    Raises:
        InvalidInputError: It was ended.
    """
    if spec.service not in _coordinators:
        try:
            _coordinators[spec.service] = ray.get_actor(spec.coordinator, namespace=NAMESPACE)
        except ValueError as error:
            raise InvalidInputError(
                f"the service of {spec.url} was ended: its Checkpointer was closed, or its cluster is gone; "
                "make a new one"
            ) from error
    return _coordinators[spec.service]


def ensure_server(spec: RunSpec) -> str:
    """Name of the shard server of the node where this runs; it is started where there is none."""
    if spec.service not in _servers:
        node = ray.get_runtime_context().get_node_id()
        ray.get(start_server(spec, node).ready.remote())
        _servers[spec.service] = spec.server(node)
    return _servers[spec.service]


def server(spec: RunSpec) -> Any:
    """The handle of this node's shard server, in any process that has called `ensure_server`."""
    if spec.service not in _handles:
        _handles[spec.service] = ray.get_actor(_servers[spec.service], namespace=NAMESPACE)
    return _handles[spec.service]


class ToldError(Exception):
    """The coordinator answered with a failure: it knows, and has told the other ranks."""

    def __init__(self, error: CheckpointError) -> None:
        """Carries the error to be raised to the caller."""
        super().__init__(str(error))
        self.error = error


def ask(method: Any, message: msgspec.Struct, kind: Any) -> Any:
    """Calls a method of the coordinator and waits.

    Args:
        method: Of the coordinator's handle.
        message: What to send.
        kind: Which replies there may be, beside `Failure`.

    Raises:
        ToldError: It answered with a failure.
    """
    return Asked(method.remote(encode(message)), kind).get()


class Asked:
    """A question to the coordinator whose answer is not there yet."""

    def __init__(self, ref: Any, kind: Any) -> None:
        """What was asked, as Ray's reference, and which replies there may be, beside `Failure`."""
        self._ref = ref
        self._kind = kind

    def if_there(self) -> Any:
        """The answer, or None where it is not there yet.

        Raises:
            ToldError: It is a failure.
        """
        ready, _ = ray.wait([self._ref], timeout=0)
        return self.get() if ready else None

    def get(self) -> Any:
        """Waits for the answer.

        Raises:
            ToldError: It is a failure.
        """
        reply = decode(ray.get(self._ref), self._kind | Failure)
        if isinstance(reply, Failure):
            raise ToldError(reply.error())
        return reply
