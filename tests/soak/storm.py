"""The storm: kills parts of a job that saves and restores all the time, and checks that nothing is lost.

What is killed, when and which of several is drawn from a seed: the same seed gives the same storm, as far as the
machine's own timing allows. Checked after every round, from outside of the cluster and without Ray: the newest
checkpoint in the store is bit-identical for every rank, and none that was acknowledged as stored is gone or went back.
Checked of every restore that the job did: it set what it should, and went back behind nothing that was acknowledged,
be it stored or only in memory (`persist_every`; at most one node is killed between two saves).
"""

from __future__ import annotations

import contextlib
import queue
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl_ckpt import Checkpointer
from tests.soak.arena import COORDINATOR, DRIVER, KINDS, NODE, SERVER, WORKER, Arena, arena
from tests.soak.job import WORKERS, wrong

ROUNDS = (*((kind,) for kind in KINDS), (WORKER, COORDINATOR), (NODE, DRIVER), (SERVER, COORDINATOR))
"""What is killed at once."""
_AMID = ("begun", "restoring")  # events after which a kill comes: in a save, or in a restore
_RECOVERY_S = 120.0
_FROM_STORE = frozenset({"store", "files", "store_again"})
_TEXT = 150


@dataclass
class Tally:
    """What a storm came to."""

    seed: int
    rounds: int = 0
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    begun: int = 0
    committed: int = 0
    only_in_memory: int = 0
    """Of those that were committed."""
    aborted: int = 0
    restores: int = 0
    from_memory: int = 0
    """Restores that read nothing from the store."""
    fell_back: int = 0
    """Restores that passed over a newer checkpoint."""
    gave_up: int = 0
    """Drivers that ended by themselves."""
    lost: list[str] = field(default_factory=list)
    """What must never be: acknowledged steps that are gone, wrong bits, steps that went back."""
    recovered_s: dict[str, list[float]] = field(default_factory=dict)
    """Seconds from a kill to the commit of a save that was begun after it, by what was killed."""
    notes: Counter[str] = field(default_factory=Counter)
    """What else happened, and how often."""

    def lines(self) -> list[str]:
        """The table."""
        out = [f"rounds {self.rounds} (seed {self.seed})"]
        out += [f"  {'killed':28} {'rounds':>6}   mean time to recover (longest)"]
        for what, times in sorted(self.recovered_s.items(), key=lambda item: (item[0].count("+"), item[0])):
            out.append(f"  {what:28} {len(times):6d}   {statistics.fmean(times):6.1f} s ({max(times):.1f} s)")
        if every := [s for times in self.recovered_s.values() for s in times]:
            out.append(f"  {'all':28} {len(every):6d}   {statistics.fmean(every):6.1f} s ({max(every):.1f} s)")
        kills = ", ".join(f"{kind} {count}" for kind, count in self.kills.items())
        out.append(f"kills {sum(self.kills.values())}: {kills}")
        memory = f" ({self.only_in_memory} of them in memory alone)" if self.only_in_memory else ""
        out.append(
            f"saves begun {self.begun}, committed {self.committed}{memory}, aborted {self.aborted}, "
            f"lost {len(self.lost)}"
        )
        out.append(
            f"restores {self.restores}, {self.from_memory} of them without reading the store, "
            f"{self.fell_back} fell back; drivers that gave up {self.gave_up}"
        )
        out += [f"  {count:3d} x {text}" for text, count in sorted(self.notes.items())]
        return [*out, *(f"LOST: {text}" for text in self.lost)]


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
        self._newest_stored = 0  # and is in the store
        self._begun_at: dict[int, float] = {}
        self._killed = "nothing"
        self.tally = Tally(seed)

    def run(self, seconds: float, options: Mapping[str, Any], kinds: Sequence[tuple[str, ...]]) -> Tally:
        """Storms until the time is over, and at least until everything of these was killed once."""
        self._arena.start_driver(
            url=self._url,
            storage_options=self._storage_options,
            seed=self.tally.seed,
            options=dict(options),
        )
        self._await("the first commit", lambda event: event["event"] == "committed")
        by, first = time.monotonic() + seconds, True
        while first or time.monotonic() < by:
            for killed in self._random.sample(kinds, len(kinds)):
                if first or time.monotonic() < by:
                    self._round(killed)
            first = False
        self._arena.kill(DRIVER, 0)
        return self.tally

    def _round(self, kinds: tuple[str, ...]) -> None:
        amid, delay_s = self._random.choice(_AMID), self._random.expovariate(1 / 0.05)
        again, *picks = (self._random.random() for _ in range(1 + len(kinds)))
        self._hear()
        self._killed = what = " + ".join(kinds)
        if amid == "begun":
            self._await("a save", lambda event: event["event"] == "begun")
        else:  # a restore is what follows on a kill
            self._kill(WORKER, again)
            self._await("a restore", lambda event: event["event"] == "restoring")
        self._hear(delay_s)
        killed_at = time.time()
        for kind, pick in zip(kinds, picks, strict=True):
            self._kill(kind, pick)
        if NODE in kinds:
            self._arena.add_node()
        if self._arena.driver_is_gone():
            self._arena.start_driver()
        done = self._await(f"a commit after the kill of {what}", lambda event: self._is_commit_since(event, killed_at))
        took_s = done["at"] - killed_at
        self.tally.recovered_s.setdefault(what, []).append(took_s)
        self.tally.rounds += 1
        self._check()
        self._say(f"round {self.tally.rounds}: {what} after {amid!r}, step {self._newest}: {took_s:.1f} s")

    def _kill(self, kind: str, pick: float) -> None:
        self.tally.kills[kind] += self._arena.kill(kind, pick)

    def _is_commit_since(self, event: Mapping[str, Any], killed_at: float) -> bool:
        return event["event"] == "committed" and self._begun_at.get(event["step"], 0.0) > killed_at

    def _hear(self, seconds: float = 0.0) -> None:
        """Takes what the driver has said so far, and what it says for so long."""
        by = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while True:
                self._note(self._arena.events.get(timeout=max(0.0, by - time.monotonic())))

    def _await(self, what: str, wanted: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
        """Takes what the driver says until it is what is waited for; starts the driver again where it ended."""
        by = time.monotonic() + _RECOVERY_S
        last: list[Mapping[str, Any]] = []
        while time.monotonic() < by:
            try:
                event = self._arena.events.get(timeout=1.0)
            except queue.Empty:
                if self._arena.driver_is_gone():
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
            tally.only_in_memory += not event["in_store"]
            self._newest = max(self._newest, event["step"])
            if event["in_store"]:
                self._newest_stored = max(self._newest_stored, event["step"])
        elif kind == "restored":
            self._note_restored(event)
        elif kind == "anew" and self._newest:
            tally.lost.append(f"step {self._newest} was acknowledged, and the job began anew")
        elif kind == "aborted":
            tally.aborted += 1
            self._note_error(event)
        elif kind in ("lost", "ended"):
            tally.gave_up += kind == "ended"
            self._note_error(event)

    def _note_restored(self, event: Mapping[str, Any]) -> None:
        tally, read = self.tally, {name: size for name, size in event["bytes_from"].items() if size}
        tally.restores += 1
        tally.from_memory += not _FROM_STORE & read.keys()
        if _FROM_STORE & read.keys():
            tally.notes[f"{self._killed}: a restore read the store ({', '.join(read)})"] += 1
        if event["fell_back"]:
            tally.fell_back += 1
            tally.notes[f"{self._killed}: a restore fell back: {event['fell_back']}"] += 1
        if event["wrong"]:
            tally.lost.append(f"restore of step {event['step']}: {event['wrong']}")
        if event["step"] < self._newest:
            tally.lost.append(f"step {self._newest} was acknowledged, then {event['step']} was restored: {event}")

    def _note_error(self, event: Mapping[str, Any]) -> None:
        text = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{6,}\b|\d+", "#", " ".join(event["text"].split()))
        self.tally.notes[f"{self._killed}: {event['event']}: {event['error']}: {text[:_TEXT]}"] += 1

    def _check(self) -> None:
        """The newest checkpoint as somebody sees it who has but the store."""
        reader, acknowledged = Checkpointer(self._url, storage_options=self._storage_options), self._newest_stored
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
    kinds: Sequence[tuple[str, ...]] = ROUNDS,
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
        kinds: What is killed at once, in each round.
    """
    with arena(nodes) as ground:
        return Storm(ground, url, storage_options, seed, say).run(seconds, options or {}, kinds)
