"""Stops: a process of the cluster is held at a function, so that a test can kill it, or another one, just there."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from tests.ray.holders import WAIT_S, until


@dataclass(frozen=True)
class Stop:
    """A place where a process waits, as files that it and the test see. Used once."""

    folder: Path

    @property
    def arrived(self) -> Path:
        return self.folder / "arrived"

    @property
    def passed(self) -> Path:
        return self.folder / "go"

    def reached(self) -> None:
        """Waits until the process is there."""
        until(self.arrived.exists, f"{self.folder.name} is reached")

    def go(self) -> None:
        """Lets it go on."""
        self.passed.touch()

    def wait(self) -> None:
        """As the process does."""
        self.arrived.touch()
        deadline = time.monotonic() + WAIT_S
        while not self.passed.exists() and time.monotonic() < deadline:
            time.sleep(0.005)


def stop(folder: Path, name: str) -> Stop:
    """A new one."""
    made = Stop(folder / name)
    made.folder.mkdir()
    return made


def hold(actor: Any, at: Stop, module: str, function: str) -> None:
    """The next call of a function in an actor's process waits at a stop first; later ones do not."""
    ray.get(actor.__ray_call__.remote(_hold, at, module, function), timeout=WAIT_S)


def _hold(_: Any, at: Stop, module: str, function: str) -> None:
    owner = importlib.import_module(module)
    real: Callable[..., Any] = getattr(owner, function)

    def waits(*args: Any, **named: Any) -> Any:
        setattr(owner, function, real)
        at.wait()
        return real(*args, **named)

    setattr(owner, function, waits)


def hang(coordinator: Any, at: Stop, function: str, after: bool = False) -> None:
    """The next call of a method of the coordinator's `SaveWork` never ends; with `after`, it does its work before."""
    ray.get(coordinator.__ray_call__.remote(_hang, at, function, after), timeout=WAIT_S)


def _hang(coordinator: Any, at: Stop, function: str, after: bool) -> None:
    real = getattr(coordinator._save_work, function)

    async def never(*args: Any) -> None:
        if after:
            await real(*args)
        at.arrived.touch()
        await asyncio.Event().wait()

    setattr(coordinator._save_work, function, never)


def fail(coordinator: Any, function: str, error: Exception) -> None:
    """The next call of a method of the coordinator's `SaveWork` fails."""
    ray.get(coordinator.__ray_call__.remote(_fail, function, error), timeout=WAIT_S)


def _fail(coordinator: Any, function: str, error: Exception) -> None:
    work, real = coordinator._save_work, getattr(coordinator._save_work, function)

    async def fails(*_: Any) -> None:
        setattr(work, function, real)
        raise error

    setattr(work, function, fails)


def here(coordinator: Any) -> set[int]:
    """Ranks that have joined a save that is under way."""
    return set(ray.get(coordinator.__ray_call__.remote(_here), timeout=WAIT_S))


def _here(coordinator: Any) -> list[int]:
    return [rank for save in coordinator._saves._saves.values() for rank in save.here]


def state_of_saves(coordinator: Any) -> set[str]:
    """States of all saves that the coordinator knows of."""
    return set(ray.get(coordinator.__ray_call__.remote(_states), timeout=WAIT_S))


def _states(coordinator: Any) -> list[str]:
    return list(coordinator._saves.states().values())
