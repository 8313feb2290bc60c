"""Learners that train in a thread beside their actor (IMPALA, APPO): holding them still, and dropping what they queue.

Such a learner's `update` only puts a batch into a queue. A thread takes it out and changes parameters in place,
optimizers and counters, at any time, under no lock of RLlib's. So a copy that is made in the actor's own thread may mix
two updates, and a restore may be undone by an update that began before it.

Owns: `held`, inside of which no update runs, and `drop_batches`. Promises: updates wait, none is lost or cut in two;
learners that train together are held after the same update, since each of their updates waits for the gradients of all
the others. Does nothing for learners without such a thread: theirs is the thread that calls us.

How: the thread looks up the function that updates anew for each batch, so a gate is put before it once. The thread is
still where it waits at the gate, or in the queue for a batch.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from ray.rllib.core.learner.torch.torch_learner import TorchLearner

from rl_ckpt.errors import InvalidInputError, SaveTimeoutError

_GATE = "_rl_ckpt_gate"
_LOOK_S = 0.001  # between looks at a thread that is in an update
_ROUND_S = 0.05  # how long learners that train together wait for their threads until they compare
_CLOSED = -1
_IN_HAND = (
    "item",
    "batch",
    "idx",
)  # what `get` of queue.Queue and of APPO's buffer calls a batch that it has taken out


class _Gate:
    """Before every update of one learner's thread."""

    def __init__(self, learner: Any, update: Callable[..., Any]) -> None:
        self._learner = learner
        self._update = update
        self._changed = threading.Condition()
        self._limit: int | None = None
        self._discard = False
        self.parked = False
        """Whether the thread waits here."""
        self.discarded = 0
        self.holders = 0

    def __call__(self, /, **arguments: Any) -> Any:  # RLlib passes the learner as `self=`
        """In place of the learner's update; runs in its thread."""
        with self._changed:
            while self._limit is not None and self._learner._weights_seq_no >= self._limit:
                self.parked = True
                self._changed.notify_all()
                self._changed.wait()
            self.parked = False
            if self._discard:
                self.discarded += 1
                with self._learner._num_updates_lock:
                    self._learner._num_updates -= 1  # the thread adds one for every batch
                return None
        return self._update(**arguments)

    def open(self, limit: int | None = None, discard: bool = False) -> None:
        """Lets the thread make updates up to a number (None: any), or come through without making them."""
        with self._changed:
            self._limit, self._discard = limit, discard
            self.parked = False  # until it has woken and looked at the new limit: it may go on
            self._changed.notify_all()

    def close(self) -> None:
        """Lets nothing through."""
        self.open(_CLOSED)

    def wait_a_little(self) -> None:
        """Until the thread comes to the gate, at most for one look."""
        with self._changed:
            if not self.parked:
                self._changed.wait(_LOOK_S)


@contextlib.contextmanager
def held(learner: TorchLearner, token: str = "", timeout_s: float = 60.0) -> Iterator[None]:
    """Inside of it no update of this learner runs; updates that are due wait.

    Called in the learner's own process, between two of its actor's calls. May be nested. Learners that train together
    (`num_learners` > 1) must all be held at once, each by the same token.

    Args:
        learner: Built.
        token: Names this one hold of all learners together; never used twice. Only they need it.
        timeout_s: How long to wait for an update under way, in seconds.

    Raises:
        SaveTimeoutError: An update took longer, or another learner did not come; updates go on.
        InvalidInputError: Learners that train together, and no token.
    """
    thread = getattr(learner, "_learner_thread", None)
    if thread is None or not thread.is_alive():
        _synchronize(learner)
        yield
        return
    gate = _gate(learner, thread)
    with contextlib.ExitStack() as undone:
        if not gate.holders:
            undone.callback(gate.open)
            _hold(learner, thread, gate, token, time.monotonic() + timeout_s)
            _synchronize(learner)
        gate.holders += 1
        try:
            yield
        finally:
            gate.holders -= 1


def drop_batches(learner: TorchLearner, timeout_s: float = 60.0) -> int:
    """Forgets the batches that wait for the learner's thread, and what it has put out and nobody fetched.

    They were sampled with weights of before a restore, and the state that is put out holds such weights: the next
    `update` would give it to the env runners. Only while the learner is held.

    Returns:
        Number of batches that were dropped (with a circular buffer, how often they were still to be used).

    Raises:
        SaveTimeoutError: The thread did not take them out in time.
    """
    state: Any = learner
    thread = getattr(state, "_learner_thread", None)
    if thread is None:
        return 0
    dropped = _drained(state, thread, time.monotonic() + timeout_s) if thread.is_alive() else 0
    for waiting in (state._learner_thread_out_queue, state._learner_state_queue):
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.get_nowait()
    with state._learner_state_lock:
        state._learner_state = None
    # `update` waits at every n-th call until n updates were made since the last time: the two counts start anew
    # together, or it would wait for ever.
    with state._num_updates_lock:
        state._num_updates = 0
    state._submitted_updates = 0
    state._agg_event.clear()
    return dropped


def _drained(learner: Any, thread: Any, deadline: float) -> int:
    """Has the thread itself take all batches out, without an update: APPO's buffer bears no second reader."""
    gate = _gate(learner, thread)
    before = gate.discarded
    gate.open(discard=True)
    try:
        while not _starved(learner, thread):
            if time.monotonic() >= deadline:
                raise _timeout("its thread did not give up the batches that wait for it")
            time.sleep(_LOOK_S)
    finally:
        gate.close()
    return gate.discarded - before


def _gate(learner: Any, thread: Any) -> _Gate:
    gate: _Gate | None = getattr(learner, _GATE, None)
    if gate is None:
        gate = _Gate(learner, thread._update_method)
        setattr(learner, _GATE, gate)
        thread._update_method = gate
    return gate


def _hold(learner: Any, thread: Any, gate: _Gate, token: str, deadline: float) -> None:
    """Closes the gate when the thread is still; learners that train together agree after which update."""
    together = learner.config.num_learners > 1 and torch.distributed.is_initialized()
    if together and not token:
        raise InvalidInputError("learners that train together are held by a token that all of them are given")
    limit, turn = learner._weights_seq_no, 0
    while True:
        gate.open(limit)
        until = min(deadline, time.monotonic() + _ROUND_S) if together else deadline
        still = _still(learner, thread, gate, limit, until)
        done: int = learner._weights_seq_no  # counted at the beginning of an update: exact while it is still
        told = (
            _exchange(learner, f"rl_ckpt/held/{token}/{turn}", [still, done], deadline) if together else [[still, done]]
        )
        if all(item == [True, done] for item in told):
            gate.close()
            return
        if time.monotonic() >= deadline:
            raise _timeout(f"after {done} updates its thread is {'waiting for others' if still else 'in the next one'}")
        # One that is inside an update waits for the others' gradients: all may go as far as the farthest.
        limit = max(limit, *(n if is_still else n + 1 for is_still, n in told))
        turn += 1


def _still(learner: Any, thread: Any, gate: _Gate, limit: int, until: float) -> bool:
    """Waits until the thread begins no further update below the limit."""
    while True:
        reached = learner._weights_seq_no >= limit
        if gate.parked or (reached and _waits(thread, learner._learner_thread_in_queue)) or _starved(learner, thread):
            return True
        if time.monotonic() >= until:
            return False
        gate.wait_a_little()


def _starved(learner: Any, thread: Any) -> bool:
    """Whether there is no batch anywhere on the way to an update, nor in one.

    Nothing is put in meanwhile, so each queue is looked at before the thread that empties it.
    """
    loaders = getattr(learner, "_gpu_loader_threads", ())
    if learner._gpu_loader_in_queue.qsize() or not all(_waits(t, learner._gpu_loader_in_queue) for t in loaders):
        return False
    return learner._learner_thread_in_queue.qsize() == 0 and _waits(thread, learner._learner_thread_in_queue)


def _waits(thread: threading.Thread, waiting: Any) -> bool:
    """Whether a thread is in `waiting.get()` with nothing in its hands (or is dead)."""
    frame = sys._current_frames().get(thread.ident or -1)
    code = type(waiting).get.__code__
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is waiting:
            return not any(name in frame.f_locals for name in _IN_HAND)
        frame = frame.f_back
    return not thread.is_alive()


def _exchange(learner: Any, key: str, mine: list[Any], deadline: float) -> list[Any]:
    """What all learners say, by rank.

    Over the store by which torch brought them together, and not by a collective operation: their threads are in those.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    store.set(f"{key}/{learner._rank}", json.dumps(mine))
    keys = [f"{key}/{rank}" for rank in range(torch.distributed.get_world_size())]
    try:
        store.wait(keys, timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
    except RuntimeError as error:  # torch's store timeout
        raise _timeout("not all learners were held at once") from error
    return [json.loads(store.get(name)) for name in keys]


def _synchronize(learner: TorchLearner) -> None:
    """What an update has started on a GPU must be over before its results are copied on another stream."""
    device = learner.device
    if getattr(device, "type", None) == "cuda":
        torch.cuda.synchronize(device)


def _timeout(why: str) -> SaveTimeoutError:
    return SaveTimeoutError(f"the learner could not be held still: {why}; save or restore again, between two `train()`")
