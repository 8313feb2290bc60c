"""A pull's process ends at every operation on the destination; then a new one pulls again.

At each point: what was committed at the destination is as it was, the checkpoint on its way is wholly there or wholly
absent, and the next pull brings it, reading nothing from the source that had arrived whole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rl_ckpt import Checkpointer, pull
from rl_ckpt.format import records
from rl_ckpt.store import copier, mirror
from rl_ckpt.store.local import LocalStore
from rl_ckpt.store.partial import PartialFile
from rl_ckpt.store.urls import open_store
from tests.crash.points import POINTS
from tests.plain.pulls import saved, state
from tests.unit.trees import assert_same

CHANGES = ("put", "create", "delete", "partial")


class Died(BaseException):
    """The process was killed: nothing handles it."""


class Mortal:
    """Ends a process at its n-th change of one store; nothing that it does afterwards has an effect."""

    def __init__(self, root: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.at, self.seen = root, at, 0
        for name in CHANGES:
            monkeypatch.setattr(LocalStore, name, self._mortal(getattr(LocalStore, name)))
        for name in ("write", "finish"):
            monkeypatch.setattr(PartialFile, name, self._mortal(getattr(PartialFile, name)))

    def _mortal(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def step(it: Any, *args: Any) -> Any:
            path = it.root if isinstance(it, LocalStore) else it._path
            if path.startswith(self.root):
                self.seen += 1
                if self.seen > self.at:
                    raise Died
            return act(it, *args)

        return step


@pytest.fixture
def src(tmp_path: Path) -> str:
    return saved(str(tmp_path / "src"))


@pytest.mark.parametrize("before", [None, 1], ids=["new mirror", "mirror"])
def test_a_pull_ends_at_every_operation(
    src: str, tmp_path: Path, before: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "probe_create_only", lambda *_: None)  # eight threads, whose order is never the same
    monkeypatch.setattr(copier, "PIECE_BYTES", 64 << 10)
    at, ended = 0, False
    while not ended:
        dst = tmp_path / f"dst-{at}"
        if before is not None:
            pull(src, dst, at=before)
        with monkeypatch.context() as patch:
            mortal = Mortal(str(dst), at, patch)
            try:
                pull(src, dst, streams=1)
                ended = True
            except Died:
                ended = False
        there = [info.step for info in Checkpointer(str(dst)).checkpoints()]
        assert there in ([s for s in (before, 3) if s], [s for s in (before,) if s]), f"at operation {at}"
        for step in there:
            assert_same(Checkpointer(str(dst)).load_state(step), state(step))
        kept = sum(item.size_bytes for item in open_store(dst).list(records.SHARDS))
        report = pull(src, dst)
        assert report.bytes_moved <= sum(i.size_bytes for i in open_store(dst).list(records.SHARDS)) - kept
        assert_same(Checkpointer(str(dst)).load_state(), state(3))
        assert Checkpointer(str(dst)).verify().ok
        at += 1
    assert mortal.seen == at - 1 > 10
    POINTS["local", "pull", "before"] += at
