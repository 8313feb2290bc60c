"""A run against a dict: saves, rollbacks, retention, damage and reopening; what loads is what the model says."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rl_ckpt import Checkpointer, CheckpointInfo, CorruptionError, EveryNSteps, InvalidInputError, KeepRule, LatestN
from tests.unit.trees import assert_same

steps = st.integers(0, 12)


def state(seed: int) -> dict[str, Any]:
    """Parts of it stay the same from save to save, so that checkpoints share files."""
    rng = np.random.default_rng(seed % 5)
    return {"w": rng.random(40), "frozen": np.arange(30.0), "seed": seed, "all": [None, (1.5, "x")]}


class RunMachine(RuleBasedStateMachine):
    """The model: checkpoints by id in the order of their commits, and where the job stands in their line."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.infos: list[CheckpointInfo] = []
        self.states: dict[str, int] = {}
        self.parents: dict[str, str | None] = {}
        self.damaged: set[str] = set()
        self.parent: str | None = None
        self.seed = 0
        self.opened = False

    @initialize(latest=st.integers(1, 4), every=st.none() | st.integers(2, 4))
    def open(self, latest: int, every: int | None) -> None:
        self.latest, self.every = latest, every
        self.keep: list[KeepRule] = [LatestN(latest), *([EveryNSteps(every)] if every else [])]
        self.reopen()

    @rule()
    def reopen(self) -> None:
        if self.opened:
            self.ckpt.close()
        self.opened = True
        self.ckpt: Checkpointer = Checkpointer(str(self.folder), keep=self.keep, grace_s=0, chunk_bytes=128)
        self.parent = None

    def line(self) -> list[str]:
        at = self.parent if self.parent in self.states else self.infos[-1].id if self.infos else None
        out = []
        while at is not None and at in self.states:
            out.append(at)
            at = self.parents[at]
        return out

    @rule(step=steps, tag=st.sampled_from([None, None, "best"]))
    def save(self, step: int, tag: str | None) -> None:
        if step in {info.step for info in self.infos if info.id in self.line()}:
            with pytest.raises(InvalidInputError, match=f"step {step} is committed already"):
                self.ckpt.save_state(step, state(0))
            return
        self.seed += 1
        info = self.ckpt.save_state(step, state(self.seed), metrics={"seed": self.seed}, tag=tag).result(60)
        self.ckpt._saver._writer.submit(int).result(60)  # type: ignore[union-attr]  # retention is done
        expected_parent = self.parent or (self.infos[-1].id if self.infos else None)
        assert (info.step, info.tag, dict(info.metrics)) == (step, tag, {"seed": self.seed})
        assert info.lineage[:1] == ((expected_parent,) if expected_parent else ())
        self.parents[info.id], self.states[info.id] = expected_parent, self.seed
        self.infos.append(info)
        self.parent = None
        self._retain()

    def _retain(self) -> None:
        kept = [
            info
            for i, info in enumerate(self.infos)
            if len(self.infos) - i <= self.latest or info.tag or (self.every and info.step % self.every == 0)
        ]
        self.infos = kept
        self.states = {info.id: self.states[info.id] for info in kept}

    @precondition(lambda self: self.infos)
    @rule()
    def load_newest(self) -> None:
        good = [info for info in reversed(self.infos) if info.id not in self.damaged]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if not good:
                with pytest.raises(CorruptionError, match="no good checkpoint"):
                    self.ckpt.load_state()
                return
            found = self.ckpt.load_state()
        assert_same(found, state(self.states[good[0].id]))
        fell_back = self.infos[-1].id in self.damaged
        assert [f"fell back to checkpoint {good[0].id}" in str(w.message) for w in told] == [True] * fell_back
        self.parent = good[0].id

    @precondition(lambda self: self.infos)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted({info.step for info in self.infos})))
        newest = [info for info in self.infos if info.step == step][-1]
        if newest.id in self.damaged:
            with pytest.raises(CorruptionError):
                self.ckpt.load_state(step)
            return
        assert_same(self.ckpt.load_state(step), state(self.states[newest.id]))
        self.parent = newest.id

    @precondition(lambda self: self.infos and self.infos[-1].id not in self.damaged)
    @rule(where=st.floats(0, 1, exclude_max=True))
    def damage_newest(self, where: float) -> None:
        """Flips a byte of the newest manifest; then the job goes back to what is good, as a restart does."""
        path = self.folder / "manifests" / f"{self.infos[-1].id}.json"
        data = bytearray(path.read_bytes())
        data[int(where * len(data))] ^= 0x10
        path.write_bytes(data)
        self.damaged.add(self.infos[-1].id)
        self.reopen()
        self.load_newest()

    @invariant()
    def what_is_listed_is_what_is_kept(self) -> None:
        if self.opened:
            found = self.ckpt.checkpoints()
            assert [info.id for info in found] == [info.id for info in self.infos]
            latest = self.ckpt.latest()
            assert (latest.id if latest else None) == (self.infos[-1].id if self.infos else None)

    def teardown(self) -> None:
        if self.opened:
            self.ckpt.close()
        shutil.rmtree(self.folder, ignore_errors=True)


TestRun = RunMachine.TestCase
TestRun.settings = settings(deadline=None, max_examples=25, stateful_step_count=20)
