"""What `AlgorithmCheckpointer` and the callback `checkpointing` say to each other about who restores an Algorithm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from ray.rllib.utils import force_list

_resuming: ContextVar[bool] = ContextVar("rl_ckpt_resuming", default=True)


def is_resuming() -> bool:
    """Whether an Algorithm that is being built restores itself."""
    return _resuming.get()


@contextlib.contextmanager
def without_resuming() -> Iterator[None]:
    """An Algorithm that is built in here begins anew: whoever builds it restores it then."""
    token = _resuming.set(False)
    try:
        yield
    finally:
        _resuming.reset(token)


def tell_restored(algo: Any, url: str, checkpoint: str) -> None:
    """Tells the Algorithm's callbacks of ours that it was restored: their next save continues that checkpoint.

    Args:
        algo: The Algorithm.
        url: Of the run, normalised.
        checkpoint: Its id.
    """
    for callback in force_list(algo.callbacks):
        on_restored = getattr(callback, "on_restored", None)
        if callable(on_restored):
            on_restored(algo, url, checkpoint)
