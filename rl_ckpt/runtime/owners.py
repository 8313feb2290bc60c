"""Owners: which driver's job a run belongs to, among those of one cluster that share its coordinator. Pure.

Owns: who uses the run's actors, whose saves are taken, and what the others are told. Several Checkpointers of one Ray
job are one owner. Between clusters, the lease in the store does the same (store/lease.py). Saves that were under way
when another job took over go on and commit, in order, before the first save of the new owner.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from rl_ckpt.errors import CheckpointError, FencedError, RunOwnedError
from rl_ckpt.runtime.spec import RunSpec, job_of
from rl_ckpt.store.lease import liveness, moment


@dataclass(frozen=True, slots=True)
class User:
    """A Checkpointer that saves to the run."""

    spec: RunSpec
    """With the id of the user, and who it is."""
    since: float
    """Unix seconds of its first save."""

    @property
    def text(self) -> str:
        """For messages."""
        return f"{self.spec.by} (Ray job {self.spec.job})"


@dataclass(slots=True)
class Owners:
    """See the module."""

    url: str
    _jobs: dict[str, str] = field(default_factory=dict)
    """Users that are not done → their Ray jobs."""
    _users: dict[str, User] = field(default_factory=dict)
    """Those that have begun to save."""
    _owner: User | None = None
    _taken: dict[str, str] = field(default_factory=dict)
    """Ray jobs that were taken over from → what they are told."""

    def owner_is_seen(self) -> bool:
        """Whether the process of the one that saves is seen to be alive: on this host."""
        process = self._owner.spec.process if self._owner is not None else None
        return process is not None and liveness(process) == "alive"

    def attach(self, user: str) -> None:
        """A Checkpointer uses the run's actors."""
        self._jobs[user] = job_of(user)

    def detach(self, user: str, dead: Collection[str]) -> bool:
        """A Checkpointer is done; whether no live job uses the actors any more.

        Args:
            user: Its id.
            dead: Ray jobs that are over.
        """
        job = self._jobs.pop(user, "")
        self._users.pop(user, None)
        if self._owner is not None and self._owner.spec.job == job and not any(self._of(job)):
            self._owner = None
        return self.are_gone(dead)

    def are_gone(self, dead: Collection[str]) -> bool:
        """Whether nobody who uses the actors is alive.

        Args:
            dead: Ray jobs that are over.
        """
        return all(job in dead for job in self._jobs.values())

    def alone(self, user: str, dead: Collection[str]) -> bool:
        """Whether no other Checkpointer of a live job uses the actors.

        Args:
            user: Its id.
            dead: Ray jobs that are over.
        """
        return all(other == user or job in dead for other, job in self._jobs.items())

    def _of(self, job: str) -> list[User]:
        return [user for user in self._users.values() if user.spec.job == job]

    def begin(self, user: User, take_over: bool, dead: Collection[str]) -> CheckpointError | None:
        """A Checkpointer is about to save for the first time; why it may not.

        Args:
            user: The Checkpointer.
            take_over: Takes the run over from a job that is alive too.
            dead: Ray jobs that are over.
        """
        job, owner = user.spec.job, self._owner
        self._jobs[user.spec.user] = job
        if owner is not None and owner.spec.job != job and owner.spec.job not in dead:
            if not take_over:
                told = self._taken.get(job)
                return FencedError(told) if told and any(self._of(job)) else RunOwnedError(self._owned(owner))
            self._taken[owner.spec.job] = (
                f"{self.url} was taken over by {user.text} at {moment(user.since, user.since).partition(' (')[0]}; "
                "this job may not save to it any more. If that was a mistake, stop the other job and start again"
            )
        if owner is None or owner.spec.job != job:
            self._owner = user
        self._taken.pop(job, None)
        self._users[user.spec.user] = user
        return None

    def _owned(self, owner: User) -> str:
        return (
            f"{self.url} is owned by another job of this cluster that is alive: {owner.text}, since "
            f"{moment(owner.since)}. Only one job may write to a run: stop that one or close its Checkpointer, give "
            "this one another url, or take the run over with Checkpointer(..., take_over=True), which makes the other "
            "job's next save fail. Nothing was written"
        )

    def refused(self, user: str) -> CheckpointError | None:
        """Why a save of a Checkpointer is not taken; None where it is."""
        owner, job = self._owner, job_of(user)
        if owner is None or owner.spec.job == job:
            return None
        told = self._taken.get(job)
        return FencedError(told) if told else RunOwnedError(self._owned(owner))

    def owner_spec(self) -> RunSpec | None:
        """Rules and options of the Checkpointer that owns the run, the first of its job; None where none does."""
        return self._owner.spec if self._owner is not None else None

    def spec_of(self, user: str) -> RunSpec | None:
        """Rules and options of a Checkpointer that has begun to save."""
        known = self._users.get(user)
        return known.spec if known is not None else None
