"""How many requests a client has under way: as many as it likes until the server asks it to slow down.

Then half as many, and one more for each round of answers without such a complaint, as TCP does. Without it sixteen
requests that are refused come back as sixteen. Pure bookkeeping on one event loop; sends nothing and counts no tries.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_WELL_AGAIN = 64.0
"""At this many at once the server is taken to be well again: no limit."""


class Pace:
    """A limit of requests at once that falls and rises. For the coroutines of one event loop."""

    def __init__(self) -> None:
        self.limit = math.inf
        """Requests at once at this moment; a fraction counts for the next rise."""
        self._running = 0
        self._slowed = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[int]:
        """Wait for a place and hold it; gives the number by which `slow_down` knows when the request began."""
        while self._running >= self.limit:
            place = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():
                    self._wake()  # the place was given to one who is gone: to the next
                raise
            finally:
                if place in self._waiting:
                    self._waiting.remove(place)
        self._running += 1
        try:
            yield self._slowed
        finally:
            self._running -= 1
            self._wake()

    def slow_down(self, began: int) -> None:
        """The server has too much to do: half as many from here on, once for all requests of the same moment.

        Args:
            began: What `turn` gave.
        """
        if began == self._slowed:
            self._slowed += 1
            self.limit = max(1.0, min(self.limit, self._running) / 2)

    def went_well(self) -> None:
        """A request was answered: one more at once for each `limit` of them."""
        if self.limit < math.inf:
            self.limit += 1 / self.limit
            if self.limit >= _WELL_AGAIN:
                self.limit = math.inf
            self._wake()

    def _wake(self) -> None:
        free = self.limit - self._running
        while self._waiting and free > 0:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                free -= 1
