"""The storm: kills parts of a job that saves and restores all the time, and checks that nothing is lost.

What is killed, when and which of several is drawn from a seed: the same seed gives the same storm, as far as the
machine's own timing allows. Checked after every round, from outside of the cluster and without Ray: the newest
checkpoint is bit-identical for every rank, no checkpoint that was acknowledged is gone or went back, and every restore
that the job did set what it should.
"""

from __future__ import annotations

import queue
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rl_ckpt import Checkpointer
from tests.soak.arena import DRIVER, KINDS, NODE, Arena, arena
from tests.soak.job import WORKERS, wrong

_AMID = ("begun", "begun", "begun", "restoring")  # events after which a kill comes: in a save, or in a restore
_RECOVERY_S = 120.0


@dataclass
class Tally:
    """What a storm came to."""

    seed: int
    rounds: int = 0
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    begun: int = 0
    committed: int = 0
    aborted: int = 0
    restores: int = 0
    lost: list[str] = field(default_factory=list)
    """What must never be: acknowledged steps that are gone, wrong bits, steps that went back."""
    recovered_s: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    """Seconds from a kill to the next commit, by kind."""
    from_memory: int = 0
    """Restores that read nothing from the store."""
    errors: dict[str, int] = field(default_factory=dict)

    def note(self, what: str) -> None:
        """Counts something that may happen."""
        self.errors[what] = self.errors.get(what, 0) + 1

    def lines(self) -> list[str]:
        """The table."""
        times = [s for some in self.recovered_s.values() for s in some]
        mean = f"{statistics.fmean(times):.1f} s" if times else "-"
        kinds = [
            f"    {kind:15} {count:5d}   {statistics.fmean(self.recovered_s[kind]):6.1f} s"
            if self.recovered_s[kind]
            else f"    {kind:15} {count:5d}        -"
            for kind, count in self.kills.items()
        ]
        return [
            f"rounds {self.rounds} (seed {self.seed})",
            f"kills by kind {sum(self.kills.values()):7d}   mean time to recover",
            *kinds,
            f"saves begun {self.begun}, committed {self.committed}, aborted {self.aborted}, lost {len(self.lost)}",
            f"restores {self.restores}, {self.from_memory} of them without reading the store",
            f"mean time to recover {mean}",
            *(f"    {name}: {count}" for name, count in sorted(self.errors.items())),
            *(f"LOST: {text}" for text in self.lost),
        ]


class Storm:
    """One storm over one run."""

    def __init__(
        self, ground: Arena, url: str, storage_options: Mapping[str, Any], seed: int, say: Callable[[str], None]
    ) -> None:
        self._arena = ground
        self._url = url
        self._storage_options = dict(storage_options)
        self._random = random.Random(seed)
        self._say = say
        self._newest = 0  # step that was acknowledged
        self._begun_at: dict[int, float] = {}
        self.tally = Tally(seed)

    def run(self, seconds: float, options: Mapping[str, Any]) -> Tally:
        """Storms until the time is over, and at least until every kind was killed once."""
        self._arena.start_driver(
            url=self._url,
            storage_options=self._storage_options,
            seed=self.tally.seed,
            pause_s=0.05,
            options=dict(options),
        )
        self._await("the first commit", lambda event: event["event"] == "committed")
        by, kinds = time.monotonic() + seconds, list[str]()
        while time.monotonic() < by or min(self.tally.kills.values()) == 0:
            if not kinds:
                kinds = list(KINDS)
                self._random.shuffle(kinds)
            self._round(kinds.pop())
        self._arena.kill(DRIVER, 0)
        return self.tally

    def _round(self, kind: str) -> None:
        amid, delay_s = self._random.choice(_AMID), self._random.expovariate(1 / 0.05)
        pick, again = self._random.random(), self._random.random()
        if amid == "begun":
            self._await("a save", lambda event: event["event"] == "begun")
        else:  # a restore is what follows on a kill
            self._kill("rollout worker", again)
            self._await("a restore", lambda event: event["event"] == "restoring")
        time.sleep(delay_s)
        killed_at = time.time()
        if not self._kill(kind, pick):
            return
        if kind == NODE:
            self._arena.add_node()
        if self._arena.driver_is_gone():
            self._arena.start_driver()
        done = self._await(
            f"a commit after the {kind} was killed", lambda event: self._is_commit_since(event, killed_at)
        )
        self.tally.recovered_s[kind].append(done["at"] - killed_at)
        self.tally.rounds += 1
        self._check()
        self._say(
            f"round {self.tally.rounds}: {kind} after {amid!r}, step {self._newest}: {done['at'] - killed_at:.1f} s"
        )

    def _kill(self, kind: str, pick: float) -> bool:
        found = self._arena.kill(kind, pick)
        self.tally.kills[kind] += found
        return found

    def _is_commit_since(self, event: Mapping[str, Any], killed_at: float) -> bool:
        return event["event"] == "committed" and self._begun_at.get(event["step"], 0.0) > killed_at

    def _await(self, what: str, wanted: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
        """Takes what the driver says until it is what is waited for; starts the driver again where it ended."""
        by = time.monotonic() + _RECOVERY_S
        last: list[Mapping[str, Any]] = []
        while time.monotonic() < by:
            try:
                event = self._arena.events.get(timeout=1.0)
            except queue.Empty:
                if self._arena.driver_is_gone():
                    self.tally.note("the driver ended by itself")
                    self._arena.start_driver()
                continue
            last = [*last[-20:], event]
            self._note(event)
            if wanted(event):
                return event
        raise AssertionError(f"seed {self.tally.seed}: waited {_RECOVERY_S:.0f} s for {what}; the driver said {last}")

    def _note(self, event: Mapping[str, Any]) -> None:
        tally, kind = self.tally, event["event"]
        if "pids" in event:
            self._arena.workers = event["pids"]
        if kind == "begun":
            tally.begun += 1
            self._begun_at[event["step"]] = event["at"]
        elif kind == "committed":
            tally.committed += 1
            self._newest = max(self._newest, event["step"])
        elif kind == "restored":
            tally.restores += 1
            tally.from_memory += not {"store", "files", "store_again"} & {
                k for k, v in event["bytes_from"].items() if v
            }
            if event["fell_back"]:
                tally.note("restores that fell back")
            if event["wrong"]:
                tally.lost.append(f"restore of step {event['step']}: {event['wrong']}")
            if event["step"] < self._newest:
                tally.lost.append(f"step {self._newest} was acknowledged, then {event['step']} was restored: {event}")
        elif kind in ("aborted", "lost"):
            tally.aborted += kind == "aborted"
            tally.note(f"{kind}: {event['error']}")

    def _check(self) -> None:
        """The newest checkpoint as somebody sees it who has but the store."""
        reader, acknowledged = Checkpointer(self._url, storage_options=self._storage_options), self._newest
        for rank in range(WORKERS):
            state = reader.load_state(rank=rank)
            step = state["step"]
            if step < acknowledged:
                self.tally.lost.append(f"step {acknowledged} was acknowledged, the newest in the store is {step}")
            paths = wrong(state, self.tally.seed, rank, step, whole=True)
            if paths:
                self.tally.lost.append(f"step {step} in the store, rank {rank}: {paths} are wrong")


def storm(
    seconds: float,
    seed: int,
    url: str,
    storage_options: Mapping[str, Any],
    say: Callable[[str], None],
    nodes: int = 3,
    options: Mapping[str, Any] | None = None,
) -> Tally:
    """A storm on a cluster of its own.

    Args:
        seconds: For how long, at least.
        seed: Of the storm, and of the job's states.
        url: Of a run that does not exist yet.
        storage_options: For it.
        say: Takes a line a round.
        nodes: For workers, beside the head.
        options: More arguments for the job's Checkpointer.
    """
    with arena(nodes) as ground:
        return Storm(ground, url, storage_options, seed, say).run(seconds, options or {})
