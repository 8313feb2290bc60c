"""Finding a run's coordinator, and starting another where it was ended just then."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.options import Options
from rl_ckpt.runtime import links
from rl_ckpt.runtime.spec import RunSpec

SPEC = RunSpec("/run", {}, (), Options(join_timeout_s=60), "get_state", "set_state", user="01-a")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[RunSpec]:
    """The coordinators that were started, of which the first is being ended by another Checkpointer's close."""
    out: list[RunSpec] = []

    def start(spec: RunSpec) -> RunSpec:
        out.append(dataclasses.replace(spec, service=f"service-{len(out)}"))
        return out[-1]

    def insist(spec: RunSpec, call: Callable[[Any], Any], until: float) -> None:
        if spec.service == "service-0":
            raise InvalidInputError("it was ended")

    monkeypatch.setattr(links, "start_coordinator", start)
    monkeypatch.setattr(links, "insist", insist)
    monkeypatch.setattr(links, "_ASK_AGAIN_S", 0.0)
    return out


def test_one_that_another_close_ended_just_now_is_followed_by_a_new_one(started: list[RunSpec]) -> None:
    assert links.attached(SPEC) == started[-1]
    assert [spec.service for spec in started] == ["service-0", "service-1"]


def test_it_is_not_tried_for_ever(started: list[RunSpec]) -> None:
    hurried = dataclasses.replace(SPEC, options=dataclasses.replace(SPEC.options, join_timeout_s=1e-9))
    with pytest.raises(InvalidInputError, match="it was ended"):
        links.attached(hurried)
    assert len(started) == 1
