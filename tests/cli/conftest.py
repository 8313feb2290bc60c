"""The command as people call it, in this process; and runs to call it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from rl_ckpt import Checkpointer
from rl_ckpt.cli.app import app

Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RL_CKPT_URL", "RAY_ADDRESS", "FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cli() -> Cli:
    """Runs a command; its exit code must be the one that is expected."""

    def run(*words: object, code: int = 0, env: dict[str, str] | None = None) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words], env=env, prog_name="rl-ckpt")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return run


def state(step: int) -> dict[str, Any]:
    """A state of which `head` changes at every step."""
    return {
        "policy": {"body": np.arange(64.0).reshape(8, 8), "head": np.full((4, 2), step, np.float32)},
        "rng": {"seed": step, "name": "\x1b[31mred"},
    }


def save(url: Path, *steps: int, tag: str | None = None, **options: Any) -> None:
    with Checkpointer(str(url), **options) as ckpt:
        for step in steps:
            ckpt.save_state(step, state(step), metrics={"return": step / 100}, tag=tag).result()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the checkpoints 100, 200 (tagged "best") and 300."""
    url = tmp_path / "run"
    save(url, 100)
    save(url, 200, tag="best")
    save(url, 300)
    return url


@pytest.fixture
def ids(run: Path) -> dict[int, str]:
    """Ids by step."""
    return {info.step: info.id for info in Checkpointer(str(run)).checkpoints()}
