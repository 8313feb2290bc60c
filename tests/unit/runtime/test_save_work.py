"""Save work: when the run is opened for writing, and when it is taken over from others."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rl_ckpt.errors import FencedError
from rl_ckpt.options import Options
from rl_ckpt.plan.deal import deal
from rl_ckpt.plan.inventory import take_inventory
from rl_ckpt.plan.merge import merge
from rl_ckpt.runtime import save_work
from rl_ckpt.runtime.save_work import SaveWork
from rl_ckpt.runtime.spec import RunSpec
from rl_ckpt.state.tree import flatten
from rl_ckpt.store.committer import SaveRequest, WrittenSave


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


def saving(checkpoint: str, step: int) -> Any:
    """A save of a plain leaf, of which all is in memory."""
    plan = deal(merge([take_inventory(flatten({"n": step}), 1 << 20, 1)], 1 << 20), ["s"], 1, 1 << 20)
    done = WrittenSave(checkpoint, SaveRequest(step), plan, {}, {})
    return SimpleNamespace(checkpoint=checkpoint, request=done.request, plan=plan, stall_s=0.0, done=lambda: done)


def work_in(folder: Path) -> SaveWork:
    return SaveWork(RunSpec(f"file://{folder}", {}, (), Options(), "get", "set"), "service", lambda: None)


def test_what_stays_in_memory_does_not_wait_for_a_store_that_hangs(tmp_path: Path) -> None:
    async def run() -> None:
        work, over = work_in(tmp_path / "run"), threading.Event()
        checkpoint = await work.name(SaveRequest(1))
        hanging = work._in_thread(work._committing, over.wait)
        try:
            async with asyncio.timeout(60):
                done, manifest = await work.land(saving(checkpoint, 1))
        finally:
            over.set()
        await hanging
        assert (done.record.id, done.in_store) == (checkpoint, False)
        assert checkpoint.encode() in manifest
        await work.close()

    asyncio.run(run())


@pytest.mark.parametrize("way", ["commit", "land"])
def test_a_save_ends_with_the_opening_of_the_run_that_named_it(tmp_path: Path, way: str) -> None:
    """Else it would be committed by a claim that came after another writer's commits."""

    async def run() -> None:
        work, other = work_in(tmp_path / "run"), work_in(tmp_path / "run")
        checkpoint = await work.name(SaveRequest(1))
        other.begin("other", take_over=True, idle=True)
        await other.name(SaveRequest(1))
        assert work._committer is not None
        work._committer.run.log.fenced_by = SimpleNamespace()  # type: ignore[assignment]
        work.begin("again", take_over=True, idle=False)
        await work.open()
        with pytest.raises(FencedError, match="opened for writing anew"):
            await getattr(work, way)(saving(checkpoint, 1))
        await work.close()
        await other.close()

    asyncio.run(run())
