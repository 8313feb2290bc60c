"""Observing: what the coordinator's machines do, told as metrics and logs.

Owns: when saves and restores began, and how far they are, as far as their instructions tell. Promises: only looks;
nothing waits for it, and what it does not understand it passes over. Does not: decide anything.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rl_ckpt import logs, metrics
from rl_ckpt.format.records import CommitRecord
from rl_ckpt.runtime import restore_steps as rm
from rl_ckpt.runtime import save_steps as sm
from rl_ckpt.runtime.messages import Apply, Candidate, Failure, SaveDone, Sources, TryNext
from rl_ckpt.store.counting import QUIET, tell_newest

GAUGES_S = 5.0
"""Between two times that `gauges` is to be called: Ray sends every 10 s."""
_KEPT = 256  # saves and restores of whose end nothing may ever be heard
_COUNTED_ELSEWHERE = {"store", "store_again", "files"}  # by whoever reads there

_STAGED = (sm.LANDING, sm.SETTLING, sm.WRITING)  # states of a save that ranks have no part in any more

_log = logs.logger()


@dataclass(slots=True)
class _Save:
    begun: float
    """When the first rank was heard of, which had its state together by then."""
    staged: float | None = None
    """When the last one had staged."""
    named: bool = False
    staged_bytes: int = 0
    new_bytes: int = 0


@dataclass(slots=True)
class _Restore:
    begun: float
    mark: float
    """When the phase began that it is in."""
    phase: str = "find"
    checkpoint: str = ""


class Observer:
    """See the module. For one event loop."""

    def __init__(self, run: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing has happened yet.

        Args:
            run: Its url.
            clock: In seconds.
        """
        self._run = run
        self._clock = clock
        self._saves: OrderedDict[str, _Save] = OrderedDict()  # by token
        self._restores: OrderedDict[str, _Restore] = OrderedDict()  # by key
        self._last: float | None = None  # time of the newest commit
        self._by_kind: dict[type, Callable[[Any], object]] = {
            sm.Arm: lambda arm: self._armed(arm.token, arm.state),
            sm.Name: lambda name: self._named(self._save(name.token)),
            sm.Commit: lambda commit: self._sizes(commit.token, commit.save, True),
            sm.Land: lambda land: self._sizes(land.token, land.save, False),
            sm.Finish: lambda finish: self._finished(finish.token, finish.outcome, finish.checkpoint),
            rm.Arm: lambda arm: self._opened(arm.token, arm.state),
            rm.Fetch: lambda fetch: self._phase(_key(fetch.token), "match", "read"),
            rm.Search: lambda search: self._phase(_key(search.token), "match", "read"),
            rm.Await: lambda wait: self._phase(_key(wait.token), "match", "read"),
            rm.Answer: lambda answer: self._answered(answer.key, answer.reply),
            rm.Forget: lambda forget: self._set(_key(forget.token)),
        }

    def see(self, instruction: Any) -> None:
        """A machine wants this done."""
        told = self._by_kind.get(type(instruction))
        if told is not None:  # most are not of interest, and there are some for each rank
            told(instruction)

    # Saves.

    def _save(self, token: str) -> _Save:
        found = self._saves.setdefault(token, _Save(self._clock()))
        _limit(self._saves)
        return found

    def _staged(self, token: str) -> _Save:
        save = self._save(token)
        save.staged = self._clock() if save.staged is None else save.staged
        return save

    def _armed(self, token: str, state: str) -> None:
        if state != sm.FAILED:
            self._save(token)
            if state in _STAGED:
                self._staged(token)

    def _sizes(self, token: str, save: sm.Save, to_store: bool) -> None:
        assert save.plan is not None
        seen = self._staged(token)
        seen.staged_bytes = (save.dealt or save.plan).new_bytes
        seen.new_bytes = save.plan.new_bytes if to_store else seen.staged_bytes

    def _named(self, save: _Save) -> None:
        if not save.named:
            save.named = True
            metrics.record(metrics.SAVES_BEGUN, 1, self._run)
            self._queued()

    def _queued(self) -> None:
        metrics.record(metrics.SAVES_QUEUED, sum(save.named for save in self._saves.values()), self._run)

    def _finished(self, token: str, outcome: SaveDone | Failure, checkpoint: str) -> None:
        save = self._saves.get(token)
        if save is None:  # what came late of a save that had failed
            return
        self._named(save)
        del self._saves[token]
        self._queued()
        about = logs.fields(checkpoint)
        if isinstance(outcome, Failure):
            metrics.record(metrics.SAVES_FAILED, 1, self._run, outcome.code)
            level = logging.INFO if outcome.code in QUIET else logging.WARNING
            _log.log(level, "save %s failed (%s): %s", checkpoint, outcome.code, outcome.message, extra=about)
            return
        # Ranks are heard of when they have collected their states: their own word is how long all of it took.
        begun = min(save.begun, (save.begun if save.staged is None else save.staged) - outcome.stall_s)
        durable_s = self._clock() - begun
        metrics.record(metrics.SAVES_COMMITTED, 1, self._run)
        metrics.record(metrics.STALL, outcome.stall_s, self._run)
        metrics.record(metrics.DURABLE, durable_s, self._run)
        metrics.record(metrics.BYTES_STAGED, save.staged_bytes, self._run)
        metrics.record(metrics.BYTES_DEDUPLICATED, save.staged_bytes - save.new_bytes, self._run)
        where = "in the store" if outcome.in_store else "in memory"
        text = "checkpoint %s is %s after %.2f s: %d bytes staged, %d written, training waited %.3f s"
        numbers = (save.staged_bytes, save.new_bytes if outcome.in_store else 0, outcome.stall_s)
        _log.info(text, checkpoint, where, durable_s, *numbers, extra=about)
        if outcome.in_store:
            self.newest(outcome.record)

    def newest(self, commit: CommitRecord | None) -> None:
        """The run's newest checkpoint in the store, as it is now."""
        if commit is not None:
            self._last = commit.time
            tell_newest(self._run, commit)

    def gauges(self, tier: Mapping[str, int]) -> None:
        """What changes by itself.

        Args:
            tier: `Tier.counts`.
        """
        metrics.record(metrics.TIER_REPLICAS, tier["copies_held"], self._run)
        metrics.record(metrics.TIER_MISSING, tier["copies_missing"], self._run)
        if self._last is not None:
            metrics.record(metrics.LAST_AGE, max(0.0, time.time() - self._last), self._run)

    # Restores.

    def _opened(self, token: str, state: str) -> None:
        if state == rm.OPENING:
            now = self._clock()
            self._restores.setdefault(_key(token), _Restore(now, now))
            _limit(self._restores)

    def found(self, token: str, checkpoint: str) -> None:
        """The candidate of a restore."""
        if _key(token) in self._restores:
            self._restores[_key(token)].checkpoint = checkpoint

    def _answered(self, key: str, reply: object) -> None:
        match reply:
            case Candidate():
                self._phase(key, "find", "match")
            case Sources():
                self._phase(key, "match", "read")
            case Apply(bytes_from):
                self._read(key, bytes_from)
            case TryNext() if key in self._restores:
                self._restores[key].phase, self._restores[key].mark = "find", self._clock()
            case Failure(code, message) if key in self._restores:
                about = logs.fields(self._restores.pop(key).checkpoint)
                metrics.record(metrics.RESTORES, 1, self._run, code)
                level = logging.INFO if code in QUIET else logging.WARNING
                _log.log(level, "a restore failed (%s): %s", code, message, extra=about)
            case _:
                return

    def _phase(self, key: str, done: str, begins: str) -> bool:
        """Where a restore is in the phase that is done, the next one begins."""
        restore = self._restores.get(key)
        if restore is None or restore.phase != done:
            return False
        now = self._clock()
        metrics.record(metrics.RESTORE_SECONDS, now - restore.mark, self._run, done)
        restore.phase, restore.mark = begins, now
        return True

    def _read(self, key: str, bytes_from: Mapping[str, int]) -> None:
        if self._phase(key, "read", "set"):
            metrics.record(metrics.RESTORES, 1, self._run, "ok")
            for source, size in bytes_from.items():
                if source not in _COUNTED_ELSEWHERE:
                    metrics.record(metrics.BYTES_READ, size, self._run, source)

    def _set(self, key: str) -> None:
        if self._phase(key, "set", "over"):
            restore = self._restores.pop(key)
            seconds = self._clock() - restore.begun
            metrics.record(metrics.RESTORE_SECONDS, seconds, self._run, "total")
            text = "checkpoint %s is restored after %.2f s"
            _log.info(text, restore.checkpoint, seconds, extra=logs.fields(restore.checkpoint))


def _key(token: str) -> str:
    return token.rpartition("#")[0]


def _limit(kept: OrderedDict[str, Any]) -> None:
    while len(kept) > _KEPT:
        kept.popitem(last=False)
