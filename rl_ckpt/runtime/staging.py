"""A rank's part in a save: what it has, copied into staging memory.

Owns: the order of the steps, and what a rank remembers of its last save: as long as the shape of its state stays, it
stages into memory that was promised to it while it tells the coordinator so. Promises: the state may change once
`save_rank` returns; what lies in immutable Ray objects is left to the node's shard server.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from rl_ckpt.errors import InvalidInputError, StorageError
from rl_ckpt.plan.deal import StageItem
from rl_ckpt.plan.inventory import chunk_boxes, chunk_digest, identity, take_inventory, undeclared
from rl_ckpt.plan.stage import stage, stage_repeat, with_digests
from rl_ckpt.plan.standing import fixed_and_plains
from rl_ckpt.runtime import memory
from rl_ckpt.runtime.links import Asked, ask, coordinator, ensure_server, server
from rl_ckpt.runtime.messages import (
    JoinAgain,
    JoinSave,
    RepeatOrders,
    RepeatSave,
    Restage,
    SaveOrders,
    Staged,
    StageObjects,
    encode,
)
from rl_ckpt.runtime.objects import open_object
from rl_ckpt.runtime.spec import Place, RunSpec
from rl_ckpt.state.tree import FlatTree, LocalArray, Node, flatten
from rl_ckpt.store.committer import SaveRequest


class StagedRank(msgspec.Struct, frozen=True, tag="staged"):
    """A rank has staged its part of a save."""

    checkpoint: str
    stall_s: float


@dataclass(slots=True)
class _Last:
    """What a rank remembers of its last save."""

    plan: str = ""
    """Id of the standing plan; empty where there is none."""
    items: tuple[StageItem, ...] = ()
    fixed: dict[str, Node] = field(default_factory=dict)
    """Its nodes but the plain leaves."""
    promised: str = ""
    """File of staging memory that it may write before it is told to; empty where there is none."""
    checkpoint: str = ""
    """That it staged last."""
    digests: tuple[bytes, ...] = ()
    """Of `items`, as it staged them then; empty ones where its shard server did."""


_Key = tuple[str, int, int, int]
"""Service, rank, number of workers, and how arrays are cut."""
_last: dict[_Key, _Last] = {}


@contextlib.contextmanager
def _remembered(spec: RunSpec, place: Place) -> Iterator[_Last]:
    """What this rank remembers, for one save alone: another thread's knows of no promise, and stages elsewhere."""
    key = (spec.service, place.rank, place.world_size, spec.options.chunk_bytes)
    last = _last.pop(key, None) or _Last()
    try:
        yield last
    finally:
        _last[key] = last


def save_rank(spec: RunSpec, place: Place, request: SaveRequest, state: Any, begun: float) -> StagedRank:
    """A rank's part in a save, up to the point where its state may change again.

    Raises:
        CheckpointError: As `Checkpointer.save`.
    """
    memory.drop_gone()
    flat = flatten(state, spec.options.allow_pickle, open_object)
    with _remembered(spec, place) as last:
        checkpoint, digests = _repeat(spec, place, request, flat, last) or _join(spec, place, request, flat, last)
        last.checkpoint, last.digests = checkpoint, tuple(digests)
    stall_s = time.monotonic() - begun
    # Not waited for: if it is lost, so is the coordinator, and whoever waits for the save's result is told.
    coordinator(spec).staged.remote(encode(Staged(place.key, place.rank, checkpoint, tuple(digests), stall_s)))
    return StagedRank(checkpoint, stall_s)


def restage_rank(spec: RunSpec, place: Place, order: Restage, state: Any, begun: float) -> StagedRank:
    """A rank stages what a dead one was to stage, in a save for which it has staged its own part.

    Raises:
        CheckpointError: The rank's state is another one by now, or its staging memory is gone.
    """
    flat = flatten(state, spec.options.allow_pickle, open_object)
    with _remembered(spec, place) as last:
        if last.checkpoint != order.checkpoint:
            raise InvalidInputError(
                "it can't stage what a dead worker was to stage: this process has no part in the save yet; save again"
            )
        witness = [msgspec.structs.replace(last.items[i], digest=last.digests[i]) for i in order.witness]
    _check_same(flat, witness, order.items, spec.options.chunk_bytes)
    digests = stage(flat, order.items, memory.mapped(order.annex))
    stall_s = time.monotonic() - begun
    message = Staged(place.key, place.rank, order.checkpoint, tuple(digests), stall_s, order.annex)
    coordinator(spec).staged.remote(encode(message))
    return StagedRank(order.checkpoint, stall_s)


def _check_same(flat: FlatTree, staged: Sequence[StageItem], wanted: Sequence[StageItem], chunk_bytes: int) -> None:
    """Checks that a state is the one that was staged; what is `wanted` is looked at as it is staged."""
    changed = {item.path for item in [*staged, *wanted] if not _has(flat, item, chunk_bytes)}
    changed |= {
        item.path
        for item in staged
        if item.digest and item.path not in changed and chunk_digest(flat, item.path, item.box) != item.digest
    }
    if changed:
        raise InvalidInputError(
            f"a worker died during the save, and this rank, which has copies of its arrays, has other values at "
            f"{sorted(changed)} by now than when it staged them; don't train (in another thread, say) until `save` has "
            "returned. Save again"
        )


def _has(flat: FlatTree, item: StageItem, chunk_bytes: int) -> bool:
    node = flat.nodes.get(item.path)
    return isinstance(node, LocalArray) and item.box in chunk_boxes(node, chunk_bytes)


def prepare_rank(spec: RunSpec, place: Place, state: Any) -> None:
    """Makes ready what the first save of a state of this shape needs, and touches the memory that it will use.

    Raises:
        CheckpointError: As `Checkpointer.prepare`.
    """
    flat = flatten(state, spec.options.allow_pickle, open_object)
    with _remembered(spec, place) as last:
        orders = _orders(spec, place, SaveRequest(0), flat, last, prepare=True)
    for path in {orders.memory, orders.next_memory} - {""}:
        memory.prefault(path)


def _join(spec: RunSpec, place: Place, request: SaveRequest, flat: FlatTree, last: _Last) -> tuple[str, list[bytes]]:
    """Takes part with an inventory, and stages as it is told."""
    orders = _orders(spec, place, request, flat, last, prepare=False)
    own = [item for item in orders.items if item.path not in flat.objects]
    digests = stage(flat, own, memory.mapped(orders.memory)) if own else []
    return orders.checkpoint, _with_objects(spec, place, flat, orders, orders.items, digests)


def _orders(
    spec: RunSpec, place: Place, request: SaveRequest, flat: FlatTree, last: _Last, prepare: bool
) -> SaveOrders:
    join = JoinSave(
        place.key,
        place.rank,
        place.world_size,
        request.step,
        dict(request.metrics),
        request.tag,
        request.parent,
        ensure_server(spec),
        spec.options.chunk_bytes,
        take_inventory(flat, spec.options.chunk_bytes, place.world_size),
        last.promised,
        prepare,
        spec.user,
        request.deadline_s,
        request.since,
    )
    reply: SaveOrders = ask(coordinator(spec).join_save, join, SaveOrders)
    last.plan, last.promised = reply.plan, reply.next_memory
    last.items = tuple(msgspec.structs.replace(item, digest=b"") for item in reply.items)
    last.fixed = fixed_and_plains(flat.nodes)[0]
    return reply


def _repeat(
    spec: RunSpec, place: Place, request: SaveRequest, flat: FlatTree, last: _Last
) -> tuple[str, list[bytes]] | None:
    """Takes part with the plan of the last save; None where it does not hold any more."""
    if not last.plan:
        return None
    fixed, plains = fixed_and_plains(flat.nodes)
    if fixed != last.fixed:
        return None
    ahead, chunk_bytes = _ahead(last), spec.options.chunk_bytes
    own = [item for item in last.items if item.path not in flat.objects]
    digests: list[bytes] = []
    hashed = any(path not in flat.objects for path, _ in undeclared(flat, place.world_size))
    if hashed and ahead is not None:
        digests, found = stage_repeat(flat, own, ahead, chunk_bytes, place.world_size)
    else:
        found = {path: identity(flat, path, array, chunk_bytes) for path, array in undeclared(flat, place.world_size)}
    message = RepeatSave(
        place.key,
        place.rank,
        place.world_size,
        request.step,
        dict(request.metrics),
        request.tag,
        request.parent,
        last.plan,
        plains,
        b"".join(found.values()),
        spec.user,
        request.deadline_s,
        request.since,
    )
    asked = Asked(coordinator(spec).repeat_save.remote(encode(message)), RepeatOrders | JoinAgain)
    if ahead is not None and not hashed:  # while the coordinator hears from the others
        digests = stage(flat, own, ahead)
    reply = asked.get()
    if isinstance(reply, JoinAgain):
        return None
    there, last.promised = last.promised, reply.next_memory
    if own and (ahead is None or reply.memory != there):
        digests = stage(flat, with_digests(flat, own, found, chunk_bytes), memory.mapped(reply.memory))
    return reply.checkpoint, _with_objects(spec, place, flat, reply, last.items, digests)


def _ahead(last: _Last) -> memoryview | None:
    """The memory that was promised, if it is still there."""
    try:
        return memory.mapped(last.promised) if last.promised else None
    except StorageError:
        return None


def _with_objects(
    spec: RunSpec,
    place: Place,
    flat: FlatTree,
    orders: SaveOrders | RepeatOrders,
    items: Sequence[StageItem],
    digests: Sequence[bytes],
) -> list[bytes]:
    """Leaves what lies in Ray objects to the node's shard server.

    Args:
        spec: The run.
        place: Which rank.
        flat: Its tree.
        orders: What it was told.
        items: All its items.
        digests: Of those that it staged itself.

    Returns:
        Digests of all items, empty ones where the server will tell them.
    """
    handles: dict[str, Any] = {}
    left: list[tuple[int, int, StageItem]] = []
    own, out = iter(digests), list[bytes]()
    for i, item in enumerate(items):
        found = flat.objects.get(item.path)
        out.append(b"" if found else next(own))
        if found:
            handles.setdefault(found.key, found.handle)
            left.append((list(handles).index(found.key), i, msgspec.structs.replace(item, path=found.path, digest=b"")))
    if left:
        order = StageObjects(place.key, place.rank, place.world_size, orders.checkpoint, orders.memory, tuple(left))
        # In a list, so that Ray hands the references on and not the values.
        server(spec).stage_objects.remote(encode(order), list(handles.values()))
    return out
