"""Calls: the driver calls all workers at once, and sees who dies on the way.

The driver itself may be one of them (`Own`): it does its part while a thread listens to the others.

Owns: how long it waits, and what it does about a worker that dies in a save: the coordinator is told, and what it wants
staged again is asked of the workers that are left, within the same call of `save`. Promises: an answer of every rank,
or an error that names those that gave none.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from rl_ckpt.errors import SaveTimeoutError, WorkerFailuresError
from rl_ckpt.options import Options
from rl_ckpt.runtime.deadline import Deadline
from rl_ckpt.runtime.links import coordinator
from rl_ckpt.runtime.losses import in_one_line, is_loss
from rl_ckpt.runtime.messages import Failure, Lost, Restage, Restages, decode, encode
from rl_ckpt.runtime.spec import CALL, Place, RunSpec
from rl_ckpt.runtime.staging import StagedRank
from rl_ckpt.store.pending import in_thread

_PHASES = 3  # in which a rank may use up `join_timeout_s`: beginning, joining, staging or matching
_STRAGGLERS_S = 5.0  # how long to wait for the other ranks once one has failed
_LOOK_S = 1.0  # without any answer, until the coordinator is asked whether a node was lost


@dataclass(frozen=True, slots=True)
class Own:
    """The calling process as one of the workers."""

    target: Any
    """What the functions get in place of an actor."""


def new_key() -> str:
    """Of a save or restore that no other has."""
    return f"{CALL}{uuid.uuid4().hex}"


def call_all(
    spec: RunSpec,
    handles: Sequence[Any],
    lost: str,
    function: Callable[..., bytes],
    request: object,
    kind: Any,
    key: str,
    limit: Deadline | None = None,
    restage: Callable[..., bytes] | None = None,
) -> list[Any]:
    """Runs `function` inside every worker, until the limit at the longest.

    Args:
        spec: The run.
        handles: Of the workers, by rank; one of them may be `Own`.
        lost: The coordinator's method to tell of a worker that died.
        function: Of `inside`.
        request: Its last argument.
        kind: What it answers with, beside `Failure`.
        key: Of the save or restore; from `new_key`.
        limit: Of an urgent save.
        restage: For saves: what others run in place of one that died.

    Returns:
        The answers by rank.

    Raises:
        CheckpointError: What the coordinator said, or `WorkerFailuresError` by rank, or `SaveTimeoutError`.
    """
    calls = _Calls(spec, handles, lost, kind, key, limit, restage)
    others = [rank for rank, handle in enumerate(handles) if not isinstance(handle, Own)]
    for rank in others:
        calls.begin(rank, function, request)
    if len(others) == len(handles):
        calls.listen()
    else:  # the own part blocks until the others have joined, or until the coordinator is told that one can't
        (own,) = set(range(len(handles))) - set(others)
        heard = in_thread(calls.listen, "rl_ckpt-calls")
        reply = calls.run(own, function, request)
        heard.result()
        calls.note(own, reply)
    return calls.answers()


class _Calls:
    """What is under way of one `call_all`."""

    def __init__(
        self,
        spec: RunSpec,
        handles: Sequence[Any],
        lost: str,
        kind: Any,
        key: str,
        limit: Deadline | None,
        restage: Callable[..., bytes] | None,
    ) -> None:
        self._spec = spec
        self._handles = handles
        self._lost = lost
        self._kind = kind
        self._saves = restage is not None  # only then is there anything that others may do in a dead one's place
        self._restage = restage
        self._key = key
        self._limit = limit
        self._last = math.inf if limit is None else limit.at
        self._refs: dict[Any, int] = {}
        self._question: Any = None
        self._replies: dict[int, Any] = {}
        self._dead: set[int] = set()  # of which it is not known yet what becomes of the save
        self._asked: set[int] = set()  # of those: whom the question is about
        self._patience_s = _PHASES * spec.options.join_timeout_s
        self._deadline = min(time.monotonic() + self._patience_s, self._last)

    def begin(self, rank: int, function: Callable[..., bytes], request: object) -> None:
        """Calls a worker. Not again where it died and came back, as the user's actors may be made to: as a new one."""
        call = self._handles[rank].__ray_call__.options(max_task_retries=0)
        self._refs[call.remote(function, self._spec, self._place(rank), request)] = rank

    def run(self, rank: int, function: Callable[..., bytes], request: object) -> Any:
        """The own part; what it answers."""
        return decode(
            function(self._handles[rank].target, self._spec, self._place(rank), request), self._kind | Failure
        )

    def listen(self) -> None:
        """Waits for the answers of the others."""
        while self._refs or self._dead:
            if self._dead and self._question is None:
                self._ask()
            waits_s = max(0.0, self._deadline - time.monotonic())
            if self._saves and self._question is None:
                waits_s = min(waits_s, _LOOK_S)
            asked = [self._question] if self._question is not None else []
            ready, _ = ray.wait([*self._refs, *asked], num_returns=1, timeout=waits_s)
            for ref in ready:
                self._hear(ref)
            if not ready and not self._patient():
                break
        if self._refs and self._lost == "lost_save":  # the silent ones must not bring it about later
            coordinator(self._spec).expire_save.remote(self._key, "this save is over; save again", True)

    def answers(self) -> list[Any]:
        """What all have answered."""
        silent = sorted({*self._refs.values(), *self._dead})
        _raise_failures(self._replies, silent, self._spec.options, self._limit)
        return [self._replies[rank] for rank in range(len(self._handles))]

    def _patient(self) -> bool:
        """Nothing came: whether to wait on."""
        if time.monotonic() >= self._deadline:
            if time.monotonic() >= self._last or not self._under_way():
                return False
            self._deadline = min(time.monotonic() + self._patience_s, self._last)
        if self._saves and self._question is None:
            self._ask()
        return True

    def _under_way(self) -> bool:
        try:
            return bool(ray.get(coordinator(self._spec).under_way.remote(self._key)))
        except ray.exceptions.RayError:
            return False

    def _hear(self, ref: Any) -> None:
        if ref is self._question:
            self._question = None
            self._news(ref)
            return
        rank = self._refs.pop(ref)
        try:
            self.note(rank, decode(ray.get(ref), self._kind | Failure))
        except ray.exceptions.RayError as error:
            text = f"rank {rank} is dead or unreachable: {in_one_line(error)}"
            failure = Failure.of(WorkerFailuresError(text, {rank: text}, [rank] if is_loss(error) else ()))
            message = Lost(self._key, rank, len(self._handles), failure, dead=self._saves)
            getattr(coordinator(self._spec), self._lost).remote(encode(message))
            if self._saves:
                self._dead.add(rank)
            else:
                self.note(rank, failure)

    def note(self, rank: int, reply: Any) -> None:
        """An answer; the first failure of a rank stands."""
        if isinstance(self._replies.get(rank), Failure):
            return
        self._replies[rank] = reply
        if isinstance(reply, Failure):
            self._deadline = min(self._deadline, time.monotonic() + _STRAGGLERS_S)

    def _ask(self) -> None:
        self._question, self._asked = coordinator(self._spec).restages.remote(self._key), set(self._dead)

    def _news(self, ref: Any) -> None:
        """The coordinator says what has become of the dead, and who is to do what in their place."""
        try:
            news = decode(ray.get(ref), Restages | Failure)
        except ray.exceptions.RayError as error:
            text = f"the coordinator was lost during this save ({in_one_line(error)}); save again"
            news = Failure.of(WorkerFailuresError(text, lost=sorted(self._dead)))
        if isinstance(news, Restages):
            for order in news.orders:
                self._stage_again(order)
            if news.waits:
                return
        # Who died after it was asked is not in this answer.
        known = self._dead if isinstance(news, Failure) else self._dead & self._asked
        self._dead = self._dead - known
        for rank in known:
            self.note(rank, news if isinstance(news, Failure) else StagedRank(news.checkpoint, 0.0))

    def _stage_again(self, order: Restage) -> None:
        assert self._restage is not None
        if isinstance(self._handles[order.rank], Own):
            self.note(order.rank, self.run(order.rank, self._restage, order))
        else:
            self.begin(order.rank, self._restage, order)

    def _place(self, rank: int) -> Place:
        return Place(self._key, rank, len(self._handles))


def _raise_failures(
    replies: Mapping[int, Any], silent: Sequence[int], options: Options, limit: Deadline | None
) -> None:
    failures = {rank: reply for rank, reply in sorted(replies.items()) if isinstance(reply, Failure)}
    if not failures:
        if silent and limit is not None:
            raise SaveTimeoutError(f"ranks {list(silent)} did not answer before the save's deadline; nothing was saved")
        if silent:
            raise SaveTimeoutError(
                f"ranks {list(silent)} did not answer; they may be busy in another method. Raise `join_timeout_s` (now "
                f"{options.join_timeout_s} s) if that is expected"
            )
        return
    by_rank: dict[int, str] = {}
    lost: set[int] = set()
    for failure in failures.values():
        by_rank |= failure.failures
        lost.update(failure.lost)
    if by_rank:
        raise WorkerFailuresError("; ".join(dict.fromkeys(by_rank.values())), by_rank, lost)
    raise next(iter(failures.values())).error()
