"""Save work: when the run is opened for writing, and when it is taken over from others."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rl_ckpt.options import Options
from rl_ckpt.runtime import save_work
from rl_ckpt.runtime.save_work import SaveWork
from rl_ckpt.runtime.spec import RunSpec


class Opened:
    """A committer that is fenced once it is told so."""

    fenced_now = False

    def __init__(self, asked: list[bool], take_over: bool) -> None:
        asked.append(take_over)

    def is_gone(self) -> bool:
        return False

    def fenced(self) -> bool:
        return self.fenced_now

    def close(self) -> None:
        pass


def test_taking_over_is_asked_for_once_and_not_kept_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def made(*args: Any, take_over: bool, **more: Any) -> Opened:
        return Opened(asked, take_over)

    monkeypatch.setattr(save_work, "Committer", made)
    monkeypatch.setattr(Opened, "fenced_now", False)

    async def run() -> None:
        work = SaveWork(RunSpec(f"file://{tmp_path}", {}, (), Options(), "get", "set"), "service", lambda: None)
        work.begin("first", take_over=True, idle=True)
        await work.open()
        work.begin("second", take_over=True, idle=False)  # this coordinator has the run: nothing to take over
        await work.open()
        monkeypatch.setattr(Opened, "fenced_now", True)
        work.begin("third", take_over=False, idle=True)  # which did not ask for it
        await work.open()
        work.begin("fourth", take_over=True, idle=True)
        await work.open()

    asyncio.run(run())
    assert asked == [True, False, True]
