"""Owners kept: what Ray knows of a run's users: which jobs are over, and who uses the run, for a coordinator's restart.

In Ray's own key-value store (that of the cluster's control service), so it lasts as long as the names of the actors do.
Pickled as Ray pickles what actors are made with, and read by the same actor only.
"""

from __future__ import annotations

from typing import Any

import ray
from ray import cloudpickle
from ray.experimental import internal_kv

from rl_ckpt.runtime.owners import Owners
from rl_ckpt.runtime.spec import NAMESPACE


def dead_jobs() -> set[str]:
    """Ray jobs that are over."""
    return {job["JobID"] for job in ray._private.state.jobs() if job["IsDead"]}


class KeptOwners:
    """See the module."""

    def __init__(self, name: str, service: str) -> None:
        """Of the coordinator: its actor's name, and its id, by which an earlier one's are told from its own."""
        self._key = f"{name}:owners".encode()
        self._service = service

    def load(self) -> Owners | None:
        """The users as they were; None where this coordinator has none yet."""
        data = internal_kv._internal_kv_get(self._key, namespace=NAMESPACE)
        service, owners = cloudpickle.loads(data) if data else ("", None)
        kept: Owners | None = owners
        return kept if service == self._service else None

    def keep(self, owners: Owners | None) -> None:
        """Keeps the users for a restart; None: there are none any more."""
        if owners is None:
            internal_kv._internal_kv_del(self._key, namespace=NAMESPACE)
            return
        data: Any = cloudpickle.dumps((self._service, owners))
        internal_kv._internal_kv_put(self._key, data, overwrite=True, namespace=NAMESPACE)
