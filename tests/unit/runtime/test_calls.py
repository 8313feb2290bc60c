"""Calls into workers of one save: which answer of the coordinator is about which death."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rl_ckpt.options import Options
from rl_ckpt.runtime import calls
from rl_ckpt.runtime.messages import Restages, encode
from rl_ckpt.runtime.spec import RunSpec
from rl_ckpt.runtime.staging import StagedRank

SPEC = RunSpec("file:///nowhere", {}, (), Options(), "get_state", "set_state")


def test_an_answer_from_before_a_death_does_not_settle_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the driver would go, and nobody would ask the others to stage in the dead one's place."""
    told: list[str] = []
    questions = iter(["before", "after"])

    def get(ref: str) -> bytes:
        if ref == "worker":
            raise ray.exceptions.RayActorError
        return encode(Restages("1-c", False))

    def asked(method: str, answer: Any) -> Any:
        def remote(*_: object) -> Any:
            told.append(method)
            return answer()

        return SimpleNamespace(remote=remote)

    link = SimpleNamespace(restages=asked("restages", lambda: next(questions)), lost_save=asked("lost", lambda: None))
    monkeypatch.setattr(calls, "coordinator", lambda _: link)
    monkeypatch.setattr(calls.ray, "get", get)
    some = calls._Calls(SPEC, [None, None], "lost_save", StagedRank, "key", None, lambda *_: b"")
    some._ask()
    some._refs["worker"] = 1
    some._hear("worker")
    some._hear("before")
    assert (some._dead, some._replies) == ({1}, {})
    some._ask()
    some._hear("after")
    assert (some._dead, some._replies) == (set(), {1: StagedRank("1-c", 0.0)})
    assert told == ["restages", "lost", "restages"]
