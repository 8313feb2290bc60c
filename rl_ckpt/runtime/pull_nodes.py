"""A pull on all nodes of a Ray cluster: files are dealt to the nodes, each file leaves the source once.

Owns: which nodes take part (those that reach both sides), who copies what, and one limit of the bandwidth for all of
them together. Promises: what a node that dies had not finished goes to the others; a node's error comes back as a
value; no actor outlives the pull, nor the process that pulls. The copying is store/copier.py's, on every node.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rl_ckpt.errors import CheckpointError, from_code
from rl_ckpt.format import records
from rl_ckpt.runtime.watch import nodes
from rl_ckpt.store.base import ObjectMissingError, Store
from rl_ckpt.store.copier import Copier, FileJob
from rl_ckpt.store.meter import Counts, PullMeter, PullStoppedError
from rl_ckpt.store.probe import PROBE

FROM_BYTES = 64 << 20
"""Less is brought by one process sooner than actors start."""
_CALLS = 2  # under way on a node at a time: while the last pieces of one are read, the other has enough to do
_DEALT = 8  # a node's share is dealt in so many parts, so that nodes that are fast take more
_BATCH_BYTES = 64 << 20
_READY_S = 60.0
_TELL_S = 0.5
_MISSING = "missing"


class _Failure(NamedTuple):
    """An error as a value."""

    code: str
    message: str


class _Till:
    """The one limit, and the counts of all nodes: an actor that every read of every node asks."""

    def __init__(self, max_bytes_per_s: float | None) -> None:
        self._meter = PullMeter(max_bytes_per_s)
        self._by_node: dict[str, Counts] = {}
        self._stopped = False

    def pay(self, node: str, size_bytes: int, seen: Counts) -> float:
        """Books a read: how long to wait, in seconds; less than 0: stop. `seen`: the node's counts by now."""
        self._by_node[node] = seen
        return -1.0 if self._stopped else self._meter.reserve(size_bytes)

    def counts(self, node: str = "", seen: Counts | None = None) -> dict[str, Counts]:
        """By node, as far as was heard."""
        if seen is not None:
            self._by_node[node] = seen
        return self._by_node

    def stop(self) -> None:
        """Ends all reading."""
        self._stopped = True


class _NodeMeter(PullMeter):
    """Counts on one node, and asks the till before every read."""

    def __init__(self, node: str, till: Any, max_bytes_per_s: float | None) -> None:
        super().__init__(max_bytes_per_s)  # whose bucket only says how much to read at once
        self._node, self._till = node, till

    def reserve(self, size_bytes: int) -> float:
        try:
            delay: float = ray.get(self._till.pay.remote(self._node, size_bytes, self.counts()))
        except ray.exceptions.RayError as error:
            raise PullStoppedError(f"the process that pulls is gone: {error}") from error
        if delay < 0:
            self.stop()
        return delay


class _Puller:
    """One node's part: an actor, pinned to its node."""

    def __init__(
        self, node: str, source: Store, target: Store, till: Any, streams: int, max_bytes_per_s: float | None
    ) -> None:
        self._node, self._source, self._target, self._till = node, source, target, till
        self._streams = max(1, streams // _CALLS)
        self._meter = _NodeMeter(node, till, max_bytes_per_s)

    def reaches(self, run: bytes, probe: str) -> str:
        """Why this node can't take part; empty where it can."""
        try:
            if self._source.get(records.RUN_FILE) != run:
                return f"another run is at {self._source.url} there"
            if not self._target.exists(probe):
                return f"{self._target.url} is another place there"
        except (CheckpointError, ObjectMissingError) as error:
            return str(error)
        return ""

    def copy(self, jobs: Sequence[FileJob]) -> _Failure | None:
        """Brings files."""
        try:
            Copier(self._source, self._target, self._meter, room_bytes=(1 << 30) // _CALLS).copy(jobs, self._streams)
        except ObjectMissingError as error:
            return _Failure(_MISSING, str(error))
        except CheckpointError as error:
            return _Failure(error.code, str(error))
        finally:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._till.counts.remote(self._node, self._meter.counts()))
        return None


class NodesMover:
    """Moves files by all nodes that reach both sides; a context manager."""

    def __init__(
        self,
        source: Store,
        target: Store,
        meter: PullMeter,
        streams: int,
        max_bytes_per_s: float | None,
        again: Callable[[], None],
    ) -> None:
        """Nothing is started yet.

        Args:
            source: Read from.
            target: Written to.
            meter: Counts for the caller.
            streams: Reads at a time, of each node.
            max_bytes_per_s: Limit for all nodes together.
            again: Called about twice a second meanwhile, in the caller's thread.
        """
        self._source, self._target, self._meter, self._again = source, target, meter, again
        self._streams, self._limit = streams, max_bytes_per_s
        self._till: Any = None
        self._pullers: dict[str, Any] = {}
        self.bytes_by_node: dict[str, int] = {}
        self.notices: list[str] = []

    def __enter__(self) -> NodesMover:
        """Starts actors on all nodes, and asks each what it reaches."""
        alive = [node for node, leaving in nodes().items() if not leaving]
        grouped: Any = ray.remote
        # On this process's own node: whatever other node dies, the others go on.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._till = grouped(num_cpus=0)(_Till).options(scheduling_strategy=here).remote(self._limit)
        made = {
            node: grouped(num_cpus=0, max_concurrency=_CALLS)(_Puller)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
            .remote(node, self._source, self._target, self._till, self._streams, self._limit)
            for node in alive
        }
        probe = f"{PROBE}{uuid.uuid4().hex}"
        self._target.put(probe, [b"who reaches this?"])
        try:
            asked = {made[n].reaches.remote(self._source.get(records.RUN_FILE), probe): n for n in alive}
            ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_READY_S)
            why = {asked[ref]: _said(ref) if ref in ready else "it did not answer" for ref in asked}
        finally:
            self._target.delete([probe])
        self._pullers = {node: made[node] for node in alive if not why[node]}
        left_out = {node: said for node, said in why.items() if said}
        if left_out and len(alive) > 1:
            node, said = next(iter(left_out.items()))
            self.notices.append(f"{len(left_out)} of {len(alive)} nodes took no part: {said} ({node})")
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the actors."""
        for actor in [*self._pullers.values(), self._till]:
            ray.kill(actor)
        self._pullers = {}

    @property
    def nodes(self) -> int:
        """That take part."""
        return len(self._pullers)

    def move(self, jobs: Sequence[FileJob]) -> None:
        """Brings files; raises what `Copier.copy` raises."""
        waiting = deque(_dealt(jobs, len(self._pullers)))
        under_way: dict[Any, tuple[str, list[FileJob]]] = {}
        told = time.monotonic()
        try:
            while waiting or under_way:
                self._deal(waiting, under_way)
                ready, _ = ray.wait(list(under_way), timeout=_TELL_S)
                for ref in ready:
                    node, batch = under_way.pop(ref)
                    self._settle(ref, node, batch, waiting)
                if time.monotonic() - told >= _TELL_S:
                    told = time.monotonic()
                    self._count()
                    self._again()
        except BaseException:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._till.stop.remote(), timeout=_READY_S)
                if under_way:  # what is being read now ends; files on local disks stay unfinished, for the next pull
                    ray.wait(list(under_way), num_returns=len(under_way), timeout=_READY_S)
            raise
        self._count()

    def _deal(self, waiting: deque[list[FileJob]], under_way: dict[Any, tuple[str, list[FileJob]]]) -> None:
        busy = [node for node, _ in under_way.values()]
        for _ in range(_CALLS):
            for node, puller in self._pullers.items():
                if waiting and busy.count(node) < _CALLS:
                    batch = waiting.popleft()
                    under_way[puller.copy.remote(batch)] = (node, batch)
                    busy.append(node)
        if not under_way and waiting:  # no node is left: this process goes on
            Copier(self._source, self._target, self._meter).copy([j for batch in waiting for j in batch], self._streams)
            waiting.clear()

    def _settle(self, ref: Any, node: str, batch: list[FileJob], waiting: deque[list[FileJob]]) -> None:
        """Takes an outcome; what a lost node had not finished waits again."""
        try:
            failure = ray.get(ref)
        except ray.exceptions.RayError as error:
            if self._pullers.pop(node, None) is not None:
                self.notices.append(f"a node was lost, the others went on without it: {node} ({type(error).__name__})")
            waiting.append(batch)
            return
        if failure is None:
            return
        if failure.code == _MISSING:
            raise ObjectMissingError(failure.message)
        raise from_code(failure.code, failure.message)

    def _count(self) -> None:
        """Hears how far the nodes are."""
        try:
            by_node: dict[str, Counts] = ray.get(self._till.counts.remote())
        except ray.exceptions.RayError:  # gone with its node: the reads end by themselves
            return
        self.bytes_by_node = {node: counts.bytes_moved for node, counts in by_node.items() if counts.bytes_moved}
        self._meter.elsewhere(list(by_node.values()))


def _said(ref: Any) -> str:
    try:
        said: str = ray.get(ref)
    except ray.exceptions.RayError as error:
        return type(error).__name__
    return said


def _dealt(jobs: Sequence[FileJob], count: int) -> list[list[FileJob]]:
    """Files in order, in batches: large enough to pay a call, small enough that nodes end together."""
    total = sum(job.bytes for job in jobs)
    size = max(1, min(_BATCH_BYTES, total // max(1, count * _CALLS)), total // max(1, count * _DEALT * _CALLS))
    batches: list[list[FileJob]] = [[]]
    filled = 0
    for job in jobs:
        if batches[-1] and filled + job.bytes > size:
            batches.append([])
            filled = 0
        batches[-1].append(job)
        filled += job.bytes
    return [batch for batch in batches if batch]
