"""Orphans: which objects of a run no checkpoint names.

Owns: of which checkpoint an object is, and the list of what nothing names. Deletes nothing (store/sweep.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rl_ckpt.format import records
from rl_ckpt.store import forks
from rl_ckpt.store.base import StoredObject
from rl_ckpt.store.based import is_inner
from rl_ckpt.store.layout import writer_of
from rl_ckpt.store.run import Run


def list_parts(run: Run) -> list[StoredObject]:
    """All manifests and shard files of a run, those of runs inside it too."""
    store, record = run.store, run.record
    listed = [*store.list(records.MANIFESTS), *store.list(records.SHARDS)]
    if any(is_inner(record, number) for number in range(len(record.bases))):
        listed += store.list(records.BASES)
    return listed


def unnamed(
    run: Run, listed: Sequence[StoredObject], named: Collection[str], checkpoints: Collection[str]
) -> list[StoredObject]:
    """What no checkpoint needs of a run.

    Args:
        run: The run.
        listed: From `list_parts`.
        named: Shard files that live manifests name.
        checkpoints: Ids of live checkpoints.

    Returns:
        Objects, and as such too, `base/<k>`: the pins that the run has in bases of which nothing is named any more.
    """
    out = [item for item in listed if item.name not in named and checkpoint_of(item.name) not in checkpoints]
    unused = {*forks.bases_held(run)} - {base_of(name) for name in named}
    return [*out, *(StoredObject(base, 0, 0.0) for base in sorted(unused))]


def base_of(name: str) -> str:
    """The base, `base/<k>`, in which a file of a fork is."""
    return "/".join(name.split("/")[:2])


def is_base(name: str) -> bool:
    """Whether this is a base itself, and no file in one."""
    return name.startswith(records.BASES) and records.split_base(name) is None


def is_part(name: str) -> bool:
    """Whether an object is of one checkpoint."""
    return name.startswith((records.MANIFESTS, records.SHARDS, records.BASES))


def checkpoint_of(name: str) -> str:
    """The checkpoint that a manifest or shard file was written for."""
    if name.startswith(records.MANIFESTS):
        return name.removeprefix(records.MANIFESTS).removesuffix(".json")
    return writer_of(name)
