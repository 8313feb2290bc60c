"""Python's cycle collector, held off while many small objects are made that are in no cycle.

Owns: a short pause. A walk over 100,000 leaves makes so many objects that the collector goes through the whole heap of
the process several times meanwhile, which is a third of the time. Does not free anything: what is due is collected
after the pause.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Holds the collector off; nothing where it is off already. Not to be held across a wait.

    Two threads may pause at once: the collector is back when the first of them is done, and nothing depends on it.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
