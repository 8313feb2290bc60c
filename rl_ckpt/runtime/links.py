"""Links: a run's actors, found or started from any process of the cluster."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import ray

from rl_ckpt.errors import CheckpointError, InvalidInputError
from rl_ckpt.runtime.coordinator import Coordinator
from rl_ckpt.runtime.messages import Failure, Ok, decode, encode
from rl_ckpt.runtime.server_actor import start_server
from rl_ckpt.runtime.spec import NAMESPACE, RunSpec

_RANKS_AT_ONCE = 20_000  # calls that may wait in the coordinator: more than there are ranks

_RETRIES = 3

_ASK_AGAIN_S = 0.5

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
        # Not in a placement group that whoever starts it is in (a trial of Ray Tune): it would end with that.
        scheduling_strategy="DEFAULT",
    ).remote(spec, uuid.uuid4().hex)
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
            raise InvalidInputError(_ended(spec)) from error
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


def attached(spec: RunSpec) -> RunSpec:
    """Finds or starts the run's coordinator, and tells it of the Checkpointer.

    Returns:
        The spec with the coordinator's id in it.

    Raises:
        CheckpointError: It could not be reached within `join_timeout_s`.
    """
    until = time.monotonic() + spec.options.join_timeout_s
    while True:
        found = start_coordinator(spec)
        try:
            insist(found, lambda link: link.attach.remote(spec.user), until)
        except InvalidInputError:  # another Checkpointer's close ended it just now: there is to be a new one
            if time.monotonic() >= until:
                raise
            time.sleep(_ASK_AGAIN_S)
        else:
            return found


def insist(spec: RunSpec, call: Callable[[Any], Any], until: float) -> Any:
    """Calls the coordinator, again while Ray starts it anew; for what may be called twice.

    Args:
        spec: With the coordinator's id.
        call: Gives the reference of the answer; is given the handle.
        until: By `time.monotonic`.

    Raises:
        InvalidInputError: It was ended, and does not come back.
        CheckpointError: It could not be reached in time.
    """
    while True:
        try:
            return ray.get(call(coordinator(spec)))
        except ray.exceptions.RayActorError as error:  # died, or can't be reached
            why = str(error).strip().splitlines()[0]
            if not _is_there(spec):
                raise InvalidInputError(f"{_ended(spec)} ({why})") from error
            if time.monotonic() >= until:
                text = f"the coordinator of {spec.url} could not be reached within {spec.options.join_timeout_s} s"
                raise CheckpointError(f"{text}: {why}") from error
        time.sleep(_ASK_AGAIN_S)


def _is_there(spec: RunSpec) -> bool:
    """Whether Ray still has the coordinator, alive or being started anew."""
    try:
        found: str = ray.get_actor(spec.coordinator, namespace=NAMESPACE)._actor_id.hex()
    except ValueError:
        return False
    return found == spec.service


def _ended(spec: RunSpec) -> str:
    return f"the service of {spec.url} was ended: its Checkpointer was closed, or its cluster is gone; make a new one"


def begin(spec: RunSpec, take_over: bool) -> None:
    """Asks the coordinator, before the first save of a Checkpointer, whether its job may save.

    Raises:
        RunOwnedError, FencedError: Another live job of this cluster owns the run.
        InvalidInputError: The coordinator was ended.
        CheckpointError: It could not be reached within `join_timeout_s`.
    """
    until = time.monotonic() + spec.options.join_timeout_s
    reply = decode(insist(spec, lambda link: link.begin.remote(spec, take_over), until), Ok | Failure)
    if isinstance(reply, Failure):
        raise reply.error()


class ToldError(Exception):
    """The coordinator answered with a failure: it knows, and has told the other ranks."""

    def __init__(self, error: CheckpointError) -> None:
        """Carries the error to be raised to the caller."""
        super().__init__(str(error))
        self.error = error


class UnheardError(Exception):
    """The coordinator was lost, or could not be reached, while it was asked: whether it knows is not known."""


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
            UnheardError: The coordinator was lost.
        """
        try:
            data = ray.get(self._ref)
        except ray.exceptions.RayActorError as error:
            why = str(error).strip().splitlines()[0]
            raise UnheardError(f"the coordinator was lost meanwhile ({why}); nothing was done. Try again") from error
        reply = decode(data, self._kind | Failure)
        if isinstance(reply, Failure):
            raise ToldError(reply.error())
        return reply
