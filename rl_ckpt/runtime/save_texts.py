"""What is said of saves that can't go on: to a rank that does not fit in, and when a state's time is over."""

from __future__ import annotations

from collections.abc import Mapping

from rl_ckpt.errors import SaveTimeoutError
from rl_ckpt.options import Options
from rl_ckpt.runtime.messages import JoinSave, RepeatSave
from rl_ckpt.runtime.save_steps import COMMITTING, JOINING, LANDING, RESERVING, STAGING, WRITING, Save


def join_problem(save: Save, message: JoinSave | RepeatSave) -> str | None:
    """Why a rank can't take part, or None."""
    if not 0 <= message.rank < message.world_size:
        return f"rank {message.rank} is not in 0 … {message.world_size - 1}"
    if message.world_size != save.world_size:
        return f"rank {message.rank} says there are {message.world_size} workers, others say {save.world_size}"
    if message.rank in save.joined or message.rank in save.repeats:
        return f"two workers joined the save of step {message.step} as rank {message.rank}; give each its own rank"
    other = next(iter(save.joined.values()), None)
    if isinstance(message, JoinSave) and other is not None and other.chunk_bytes != message.chunk_bytes:
        return "the ranks cut their arrays by different `chunk_bytes`; give all Checkpointers of a run the same options"
    if message.step != save.request.step:
        return f"rank {message.rank} saves step {message.step}, others step {save.request.step}"
    return None


def too_late(save: Save) -> SaveTimeoutError:
    """The error of an urgent save whose time is over."""
    where = {WRITING: "written to the store", COMMITTING: "committed", LANDING: "copied to another node"}
    late = {JOINING: f"ranks {sorted(set(range(save.world_size)) - save.here)} joined"}
    if save.state == STAGING:
        late[STAGING] = f"ranks {save.late()} had staged"
    what = late.get(save.state) or f"it was {where.get(save.state, 'staged and settled')}"
    return SaveTimeoutError(
        f"step {save.request.step}: {save.request.deadline_s} s were over before {what}; nothing of it is kept"
    )


def timeout(save: Save, options: Options) -> SaveTimeoutError:
    """The error of a save whose state took too long."""
    what = "prepare" if save.prepare else f"step {save.request.step}"
    limit_s = options.join_timeout_s
    if save.state in (JOINING, STAGING):
        missing = sorted(set(range(save.world_size)) - save.here) if save.state == JOINING else save.late()
        did_not = "join" if save.state == JOINING else "stage"
        return SaveTimeoutError(
            f"{what}: ranks {missing} did not {did_not} within {limit_s} s; raise `join_timeout_s` if they are busy"
        )
    limit_s = options.write_timeout_s
    if save.state == RESERVING:
        return SaveTimeoutError(
            f"{what}: no answer from the store or no staging memory after {limit_s} s; look at both"
        )
    files: Mapping[str, object] = save.plan.files if save.plan else {}
    late = sorted(set(files) - set(save.written)) or "an earlier save, which this one waits for,"
    return SaveTimeoutError(
        f"{what}: {late} did not finish writing within {limit_s} s; raise `write_timeout_s`, look at the store"
    )
