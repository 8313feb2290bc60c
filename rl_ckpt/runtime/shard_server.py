"""The shard server: one actor per node, which owns the node's staging memory, writes shard files and brings chunks in.

Promises: every method may run twice (Ray retries) with the same outcome. Does not decide anything: the coordinator
tells it what goes where. Control calls have a concurrency group of their own, so that they are answered while I/O is
going on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray

from rl_ckpt.errors import CheckpointError, CorruptionError
from rl_ckpt.format.digest import digest
from rl_ckpt.runtime import memory
from rl_ckpt.runtime.messages import (
    Failure,
    FetchDone,
    FetchItem,
    FetchOrder,
    Lost,
    Ok,
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
from rl_ckpt.runtime.spec import NAMESPACE, RunSpec
from rl_ckpt.store.base import ObjectMissingError
from rl_ckpt.store.shard_writer import write_files
from rl_ckpt.store.urls import open_store

CONCURRENCY_GROUPS = {"control": 4, "io": 4, "network": 8}
_PASS_BYTES = 64 << 20  # what one call to a peer brings: pays the call, and stays in the object store


class ShardServer:
    """See the module. Made by `links.ensure_server`."""

    def __init__(self, spec: RunSpec, name: str) -> None:
        """Opens the store and takes over this node's staging memory."""
        self._spec = spec
        self._name = name
        self._store = open_store(spec.url, spec.storage_options)
        self._memory = memory.ServerMemory(name)
        self._counts = {"bytes_staged": 0, "bytes_from_peers": 0, "bytes_served": 0}

    @ray.method(concurrency_group="control")
    def ready(self) -> str:
        """Answers once the server can work: its node's id."""
        return str(ray.get_runtime_context().get_node_id())

    @ray.method(concurrency_group="io")
    def reserve(self, data: bytes) -> bytes:
        """Makes a new generation of staging memory; the reply holds its path."""
        order = decode(data, Reserve)
        try:
            path = self._memory.renew(f"generation-{order.generation}-", order.name, order.bytes)
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
            link.lost_save.remote(encode(Lost(order.key, order.rank, order.world_size, Failure.of(error))))
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
        """Brings chunks into the restore's memory and verifies them."""
        order = decode(data, FetchOrder)
        try:
            target = self._restore_memory(order)
            count = self._from_store(order, target) + self._from_peers(order, target)
        except CorruptionError as error:
            return encode(FetchDone(0, str(error)))
        except CheckpointError as error:
            return encode(Failure.of(error))
        return encode(FetchDone(count, memory=self._memory.path(_restore_name(order.key))))

    def _restore_memory(self, order: FetchOrder) -> memoryview:
        path = self._memory.path(_restore_name(order.key))
        if not os.path.exists(path):
            self._memory.make(_restore_name(order.key), order.memory_bytes)
        return memory.mapped(path)

    def _from_store(self, order: FetchOrder, target: memoryview) -> int:
        with ThreadPoolExecutor(self._spec.options.write_streams, "rl_ckpt-fetch") as pool:
            return sum(pool.map(lambda name: self._from_file(name, order.files[name], target), order.files))

    def _from_file(self, name: str, items: Sequence[FetchItem], target: memoryview) -> int:
        url = self._store.object_url(name)
        try:
            self._store.read_into(name, [(i.source_offset, target[i.offset : i.offset + i.size_bytes]) for i in items])
        except ObjectMissingError as error:
            raise CorruptionError(f"{url} is missing, though the checkpoint names it") from error
        return sum(_check(item, target, f"chunk at {item.source_offset} of {url}") for item in items)

    def _from_peers(self, order: FetchOrder, target: memoryview) -> int:
        count = 0
        for peer, items in order.peers.items():
            server: Any = ray.get_actor(peer, namespace=NAMESPACE)
            for batch in _batches(items):
                ranges = [(item.source_offset, item.size_bytes) for item in batch]
                parts: list[Any] = ray.get(
                    server.serve.remote(order.key, ranges), timeout=self._spec.options.write_timeout_s
                )
                for item, part in zip(batch, parts, strict=True):
                    target[item.offset : item.offset + item.size_bytes] = part.data
                    count += _check(item, target, f"chunk at {item.source_offset} of {peer}'s memory")
        self._counts["bytes_from_peers"] += count
        return count

    @ray.method(concurrency_group="network")
    def serve(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
        """Ranges of this server's restore memory, for a peer; they travel through Ray's object store."""
        source = np.frombuffer(memory.mapped(self._memory.path(_restore_name(key))), np.uint8)
        self._counts["bytes_served"] += sum(size for _, size in ranges)
        return [source[offset : offset + size] for offset, size in ranges]

    @ray.method(concurrency_group="control")
    def forget(self, key: str) -> bytes:
        """Gives a restore's memory back."""
        memory.forget(self._memory.path(_restore_name(key)))
        self._memory.remove(_restore_name(key))
        return encode(Ok())

    @ray.method(concurrency_group="control")
    def configure(self, spec: RunSpec) -> None:
        """Opens the store anew with a driver's options and credentials."""
        self._spec = spec
        self._store = open_store(spec.url, spec.storage_options)

    @ray.method(concurrency_group="control")
    def stats(self) -> dict[str, int]:
        """Bytes moved so far, for tests and metrics."""
        traffic = self._store.stats.snapshot()
        return {
            **self._counts,
            "store_reads": traffic.reads,
            "store_bytes_read": traffic.bytes_read,
            "store_bytes_written": traffic.bytes_written,
        }

    @ray.method(concurrency_group="control")
    def close(self) -> bytes:
        """Gives all memory back; the actor is ended next."""
        self._memory.close()
        return encode(Ok())


def _restore_name(key: str) -> str:
    return f"restore-{key.replace('/', '_')}"


def _check(item: FetchItem, target: memoryview, what: str) -> int:
    found = digest(target[item.offset : item.offset + item.size_bytes])
    if found != item.digest:
        raise CorruptionError(f"{what} is damaged: {item.digest.hex()} was committed, {found.hex()} was read")
    return item.size_bytes


def _batches(items: Sequence[FetchItem]) -> list[list[FetchItem]]:
    out: list[list[FetchItem]] = [[]]
    filled = 0
    for item in items:
        if filled >= _PASS_BYTES:
            out.append([])
            filled = 0
        out[-1].append(item)
        filled += item.size_bytes
    return out
