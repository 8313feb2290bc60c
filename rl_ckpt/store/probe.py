"""Does the store keep the promise that commits rest on: of many writers of one new name exactly one succeeds?

The header or flag being accepted proves nothing (OpenStack Swift's S3 accepts `If-None-Match` and lets several win), so
writers race here before the first commit of a run.
"""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.store.base import ObjectExistsError, Store

PROBE = "probe/"
"""Where the objects are that writers race for; a sweep removes what a killed process left there."""
_WRITERS = 8
_ROUNDS = 3


def probe_create_only(store: Store, *, writers: int = _WRITERS, rounds: int = _ROUNDS) -> None:
    """Race writers for new names below `probe/`, and remove them again.

    Args:
        store: What is probed.
        writers: Threads that create the same name at once.
        rounds: How often.

    Raises:
        InvalidInputError: The store let several writers win, or showed another writer's bytes than the winner's.
        StorageError: The store failed.
    """
    probe_id = uuid.uuid4().hex
    names = [f"{PROBE}{probe_id}-{number}" for number in range(rounds)]
    try:
        with ThreadPoolExecutor(writers, thread_name_prefix="rl_ckpt-probe") as pool:
            for name in names:
                _race(store, name, pool, writers)
    finally:
        store.delete(names)


def _race(store: Store, name: str, pool: ThreadPoolExecutor, writers: int) -> None:
    barrier = threading.Barrier(writers)

    def write(number: int) -> bool:
        barrier.wait()
        try:
            store.create(name, b"writer %d" % number)
        except ObjectExistsError:
            return False
        return True

    won = [number for number, success in enumerate(pool.map(write, range(writers))) if success]
    found = store.get(name)
    # None has won when the winner's reply was lost and its retry found its own object: that keeps the promise too.
    if len(won) > 1 or (won and found != b"writer %d" % won[0]):
        raise InvalidInputError(
            f"{store.url} does not keep create-only writes: {len(won)} of {writers} writers created the same new "
            "object. Two coordinators could then both believe that they committed. Use a store that honours "
            "If-None-Match (AWS S3, Ceph, MinIO, Google Cloud Storage, a local disk), or pass weak_commits=True when "
            "nothing else ever writes to this run"
        )
