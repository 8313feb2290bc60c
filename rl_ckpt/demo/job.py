"""The demo job: train, save while training, lose a node, rebuild with other workers, restore, go on.

Owns the training, the record of every save and the checks after the recovery. Everything that makes checkpoints, and
the recovery itself, is `rl_ckpt.Checkpointer`, used as anybody would: `save` and `supervise`, nothing else.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rl_ckpt import Checkpointer, EverySteps, PendingSave, RestoreReport, SavePolicy
from rl_ckpt.demo.cluster import ExistingCluster, LocalCluster, Nodes
from rl_ckpt.demo.learner import Update
from rl_ckpt.demo.records import Check, IterationRecord, JobConfig, JobResult, RecoveryRecord, SaveRecord
from rl_ckpt.demo.team import Team
from rl_ckpt.errors import CheckpointError, InvalidInputError

Say = Callable[[str], None]
_NODES = 2
_SETTLE_S = 60.0
_PATIENCE_S = 600.0
"""How long the job trains on while it waits for somebody to kill a node."""


def run_job(config: JobConfig, say: Say) -> JobResult:
    """Run the whole job, on a cluster of its own or on the one at `config.address`.

    Args:
        config: What to run.
        say: Takes each line of progress.

    Returns:
        What happened; `JobResult.passed` tells whether the recovery held.

    Raises:
        InvalidInputError: There are checkpoints at the URL already; the demo would mix two runs.
        CheckpointError: A checkpoint could not be restored, or the store cannot be used.
        ConnectionError: There is no cluster at the address.
    """
    with Checkpointer(config.url) as ckpt:
        if ckpt.latest() is not None:
            raise InvalidInputError(f"{config.url} already holds checkpoints of another run: give the demo a new --url")
    if config.address is not None:
        with ExistingCluster(config.address) as cluster, Checkpointer(config.url) as ckpt:
            say(f"on the Ray cluster at {config.address}: {len(cluster.nodes)} worker nodes")
            return Job(config, cluster, ckpt, say).run()
    say(f"starting a Ray cluster on this machine: a head and {_NODES} nodes")
    with LocalCluster(_NODES) as started, Checkpointer(config.url) as ckpt:
        return Job(config, started, ckpt, say).run()


class Job:
    """One run of the demo.

    Args:
        config: What to run.
        cluster: Where the actors live.
        ckpt: Where the checkpoints go.
        say: Takes each line of progress.
    """

    def __init__(self, config: JobConfig, cluster: Nodes, ckpt: Checkpointer, say: Say) -> None:
        self._config = config
        self._cluster = cluster
        self._ckpt = ckpt
        self._say = say
        self._result = JobResult()
        self._saves: list[Future[SaveRecord]] = []
        self._saved_digests: dict[int, list[dict[str, str]]] = {}
        self._team: Team | None = None
        self._policy = SavePolicy(EverySteps(config.save_every))
        self._killed_at = math.nan
        self._failed_after = 0
        self._last_step = config.iterations
        self._patience_ends = math.inf
        self._heard_at = math.nan
        self._watchers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="demo-save")

    def run(self) -> JobResult:
        """Train to the end, with the failure in the middle."""
        with self._watchers:
            report = self._ckpt.supervise(self._make_workers, self._train)
            self._settle()
        for recovery in report.recoveries:
            if recovery.restored is None:  # lost before the first checkpoint: the job began anew
                continue
            noticed_s, rebuilt_s = recovery.time - self._killed_at, recovery.settled_s + recovery.rebuilt_s
            times = (noticed_s, rebuilt_s, recovery.restored_s)
            source = recovery.restored.bytes_from
            self._result.recovery = RecoveryRecord(self._failed_after, recovery.restored.step, *times, source)
        self._check_progress()
        return self._result

    @property
    def _life(self) -> int:
        return 0 if math.isnan(self._killed_at) else 1

    @property
    def _waits(self) -> bool:
        """Whether it is for somebody else to kill a node, who has not done it yet."""
        return self._config.kill == "you" and self._life == 0

    @property
    def _asked(self) -> bool:
        return self._patience_ends < math.inf

    def _make_workers(self) -> list[Any]:
        """A new team on the nodes that are there; `supervise` restores it."""
        if self._saved_digests and not self._life:  # killed from outside
            self._failed_after, self._killed_at = self._result.iterations[-1].step, self._heard_at
        count = self._config.workers_after if self._life else self._config.workers
        nodes = self._cluster.nodes
        self._say(f"building a learner and {count} rollout workers on {len(nodes)} node(s)")
        self._team = Team(self._config, count, nodes, self._life)
        return self._team.workers

    def _train(self, workers: Sequence[Any], restored: RestoreReport | None) -> None:
        """Train to the end; what an actor's death raises is for `supervise`."""
        team, step = self._team, 0
        assert team is not None
        if restored is not None:
            step = restored.step
            self._policy.restored(step)
            self._say(f"restored step {step} onto {len(workers)} actors in {restored.seconds:.2f} s")
            self._check_state(step, team.digests())
            # Two saves more, however late somebody killed the node: so that it shows that the job went on.
            self._last_step = max(self._last_step, step + 2 * self._config.save_every)
        while step < self._last_step or (self._waits and time.monotonic() < self._patience_ends):
            fail_now = self._life == 0 and step >= self._config.fail_at and not self._asked
            if fail_now:
                self._settle()  # so that there is certainly a checkpoint to come back to
            if fail_now and self._waits:
                self._ask_for_a_kill()
                fail_now = False
            update = team.iterate(self._kill_a_node if fail_now else None)
            self._heard_at = time.time()
            step = update.step
            self._note(update)
            if due := self._policy.due(step):
                self._policy.began(due, self._save(team, step))

    def _note(self, update: Update) -> None:
        """Record an iteration and print its line."""
        done = self._result.iterations
        mean = statistics.fmean(update.returns) if update.returns else (done[-1].mean_return if done else math.nan)
        done.append(IterationRecord(update.step, mean, len(update.returns), self._life))
        bar = "" if math.isnan(mean) else "█" * max(1, round(mean / 500 * 30))
        self._say(f"step {update.step:4d}  {update.env_steps:9,d} frames  return {mean:6.1f} {bar}")

    def _save(self, team: Team, step: int) -> PendingSave:
        """Begin a save and let a thread see when it is durable; training goes on at once."""
        self._saved_digests[step] = team.digests()
        mean = self._result.iterations[-1].mean_return
        started = time.perf_counter()
        pending = self._ckpt.save(step, team.workers, metrics={"return": mean})
        stall_s = time.perf_counter() - started
        self._saves.append(self._watchers.submit(_watch, pending, mean, started, stall_s))
        self._say(f"step {step:4d}  saving (training waited {stall_s * 1e3:.0f} ms)")
        return pending

    def _settle(self) -> None:
        """Wait until every save that was begun is durable or has failed."""
        for future in self._saves:
            self._result.saves.append(future.result())
        self._saves.clear()

    def _ask_for_a_kill(self) -> None:
        """Say which node to kill; training goes on meanwhile."""
        self._patience_ends = time.monotonic() + _PATIENCE_S
        learner = self._cluster.describe(self._cluster.nodes[0])
        self._say(f"!!! now kill a worker node, within {_PATIENCE_S:.0f} s; the learner is on {learner}")

    def _kill_a_node(self) -> None:
        """Kill the node that holds the learner, in the middle of an iteration."""
        victim = self._cluster.nodes[0]
        called = self._cluster.describe(victim)
        self._failed_after, self._killed_at = self._result.iterations[-1].step, time.time()
        count = self._cluster.kill_node(victim)
        self._say(f"!!! SIGKILL to {called}: {count} processes, the learner and its share of the rollout workers")

    def _check_state(self, step: int, found: list[dict[str, str]]) -> None:
        """Everything with a counterpart is what was saved, bit for bit; the policy is so on every worker."""
        saved = self._saved_digests[step]
        wrong = [
            f"rank {rank} {part}"
            for rank, (before, now) in enumerate(zip(saved, found, strict=False))
            for part in before
            if before[part] != now[part]
        ]
        both = min(len(saved), len(found))
        self._check(
            "state came back bit for bit", not wrong, f"ranks 0 to {both - 1}" + (f", but not {wrong}" if wrong else "")
        )
        shared = {(parts["policy"], parts["filter"]) for parts in [saved[0], *found]}
        self._check("every worker has the saved policy", len(shared) == 1, f"digest {saved[0]['policy']}")

    def _check_progress(self) -> None:
        """Step and return went on from the checkpoint instead of starting anew."""
        recovery = self._result.recovery
        if recovery is None:
            self._check(
                "the job survived the loss of a node", False, "no actor was lost after a checkpoint: nothing was shown"
            )
            return
        second = [r for r in self._result.iterations if r.life == 1]
        first_step = second[0].step if second else 0
        self._check(
            "the step went on",
            first_step == recovery.restored_step + 1,
            f"restored {recovery.restored_step}, then came {first_step}",
        )
        saved = next(r.mean_return for r in self._result.saves if r.step == recovery.restored_step)
        again = next((r.mean_return for r in second if r.ended), math.nan)
        # Half is far below the scatter of one iteration and far above the 20 of an untrained policy.
        self._check("the return went on", again >= saved / 2, f"{saved:.0f} at the save, {again:.0f} after the restore")

    def _check(self, name: str, passed: bool, detail: str) -> None:
        self._result.checks.append(Check(name, passed, detail))


def _watch(pending: PendingSave, mean_return: float, started: float, stall_s: float) -> SaveRecord:
    """Wait for a save to end; runs in a thread of its own."""
    try:
        info = pending.result(_SETTLE_S)
    except CheckpointError as error:
        return SaveRecord(pending.step, mean_return, stall_s, time.perf_counter() - started, 0, 0, str(error))
    durable_s = time.perf_counter() - started
    return SaveRecord(pending.step, mean_return, stall_s, durable_s, info.bytes, info.bytes_written)
