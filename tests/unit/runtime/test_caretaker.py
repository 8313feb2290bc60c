"""The coordinator lets the run go where the jobs of all who use it are over, and only where nothing is being saved."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from rl_ckpt.runtime import coordinator as coordinator_room
from rl_ckpt.runtime.coordinator import Coordinator
from rl_ckpt.runtime.owners import Owners


def looks(monkeypatch: pytest.MonkeyPatch, *answers: Callable[[Any], set[str]], user: str = "01-a") -> list[int]:
    """Runs the coordinator's caretaker, for one look whether jobs live for each of these answers.

    Args:
        monkeypatch: For Ray's answers.
        answers: Each is given the coordinator, and gives the jobs that are over.
        user: Of the run.

    Returns:
        After how many looks the run was let go, each time.
    """
    coordinator: Any = object.__new__(Coordinator)
    left, let_go, ended = list(answers), list[int](), asyncio.Event()
    coordinator._owners = Owners("/run")
    coordinator._owners.attach(user)
    coordinator.saving = False
    coordinator._saves = SimpleNamespace(busy=lambda: coordinator.saving)

    def is_open() -> bool:
        if not left:
            ended.set()
        return bool(left)

    async def close() -> None:
        let_go.append(len(answers) - len(left))

    coordinator._save_work = SimpleNamespace(is_open=is_open, close=close)
    monkeypatch.setattr(coordinator_room, "_LOOK_FOR_JOBS_S", 0.0)
    monkeypatch.setattr(coordinator_room, "dead_jobs", lambda: left.pop(0)(coordinator))

    async def run() -> None:
        caretaker = asyncio.create_task(coordinator._let_go_for_the_dead())
        await asyncio.wait([caretaker, asyncio.create_task(ended.wait())], return_when=asyncio.FIRST_COMPLETED)
        assert not caretaker.done(), "it goes on for as long as the coordinator lives"
        caretaker.cancel()

    asyncio.run(run())
    return let_go


def over(_: Any) -> set[str]:
    return {"01"}


def alive(_: Any) -> set[str]:
    return {"02"}


def no_answer(_: Any) -> set[str]:
    raise RuntimeError("Ray does not answer")


def while_a_save_begins(coordinator: Any) -> set[str]:
    coordinator.saving = True
    return over(coordinator)


def test_the_run_of_a_job_that_is_over_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(monkeypatch, alive, alive, over) == [3]


def test_a_head_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(monkeypatch, no_answer, no_answer, over) == [3]


def test_a_save_that_begins_meanwhile_keeps_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(monkeypatch, while_a_save_begins) == []
