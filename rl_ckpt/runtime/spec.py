"""What every process of a run is told about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from rl_ckpt.options import Options
from rl_ckpt.plan.retention import KeepRule
from rl_ckpt.store.lease import Process

NAMESPACE = "rl_ckpt"
CALL = "call-"
"""How the keys of a driver's calls begin: each is of one call alone. Those of worker mode come again."""
NODE_CHARS = 16
"""So much of a node's id tells it from the others of its cluster."""


@dataclass(frozen=True)
class RunSpec:
    """Where a run is and how it is to be done."""

    url: str
    storage_options: Mapping[str, Any] = field(repr=False)
    keep: tuple[KeepRule, ...]
    options: Options
    get_state: str
    set_state: str
    service: str = ""
    """Id of the coordinator's actor: tells one service of a run from the next."""
    user: str = ""
    """Id of the Checkpointer: its Ray job, a dash, and a random part."""
    by: str = ""
    """Release, host and process that made the Checkpointer, for messages."""
    process: Process | None = None
    """The same, to be looked for."""

    @property
    def key(self) -> str:
        """Short name of the run, from its url."""
        return xxhash.xxh3_64_hexdigest(self.url.encode())

    @property
    def job(self) -> str:
        """Ray job of the Checkpointer."""
        return job_of(self.user)

    @property
    def coordinator(self) -> str:
        """Name of the coordinator's actor."""
        return f"rl_ckpt:{self.key}:coordinator"

    def server(self, node: str) -> str:
        """Name of the shard server of a node."""
        return f"rl_ckpt-{self.key}-{node[:NODE_CHARS]}"


def job_of(user: str) -> str:
    """Ray job of a Checkpointer, from its id."""
    return user.partition("-")[0]


@dataclass(frozen=True)
class Place:
    """Which rank of how many, in which save or restore."""

    key: str
    rank: int
    world_size: int
