"""What `AlgorithmCheckpointer` and the callback `checkpointing` say to each other about who restores an Algorithm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from ray.rllib.utils import force_list

_loaded_from: ContextVar[str | None] = ContextVar("rl_ckpt_loaded_from", default=None)


def loaded_from() -> str | None:
    """The run that `load` restores an Algorithm from which is being built; None: nobody restores it but itself."""
    return _loaded_from.get()


@contextlib.contextmanager
def without_resuming(url: str) -> Iterator[None]:
    """An Algorithm that is built in here begins anew: whoever builds it restores it then.

    Args:
        url: Of the run that it is restored from, normalised.
    """
    token = _loaded_from.set(url)
    try:
        yield
    finally:
        _loaded_from.reset(token)


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
