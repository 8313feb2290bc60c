"""Preemption: notices that this process or nodes of the job will be taken away.

Owns: the SIGTERM handler while a watch is open, and a thread that asks Ray which nodes are drained. Promises: after the
watch is closed, the handler of before is back and the thread is gone. It saves nothing itself: the training loop knows
when a state is whole.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

import ray

from rl_ckpt import logs
from rl_ckpt.errors import InvalidInputError
from rl_ckpt.info import Preemption

_log = logs.logger(__name__)


class PreemptionWatch:
    """Tells of preemptions while its `with` block runs. Made by `Checkpointer.preemption`.

    Signals are only seen where the block is entered by the main thread (Python's rule), drains everywhere. A SIGTERM
    then no longer ends the process: the loop does, once it has saved. A handler of before is called too, unless it is
    Ray's, which would end a local cluster with its workers at once.
    """

    def __init__(self, grace_s: float, poll_s: float) -> None:
        """Watches nothing yet.

        Raises:
            InvalidInputError: A time is not greater than 0.
        """
        for name, value in (("grace_s", grace_s), ("poll_s", poll_s)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise InvalidInputError(f"{name}={value!r} must be a number of seconds greater than 0")
        self._grace_s = grace_s
        self._poll_s = poll_s
        self._signalled: float | None = None  # deadline, in Unix seconds
        self._before: Any = None
        self._handler: Any = None
        self._draining: Mapping[str, float] = {}  # node → deadline, in Unix seconds
        self._places: dict[str, str] = {}  # actor → node, where it is known
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def notice(self, workers: Sequence[Any] = ()) -> Preemption | None:
        """Whether something is to be taken away; asks nobody as long as nothing is.

        Args:
            workers: Ray actor handles, by rank. With them, only drains of their nodes and of this process's count;
                without, drains of any node.

        Returns:
            The notice, as it is now; None where there is none.
        """
        drained = dict(self._draining)
        ranks: tuple[int, ...] = ()
        home = ray.get_runtime_context().get_node_id() if drained else ""
        if drained and workers:
            nodes = [self._place(worker) for worker in workers]
            ranks = tuple(rank for rank, node in enumerate(nodes) if node in drained)
            drained = {node: at for node, at in drained.items() if node in nodes or node == home}
        signalled = self._signalled
        deadlines = [*drained.values(), *([] if signalled is None else [signalled])]
        if not deadlines:
            return None
        reasons = [] if signalled is None else [f"SIGTERM to process {os.getpid()}"]
        reasons += [f"node {node[:12]} is drained" for node in drained]
        here = signalled is not None or home in drained
        return Preemption(", ".join(reasons), min(deadlines), here, tuple(sorted(drained)), ranks)

    def __enter__(self) -> PreemptionWatch:
        """Begins to watch."""
        if threading.current_thread() is threading.main_thread():
            self._handler = self._on_sigterm
            self._before = signal.signal(signal.SIGTERM, self._handler)
        if ray.is_initialized():
            self._ask()  # at once: a node may be draining already
            self._thread = threading.Thread(target=self._poll, name="rl_ckpt-preemption", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the watch: the handler of before is back, the thread is gone."""
        self._closed.set()
        if self._handler is not None and signal.getsignal(signal.SIGTERM) is self._handler:
            # Else somebody put a handler on top of this one, which goes on handing signals down.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)
        if self._thread is not None:
            self._thread.join()

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Runs between two bytecodes of the main thread: remembers, and nothing else of ours."""
        if self._closed.is_set() and not callable(self._before):
            signal.signal(number, signal.SIG_DFL if self._before is None else self._before)
            os.kill(os.getpid(), number)
            return
        if self._signalled is None:  # a second one gives no more time
            self._signalled = time.time() + self._grace_s
        owner = str(getattr(self._before, "__module__", "") or "")
        if callable(self._before) and (self._closed.is_set() or owner.partition(".")[0] != "ray"):
            self._before(number, frame)

    def _poll(self) -> None:
        while not self._closed.wait(self._poll_s):
            if ray.is_initialized():
                self._ask()

    def _ask(self) -> None:
        """Takes down which nodes are drained."""
        try:
            found: Mapping[str, int] = ray._private.state.state.get_draining_nodes() or {}
        except (ray.exceptions.RayError, OSError, RuntimeError) as error:  # the cluster is busy or going: asked again
            _log.warning("Ray does not say which nodes are drained: %s", error)
            return
        known = self._draining
        self._draining = {
            node: ms / 1000 if ms else known.get(node, time.time() + self._grace_s) for node, ms in found.items()
        }

    def _place(self, worker: Any) -> str:
        """Node of a worker, as Ray knows it; empty where it does not (yet)."""
        actor = worker._actor_id.hex()
        if not self._places.get(actor):
            entry = ray._private.state.actors(actor) or {}
            self._places[actor] = entry.get("Address", {}).get("NodeID", "")
        return self._places[actor]
