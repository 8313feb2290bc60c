"""Bringing: a part of a checkpoint from the store into a shard server's memory, before anybody restores.

Promises: what is said to be good was read from the store here and has the digest that was committed. What can't be had
is left out and told, and all else is brought in. Decides nothing.
"""

from __future__ import annotations

import threading

import msgspec

from rl_ckpt.errors import CheckpointError, StorageError
from rl_ckpt.plan.parts import Part
from rl_ckpt.runtime.fetching import Fetch, Peer
from rl_ckpt.runtime.held import HeldParts
from rl_ckpt.runtime.messages import FetchOrder, Flaw
from rl_ckpt.runtime.prefetch_messages import BringDone, BringOrder
from rl_ckpt.runtime.transport.shelf import Shelf
from rl_ckpt.runtime.transport.wire import TransportError
from rl_ckpt.store.base import Store


class Bringing:
    """See the module. Threads may share it."""

    def __init__(self, held: HeldParts, shelf: Shelf) -> None:
        """Nothing is under way.

        Args:
            held: Where parts are kept.
            shelf: The server's; a part that is withdrawn from it meanwhile is not brought in any further.
        """
        self._held = held
        self._shelf = shelf
        self._lock = threading.Lock()
        self._fetches: dict[str, Fetch] = {}

    def bring(self, order: BringOrder, store: Store, limit_s: float) -> BringDone:
        """Brings a part in and keeps it.

        Args:
            order: Which, and where its chunks are in the store.
            store: The run's.
            limit_s: For everything, in seconds.

        Returns:
            What is held; without a path where nothing of it could be had from the store.

        Raises:
            StorageError: There is no room for it, or it was given up meanwhile.
        """
        flaws: dict[int, Flaw] = {}

        def fill(target: memoryview) -> Part:
            flaws.update(self._fetch(order, target, store, limit_s))
            good = tuple([chunk for chunk in order.part.chunks if chunk.offset not in flaws or not chunk.size_bytes])
            if not good:
                raise StorageError(f"nothing of {order.part.name} could be had")
            return msgspec.structs.replace(order.part, chunks=good)

        try:
            held = self._held.bring(order.part, fill)
        except CheckpointError:
            if not flaws:
                raise
            return BringDone(msgspec.structs.replace(order.part, chunks=()), "", flaws)
        return BringDone(held.part, held.path, flaws)

    def _fetch(self, order: BringOrder, target: memoryview, store: Store, limit_s: float) -> dict[int, Flaw]:
        name = order.part.name
        fetch = Fetch(
            FetchOrder(name, order.part.bytes, order.files), name, target, store, self._shelf, _nobody, limit_s
        )
        with self._lock:
            self._fetches[name] = fetch
        try:
            _, failed = fetch.run()
        finally:
            with self._lock:
                del self._fetches[name]
        return {item.offset: item.flaw for item in failed}

    def give_up(self) -> None:
        """Who asked for what is being brought in is gone: that ends."""
        with self._lock:
            names = list(self._fetches)
        for name in names:
            self._shelf.withdraw(name)

    def bytes_so_far(self) -> int:
        """Of parts that are being brought in: what is here, and verified."""
        with self._lock:
            fetches = list(self._fetches.values())
        return sum(fetch.bytes_so_far() for fetch in fetches)


def _nobody(name: str) -> Peer:
    raise TransportError(f"nothing is brought in from {name}")
