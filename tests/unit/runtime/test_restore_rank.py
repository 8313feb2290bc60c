"""One rank's part of a restore, without Ray: what it lets go when something goes wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rl_ckpt import Checkpointer
from rl_ckpt.errors import CheckpointError, CorruptionError, WorkerFailuresError
from rl_ckpt.options import Options
from rl_ckpt.runtime import restore
from rl_ckpt.runtime.messages import Apply, Candidate, Source, Sources
from rl_ckpt.store.run import Run

TOLD = WorkerFailuresError("rank 1 died", {1: "rank 1 died"})


@pytest.mark.parametrize("fails", ["verified", "set"])
def test_the_restores_memory_is_let_go_after_an_error(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, url = {"a": np.ones(100)}, tmp_path.as_uri()
    Checkpointer(str(tmp_path)).save_state(1, state).result()
    run = Run.open(url)
    _, data = run.manifest_file(run.candidates(None)[0][0])
    log: list[str] = []

    class Chunks:
        def __init__(self, *_: object) -> None:
            pass

        def verify(self, *_: object) -> dict[int, object]:
            return {}

        def take(self, _: Sources) -> None:
            log.append("taken")

        def copy(self, _: object) -> int:
            raise CorruptionError("the file is gone")

        def close(self) -> None:
            log.append("closed")

    def ask(*_: object) -> Any:
        if fails == "verified":
            raise TOLD
        return Apply({})

    def asked(ref: object, _: object) -> Any:
        reply = (
            Candidate("r#1", data, {}, 0, 1)
            if ref == "open"
            else Sources((Source("fetched", "/memory"),), offsets=(0,))
        )
        return SimpleNamespace(if_there=lambda: None, get=lambda: reply)

    link = SimpleNamespace(
        open_restore=SimpleNamespace(remote=lambda _: "open"),
        verified=None,
        match=SimpleNamespace(remote=lambda _: None),
        applied=None,
    )
    for name, fake in {
        "coordinator": lambda _: link,
        "ensure_server": lambda _: "server",
        "ask": ask,
        "Asked": asked,
        "ChunkSource": Chunks,
    }.items():
        monkeypatch.setattr(restore, name, fake)
    spec = restore.RunSpec(url, {}, (), Options(), "coordinator", "server")
    with pytest.raises(CheckpointError):
        restore.restore_rank(spec, restore.Place("r", 0, 1), restore.RestoreRequest(), state)
    assert log == ["taken", "closed"]
