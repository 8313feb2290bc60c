"""The shard server: one actor per node, which owns the node's staging memory, writes shard files and brings chunks in.

Promises: every method may run twice (Ray retries) with the same outcome. Does not decide anything: the coordinator
tells it what goes where. Control calls have a concurrency group of their own, so that they are answered while I/O is
going on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from rl_ckpt import logs, metrics
from rl_ckpt.errors import CheckpointError
from rl_ckpt.runtime import memory
from rl_ckpt.runtime.bringing import Bringing
from rl_ckpt.runtime.copying import be_in_no_hurry, copy_part
from rl_ckpt.runtime.fetching import Fetch
from rl_ckpt.runtime.generations import generations
from rl_ckpt.runtime.held import HeldParts
from rl_ckpt.runtime.messages import (
    CopyOrder,
    Failure,
    FetchDone,
    FetchOrder,
    HoldDone,
    HoldOrder,
    Lost,
    Ok,
    RememberOrder,
    Reserve,
    Reserved,
    StagedObjects,
    StageObjects,
    WriteDone,
    WriteOrder,
    decode,
    encode,
)
from rl_ckpt.runtime.objects import stage_objects
from rl_ckpt.runtime.prefetch_messages import BringOrder
from rl_ckpt.runtime.ray_metrics import tell_ray
from rl_ckpt.runtime.restore_memory import RestoreMemory
from rl_ckpt.runtime.spec import NAMESPACE, NODE_CHARS, RunSpec
from rl_ckpt.runtime.transport.listener import Listener
from rl_ckpt.runtime.transport.shelf import Range, Shelf
from rl_ckpt.runtime.transport.wire import Door, TransportError
from rl_ckpt.store.based import open_run_store
from rl_ckpt.store.shard_writer import write_files

CONCURRENCY_GROUPS = {"control": 4, "io": 4, "network": 8, "copy": 2}
_CALL_S = 30.0  # for a call of a peer that has nothing to wait for

_log = logs.logger()


class ShardServer:
    """See the module. Made by `links.ensure_server`."""

    def __init__(self, spec: RunSpec, name: str) -> None:
        """Opens the store and takes over this node's staging memory."""
        if ray.get_runtime_context().was_current_actor_reconstructed:
            spec = _as_of_now(spec)
        tell_ray()
        self._node: str = ray.get_runtime_context().get_node_id()
        logs.here(spec.url, self._node)
        self._spec = spec
        self._name = name
        self._store = open_run_store(spec.url, spec.storage_options)
        self._memory = memory.ServerMemory(name)
        self._shelf = Shelf()
        self._held = HeldParts(self._memory, self._shelf, generations(spec.options))
        self._bringing = Bringing(self._held, self._shelf)
        self._restores = RestoreMemory(self._memory, self._shelf)
        self._listener = _listen(name, self._shelf)
        self._counts = {"bytes_staged": 0, "bytes_from_peers": 0, "bytes_served_by_ray": 0, "copies_by_ray": 0}

    @ray.method(concurrency_group="control")
    def ready(self) -> str:
        """Answers once the server can work: its node's id."""
        return str(ray.get_runtime_context().get_node_id())

    @ray.method(concurrency_group="io")
    def reserve(self, data: bytes) -> bytes:
        """Makes a new generation of staging memory; the reply holds its path."""
        order = decode(data, Reserve)
        try:
            older = order.name if order.beside else f"generation-{order.generation}-"
            path = self._memory.renew(older, order.name, order.bytes)
        except CheckpointError as error:
            return encode(Failure.of(error))
        return encode(Reserved(path))

    @ray.method(concurrency_group="io")
    def stage_objects(self, data: bytes, objects: Sequence[Any]) -> None:
        """Stages chunks of Ray objects for a rank that goes on meanwhile, and tells the coordinator.

        A copy, and not the object itself: that is lost as soon as its owner dies.

        Args:
            data: A `StageObjects`.
            objects: The references that it counts.
        """
        order = decode(data, StageObjects)
        link: Any = ray.get_actor(self._spec.coordinator, namespace=NAMESPACE)
        try:
            digests = stage_objects(order, objects, self._spec.options.allow_pickle)
        except CheckpointError as error:
            link.lost_save.remote(
                encode(Lost(order.key, order.rank, order.world_size, Failure.of(error), order.checkpoint))
            )
        else:
            link.staged_objects.remote(encode(StagedObjects(order.key, order.rank, order.checkpoint, digests)))

    @ray.method(concurrency_group="io")
    def write(self, data: bytes) -> bytes:
        """Writes one generation's shard files; durable when it replies."""
        order = decode(data, WriteOrder)
        try:
            staged = memory.mapped(order.memory)
            self._counts["bytes_staged"] += sum(c.bytes for file in order.files for c in file.columns)
            written = write_files(self._store, order.files, staged, self._spec.options.write_streams)
        except CheckpointError as error:
            return encode(Failure.of(error))
        return encode(WriteDone(tuple(written)))

    @ray.method(concurrency_group="io")
    def fetch(self, data: bytes) -> bytes:
        """Brings chunks into the restore's memory, verifies them, and passes them on as they come in."""
        order = decode(data, FetchOrder)
        name = _restore_name(order.key)
        try:
            target = self._restores.open(name, order.memory_bytes)
            limit_s = self._spec.options.write_timeout_s
            done, failed = Fetch(order, name, target, self._store, self._shelf, _RayPeer, limit_s).run()
        except CheckpointError as error:
            return encode(Failure.of(error))
        self._counts["bytes_from_peers"] += sum(done.get(way, 0) for way in ("peers", "peers_ray", "peers_memory"))
        return encode(FetchDone(done, failed, self._memory.path(name)))

    @ray.method(concurrency_group="control")
    def hold(self, data: bytes) -> bytes:
        """Keeps what was staged in a generation of its memory."""
        order = decode(data, HoldOrder)
        try:
            return encode(HoldDone(self._held.hold(order.part, order.path)))
        except CheckpointError as error:
            return encode(Failure.of(error))
        finally:
            self._tell_held()

    @ray.method(concurrency_group="copy")
    def copy(self, data: bytes) -> bytes:
        """Copies another server's part into its memory, and keeps it."""
        order = decode(data, CopyOrder)
        limit_s = self._spec.options.write_timeout_s

        def fill(target: memoryview) -> None:
            be_in_no_hurry()  # the threads of this group only copy
            way = copy_part(order.part, order.holder, target, _RayPeer, limit_s)
            self._counts["copies_by_ray"] += way == "ray"

        try:
            return encode(HoldDone(self._held.copy(order.part, fill)))
        except CheckpointError as error:
            return encode(Failure.of(error))
        finally:
            self._tell_held()

    @ray.method(concurrency_group="control")
    def room(self) -> int:
        """Bytes of shared memory that are free beside what staging will still take."""
        return self._held.room()

    @ray.method(concurrency_group="io")
    def bring(self, data: bytes) -> bytes:
        """Brings a part in from the store into its memory, and keeps what of it can be had."""
        order = decode(data, BringOrder)
        try:
            return encode(self._bringing.bring(order, self._store, self._spec.options.write_timeout_s))
        except CheckpointError as error:
            return encode(Failure.of(error))
        finally:
            self._tell_held()

    @ray.method(concurrency_group="control")
    def remember(self, data: bytes) -> bytes:
        """Writes down of what checkpoint it holds parts."""
        try:
            self._held.remember(decode(data, RememberOrder))
        except CheckpointError as error:
            return encode(Failure.of(error))
        return encode(Ok())

    @ray.method(concurrency_group="control")
    def release(self, part: str) -> bytes:
        """Gives a part up."""
        self._held.release(part)
        self._tell_held()
        return encode(Ok())

    @ray.method(concurrency_group="control")
    def held(self, adopt: bool) -> bytes:
        """What it holds; `adopt` where a coordinator asks that knows nothing of it."""
        if adopt:
            self._bringing.give_up()
        found = self._held.found(adopt)
        self._tell_held()
        return encode(found)

    @ray.method(concurrency_group="control")
    def door(self) -> Door | None:
        """How a peer gets to this server's listener, its secret with it; None where it has none."""
        return self._listener.door if self._listener is not None else None

    @ray.method(concurrency_group="network")
    def serve(self, name: str, ranges: list[Range], wait_s: float) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
        """Ranges of what is on the shelf, when they are filled, for a peer that can't reach the listener.

        They travel through Ray's object store.
        """
        source = np.frombuffer(memory.mapped(self._shelf.await_all(name, ranges, wait_s)), np.uint8)
        self._counts["bytes_served_by_ray"] += sum(size for _, size in ranges)
        return [source[offset : offset + size] for offset, size in ranges]

    @ray.method(concurrency_group="control")
    def forget(self, key: str) -> bytes:
        """Gives a restore's memory back; a `fetch` for it that comes later makes none."""
        self._restores.forget(_restore_name(key))
        return encode(Ok())

    @ray.method(concurrency_group="control")
    def configure(self, spec: RunSpec) -> None:
        """Opens the store anew with a driver's options and credentials."""
        self._spec = spec
        self._store = open_run_store(spec.url, spec.storage_options)

    @ray.method(concurrency_group="control")
    def stats(self) -> dict[str, int]:
        """Bytes moved so far, for tests and metrics."""
        traffic = self._store.stats.snapshot()
        listened = self._listener.counts() if self._listener is not None else {"bytes_served": 0}
        return {
            **self._counts,
            **self._held.counts(),
            **listened,
            "bytes_coming": self._bringing.bytes_so_far(),
            "store_reads": traffic.reads,
            "store_bytes_read": traffic.bytes_read,
            "store_bytes_written": traffic.bytes_written,
            "store_retries": traffic.retries,
        }

    @ray.method(concurrency_group="control")
    def close(self) -> bytes:
        """Gives all memory back; the actor is ended next."""
        if self._listener is not None:
            self._listener.close()
        self._memory.close()
        return encode(Ok())

    def _tell_held(self) -> None:
        metrics.record(metrics.TIER_BYTES, self._held.counts()["bytes_held"], self._spec.url, self._node[:NODE_CHARS])


def _restore_name(key: str) -> str:
    return f"{memory.RESTORE}{key.replace('/', '_')}"


def _as_of_now(spec: RunSpec) -> RunSpec:
    """What the servers were told since this one was made: its process was killed, and what it knew is lost."""
    try:
        link: Any = ray.get_actor(spec.coordinator, namespace=NAMESPACE)
        now: RunSpec = ray.get(link.spec.remote(), timeout=_CALL_S)
    except (ray.exceptions.RayError, ValueError):  # the coordinator is away too; it tells all servers when it is back
        return spec
    return now


def _listen(name: str, shelf: Shelf) -> Listener | None:
    host = ray.util.get_node_ip_address()
    try:
        return Listener(host, name, shelf)
    except OSError as error:
        _log.warning("no listener on %s (%s): chunks for peers go through Ray's object store", host, error)
        return None


class _RayPeer:
    """Another shard server; see `fetching.Peer`."""

    def __init__(self, name: str) -> None:
        try:
            self._actor: Any = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError as error:
            raise TransportError(f"{name} is gone") from error

    def door(self) -> Door | None:
        door: Door | None = _ask(self._actor.door.remote(), _CALL_S)
        return door

    def serve(self, name: str, ranges: list[Range], wait_s: float) -> Sequence[memoryview]:
        parts: Any = _ask(self._actor.serve.remote(name, ranges, wait_s), wait_s + _CALL_S)
        return [part.data for part in parts]


def _ask(asked: Any, timeout_s: float) -> Any:
    try:
        return ray.get(asked, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, CheckpointError | TransportError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise TransportError(f"a shard server could not be reached: {error}") from error
