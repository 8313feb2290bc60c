"""Ray objects in a state tree: immutable already, so nobody has to copy them before training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from rl_ckpt.plan.stage import stage
from rl_ckpt.runtime import memory
from rl_ckpt.runtime.messages import StageObjects
from rl_ckpt.state.arrays import UnsupportedLeafError
from rl_ckpt.state.tree import flatten


def open_object(leaf: Any) -> tuple[str, Any] | None:
    """A `ray.ObjectRef`'s id and value (state/tree.py, `Opener`); numpy arrays in it are views of the object store.

    Raises:
        UnsupportedLeafError: The object is lost.
    """
    if not isinstance(leaf, ray.ObjectRef):
        return None
    try:
        return leaf.hex(), ray.get(leaf)
    except ray.exceptions.RayError as error:
        why = str(error).strip().splitlines()[0]
        raise UnsupportedLeafError(f"the Ray object {leaf.hex()} can't be read ({why}); put it again") from error


def stage_objects(order: StageObjects, objects: Sequence[Any], allow_pickle: bool) -> dict[int, bytes]:
    """Copies chunks of Ray objects into staging memory.

    Args:
        order: What to copy where.
        objects: The references that it counts.
        allow_pickle: As for the save.

    Returns:
        Digests of the copies by index among the rank's items.

    Raises:
        InvalidInputError: An object is lost.
    """
    staged: dict[int, bytes] = {}
    for o, reference in enumerate(objects):
        flat = flatten(reference, allow_pickle, open_object)
        mine = [(index, item) for at, index, item in order.items if at == o]
        digests = stage(flat, [item for _, item in mine], memory.mapped(order.memory))
        staged |= {index: digest for (index, _), digest in zip(mine, digests, strict=True)}
    return staged
