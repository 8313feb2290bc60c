"""Loads of a whole state tree into this process, without Ray.

Promises: what is returned was verified, chunk by chunk. A damaged chunk is taken from another checkpoint that has the
same; where none has, the checkpoint is passed over for the next older one, unless one step was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rl_ckpt.errors import CorruptionError
from rl_ckpt.plan.match import match_all, view
from rl_ckpt.state.tree import unflatten
from rl_ckpt.store.counting import restoring
from rl_ckpt.store.repair import load_repaired
from rl_ckpt.store.run import Run


@dataclass(frozen=True, slots=True)
class LoadedTree:
    """A checkpoint's state."""

    id: str
    tree: Any
    notices: tuple[str, ...]
    """What the caller should hear: newer checkpoints that were passed over, damage that was read around."""


def load(
    run: Run, step: int | None, select: str | Sequence[str] | None, rank: int, allow_pickle: bool, as_numpy: bool
) -> LoadedTree:
    """Reads a checkpoint; see `Checkpointer.load_state`.

    Args:
        run: Where it is.
        step: Which checkpoint; None: the newest good one.
        select: Globs of saved paths; None: everything.
        rank: Whose per-rank leaves.
        allow_pickle: Whether leaves may be unpickled.
        as_numpy: Gives torch and jax arrays as numpy arrays.

    Raises:
        CheckpointError: As `Checkpointer.load_state`.
    """
    with restoring(run.store.url):
        return _load(run, step, select, rank, allow_pickle, as_numpy)


def _load(
    run: Run, step: int | None, select: str | Sequence[str] | None, rank: int, allow_pickle: bool, as_numpy: bool
) -> LoadedTree:
    candidates, newer = run.candidates(step)
    damaged = list(newer.values())
    for commit in candidates:
        try:
            manifest = run.manifest(commit)
            match = match_all(view(manifest, rank), select, None)
            values, repaired = load_repaired(run, manifest, match, allow_pickle, as_numpy)
        except CorruptionError as error:
            damaged.append(f"checkpoint {commit.id}: {error}")
            continue
        notices = [f"fell back to checkpoint {commit.id}, since {'; '.join(damaged)}"] if damaged else []
        if repaired:
            notices.append(
                f"checkpoint {commit.id} is damaged, and was read whole: {'; '.join(repaired)}. "
                f"`verify({commit.step}, repair=True)` mends the files"
            )
        return LoadedTree(commit.id, unflatten(match.grown, values), tuple(notices))
    raise CorruptionError(f"no good checkpoint in {run.store.url}: {'; '.join(damaged)}")
