"""The alternatives of one measurement, set up over a team of workers, as ways for `harness.rounds`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from benchmarks.alternatives import ALTERNATIVES, RLLIB, missing
from benchmarks.alternatives.rllib import RLlibActor
from benchmarks.harness import Way, call_all, empty
from benchmarks.results import Series
from tests.s3_servers import free_port

_RLLIB_NOTE = "one process, local learner; fsync added"
_RLLIB: Any = RLlibActor


class Others:
    """Alternatives that are installed here. Made by `others`."""

    def __init__(
        self, actors: Sequence[Any], place: str, here: Sequence[str], skipped: Mapping[str, str], rllib: Any | None
    ) -> None:
        self._actors = list(actors)
        self._where = place
        self._rllib = rllib
        self.skipped = dict(skipped)
        """Name → why it is not run."""
        self.notes = {name: ALTERNATIVES[name].note for name in here}
        """Name → what a reader must know, of those that are run."""
        if rllib is not None:
            self.notes[RLLIB] = _RLLIB_NOTE

    def saves(self) -> dict[str, Way]:
        """Ways that measure `stall`, `call` and `durable`, as `harness.save`."""
        return {name: self._saving(name) for name in self.notes}

    def restores(self) -> dict[str, Way]:
        """Ways that measure `restore`; each has saved once before."""
        for name in self.notes:
            self._saving(name)(0)
        return {name: self._restoring(name) for name in self.notes}

    def series(self, found: Mapping[str, Mapping[str, Sequence[float]]], measure: str) -> tuple[Series, ...]:
        """One series for each, out of what `harness.rounds` returned."""
        return tuple(Series(name, tuple(found[name][measure]), note) for name, note in self.notes.items())

    def _place(self, name: str) -> str:
        return f"{self._where}/{name.replace(' ', '-')}"

    def _saving(self, name: str) -> Way:
        def run(_round: int) -> Mapping[str, float]:
            place = self._place(name)
            if "://" not in place:
                empty(Path(place))
            begun = time.perf_counter()
            stalls: list[float]
            if name == RLLIB and self._rllib is not None:
                stalls = [ray.get(self._rllib.save.remote(place))]
            else:
                stalls = call_all(self._actors, "other_save", name, place)
            called = time.perf_counter()
            if name == RLLIB and self._rllib is not None:
                ray.get(self._rllib.wait.remote())
            else:
                call_all(self._actors, "other_wait", name)
            return {"stall": max(stalls), "call": called - begun, "durable": time.perf_counter() - begun}

        return run

    def _restoring(self, name: str) -> Way:
        def run(_round: int) -> Mapping[str, float]:
            place, begun = self._place(name), time.perf_counter()
            if name == RLLIB and self._rllib is not None:
                ray.get(self._rllib.restore.remote(place))
            else:
                call_all(self._actors, "other_restore", name, place)
            return {"restore": time.perf_counter() - begun}

        return run


@contextmanager
def others(
    actors: Sequence[Any],
    place: str,
    names: Sequence[str],
    *,
    unique_bytes: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Others]:
    """Sets up those that are installed.

    Args:
        actors: `BenchWorker`s with their state.
        place: Folder or url for what they save.
        names: Which; none at all may be.
        unique_bytes: Of the state of all of them together, replicas once: what RLlib's one process holds.
        options: For fsspec, where `place` is a url.
    """
    skipped = {name: why for name in names if (why := missing(name))}
    address = f"127.0.0.1:{free_port()}"
    here = [name for name in names if name not in skipped and name != RLLIB]
    rllib = _RLLIB.remote(unique_bytes) if RLLIB in names and RLLIB not in skipped else None
    for name in here:
        call_all(actors, "attach", name, address, dict(options or {}))
    if rllib is not None:
        ray.get(rllib.ready.remote())
    try:
        yield Others(actors, place, here, skipped, rllib)
    finally:
        for name in here:
            call_all(actors, "detach", name)
        if rllib is not None:
            ray.kill(rllib)
