"""Writing staged chunks as shard files. Used by the shard servers and by saves without Ray alike."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rl_ckpt.format import packed_file, shard_file
from rl_ckpt.format.packed_file import Rows
from rl_ckpt.format.shard_file import Column, ShardFile
from rl_ckpt.plan.deal import FilePlan, Written
from rl_ckpt.store.base import Store


def write_files(store: Store, files: Sequence[FilePlan], staged: memoryview, write_streams: int) -> list[Written]:
    """Writes shard files, several at a time; durable on return.

    Args:
        store: The run's.
        files: What goes where.
        staged: One generation of staging memory, flat bytes; must not change until this returns.
        write_streams: How many files at a time.

    Returns:
        Sizes and offsets, in the order of `files`.

    Raises:
        StorageError: The store failed; files that were written are orphans.
    """
    with ThreadPoolExecutor(write_streams, "rl_ckpt-write") as pool:
        jobs = [pool.submit(_write_file, store, file, staged) for file in files]
        return [job.result() for job in jobs]


def _write_file(store: Store, file: FilePlan, staged: memoryview) -> Written:
    composed = _packed(file, staged) if file.packed else _columns(file, staged)
    store.put(file.name, composed.segments)
    return Written(composed.size_bytes, tuple(composed.offsets))


def _columns(file: FilePlan, staged: memoryview) -> ShardFile:
    return shard_file.compose(
        [Column(c.name, c.path, c.dtype, c.box, staged[c.offset : c.offset + c.bytes]) for c in file.columns]
    )


def _packed(file: FilePlan, staged: memoryview) -> ShardFile:
    rows = Rows(
        [c.path for c in file.columns],
        [c.rank for c in file.columns],
        [c.dtype for c in file.columns],
        [c.box for c in file.columns],
        [c.offset for c in file.columns],
        [c.bytes for c in file.columns],
    )
    return packed_file.compose(rows, staged)
