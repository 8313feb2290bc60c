"""The driver's side of a prefetch: starts the run's coordinator where there is none, and waits for what it tells.

Owns: which nodes take part, and asking again where the coordinator was lost. The run's actors stay when the driver
ends: whoever restores next finds them, by the run's url, and what they hold.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
import ray

from rl_ckpt.errors import CheckpointError, InvalidInputError
from rl_ckpt.options import Options
from rl_ckpt.runtime import watch
from rl_ckpt.runtime.links import coordinator, insist, start_coordinator
from rl_ckpt.runtime.messages import Failure, Ok, decode, encode
from rl_ckpt.runtime.prefetch_messages import PrefetchDone, PrefetchOrder
from rl_ckpt.runtime.spec import RunSpec
from rl_ckpt.runtime.status import PrefetchStatus, ServiceStatus
from rl_ckpt.store.lease import this_process
from rl_ckpt.store.pending import in_thread
from rl_ckpt.store.run import who

_ASK_AGAIN_S = 0.5
_ANSWER_S = 60.0  # for what waits for nothing
_TRIES = 20  # to begin it again with a coordinator that was lost meanwhile


def nodes_of(wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Ids of the nodes that take part.

    Args:
        wanted: Ids; None: all that are alive, are not being drained, and can run anything (a head node without CPUs is
            left out, unless there is no other).

    Raises:
        InvalidInputError: Ray is not running in this process, or there is no such node.
    """
    if not ray.is_initialized():
        raise InvalidInputError(
            "Ray is not running in this process; call ray.init() first: a prefetch brings a checkpoint into the memory "
            "of a cluster's nodes"
        )
    live = watch.nodes()
    if wanted is not None:
        unknown = sorted(set(wanted) - live.keys())
        if unknown or not wanted:
            raise InvalidInputError(f"nodes={list(wanted)}: there is no live node {unknown}; there are {sorted(live)}")
        return tuple(dict.fromkeys(wanted))
    able = {node["NodeID"] for node in ray.nodes() if any(node["Resources"].get(what) for what in ("CPU", "GPU"))}
    staying = sorted(node for node, leaving in live.items() if not leaving)
    return tuple([node for node in staying if node in able] or staying)


def begin(url: str, storage_options: Mapping[str, Any], order: PrefetchOrder) -> tuple[RunSpec, Future[PrefetchDone]]:
    """Has a checkpoint brought in.

    Args:
        url: Of the run, normalised.
        storage_options: For its file system.
        order: What.

    Returns:
        What to find the coordinator by, and its answer; by now a restore that begins waits for what comes.

    Raises:
        InvalidInputError: Memory has a newer one, though this one was asked for; or the service keeps nothing in it.
        CheckpointError: The coordinator can't be reached.
    """
    options = Options(memory_bytes=order.memory_bytes)
    spec = RunSpec(url, dict(storage_options), (), options, "get_state", "set_state", by=who(), process=this_process())
    spec = _begin(spec, order)
    return spec, in_thread(lambda: _outcome(spec, order), f"rl_ckpt-prefetch-{order.record.step}")


def _begin(spec: RunSpec, order: PrefetchOrder) -> RunSpec:
    until = time.monotonic() + spec.options.join_timeout_s
    data = encode(order)
    while True:
        spec = start_coordinator(spec)
        try:
            reply = decode(insist(spec, lambda link: link.prefetch.remote(data), until), Ok | Failure)
        except InvalidInputError:  # a Checkpointer's close ended it just now: there is to be a new one
            if time.monotonic() >= until:
                raise
            time.sleep(_ASK_AGAIN_S)
            continue
        if isinstance(reply, Failure):
            raise reply.error()
        return spec


def _begin_again(spec: RunSpec, order: PrefetchOrder) -> None:
    """After the coordinator was lost; not where it was ended, and what it held with it: nobody wants that any more."""
    until = time.monotonic() + spec.options.join_timeout_s
    data = encode(msgspec.structs.replace(order, again=True))
    try:
        reply = decode(insist(spec, lambda link: link.prefetch.remote(data), until), Ok | Failure)
    except InvalidInputError as error:
        text = (
            f"the prefetch of {order.record.id} is over: the actors of {spec.url} were ended by a Checkpointer's close"
        )
        raise CheckpointError(f"{text}, or with their cluster") from error
    if isinstance(reply, Failure):
        raise reply.error()


def _outcome(spec: RunSpec, order: PrefetchOrder) -> PrefetchDone:
    why = ""
    for _ in range(_TRIES):
        try:
            reply = decode(ray.get(coordinator(spec).prefetched.remote(order.record.id)), PrefetchDone | Failure)
        except ray.exceptions.RayActorError as error:
            why = str(error).strip().splitlines()[0]
            time.sleep(_ASK_AGAIN_S)
            _begin_again(spec, order)
            continue
        if isinstance(reply, PrefetchDone):
            return reply
        if reply.code != "not_found":
            raise reply.error()
        why = reply.message
        _begin_again(spec, order)
    raise CheckpointError(f"the prefetch of {order.record.id} was begun {_TRIES} times, and each time: {why}")


def status_of(spec: RunSpec) -> PrefetchStatus | None:
    """How far the run's last prefetch is; None where there is none, or the coordinator does not answer."""
    try:
        data = ray.get(coordinator(spec).status.remote(), timeout=_ANSWER_S)
    except (ray.exceptions.RayError, InvalidInputError):
        return None
    return msgspec.msgpack.decode(data, type=ServiceStatus).prefetch
