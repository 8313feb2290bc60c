"""Watch: which nodes of the cluster are alive, and which are going away.

Ray tells of neither by itself (an actor learns of a dead node by the first call that fails), so this looks, about every
second, as long as there is a reason to.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import ray

LOOK_S = 1.0


def nodes() -> dict[str, bool]:
    """Ids of the nodes that are alive, and whether each is being drained. Asks Ray's head: not for an event loop."""
    alive = {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}
    leaving: set[str] = set()
    with contextlib.suppress(AttributeError, RuntimeError):  # no public API, and not in every release
        leaving = set(ray._private.state.state.get_draining_nodes())
    return {node: node in leaving for node in alive}


class Watch:
    """Looks while it is wanted. For one event loop."""

    def __init__(self, wanted: Callable[[], bool], seen: Callable[[dict[str, bool]], None]) -> None:
        """Does not look yet.

        Args:
            wanted: Whether to go on; asked before every look.
            seen: Is told what was seen, every time.
        """
        self._wanted = wanted
        self._seen = seen
        self._task: asyncio.Task[None] | None = None
        self._now = asyncio.Event()

    def start(self) -> bool:
        """Looks from now on, as long as it is wanted; whether it did not so far: what was seen last may be old."""
        if self._task is not None and not self._task.done():
            return False
        self._task = asyncio.get_running_loop().create_task(self._look_on())
        return True

    def now(self) -> None:
        """Looks at once: something has failed."""
        self._now.set()
        self.start()

    async def look(self) -> None:
        """Looks once; sees nothing where Ray's head does not answer."""
        with contextlib.suppress(ray.exceptions.RayError, ConnectionError, RuntimeError):
            self._seen(await asyncio.get_running_loop().run_in_executor(None, nodes))

    async def _look_on(self) -> None:
        while self._wanted():
            self._now.clear()
            await self.look()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._now.wait(), LOOK_S)
