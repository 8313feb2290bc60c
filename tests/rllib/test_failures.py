"""What goes wrong inside RLlib's actors reaches the user as an error; nothing hangs, and training goes on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

import rl_ckpt
from rl_ckpt.rllib import AlgorithmCheckpointer, inside
from tests.rllib.small import OwnModule, built, full_digest, own_config, ppo_config

DISK_BYTES = 4 << 20


class Refuses(OwnModule):
    """A module whose own state can't be saved as soon as it is told so."""

    refuses = False

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.refuses:
            raise ZeroDivisionError("no state today")
        return super().get_state()


def refuse(learner: Any, refuses: bool) -> None:
    for id_ in learner.module._rl_modules:
        learner.module[id_].unwrapped().refuses = refuses


def hold_an_object(learner: Any) -> None:
    learner.module["default_policy"].unwrapped().get_state = lambda *_a, **_k: {"handle": object()}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def on_learner(algo: Any, function: Any, *args: Any) -> None:
    (actor,) = algo.learner_group._worker_manager.actors().values()
    ray.get(actor.__ray_call__.remote(function, *args))


def test_a_full_disk_is_told_and_training_goes_on(ray_small: None, small_disk: Path) -> None:
    config = ppo_config().learners(num_learners=1).env_runners(num_env_runners=1)
    with built(config) as algo, AlgorithmCheckpointer(str(small_disk), memory_tier=False) as ckpt:
        algo.train()
        ckpt.save(algo).result()
        room = os.statvfs(small_disk)
        (small_disk / "theirs").write_bytes(bytes(room.f_bavail * room.f_frsize))
        algo.train()
        before = full_digest(algo)
        pending = ckpt.save(algo)
        algo.train()
        with pytest.raises(rl_ckpt.StorageError, match="No space left"):
            pending.result()
        (small_disk / "theirs").unlink()
        algo.train()
        assert full_digest(algo) != before
        assert ckpt.save(algo).result().step == algo.iteration
        assert ckpt.restore(algo).iteration == algo.iteration


def test_a_learner_whose_state_cannot_be_had(ray_small: None, tmp_path: Path) -> None:
    config = own_config().learners(num_learners=1)
    config.rl_module(rl_module_spec=RLModuleSpec(module_class=Refuses, model_config={}))
    with built(config) as algo, AlgorithmCheckpointer(str(tmp_path)) as ckpt:
        algo.train()
        on_learner(algo, refuse, True)
        with pytest.raises(rl_ckpt.WorkerFailuresError, match=r"rank 1 .*ZeroDivisionError: no state today"):
            ckpt.save(algo)
        on_learner(algo, refuse, False)
        assert algo.learner_group._worker_manager.num_healthy_actors() == 1
        algo.train()
        assert ckpt.save(algo).result().step == 2
        assert [info.step for info in ckpt.checkpoints()] == [2]


def test_state_that_is_no_data_is_named(ray_small: None, tmp_path: Path) -> None:
    with built(own_config().learners(num_learners=1)) as algo, AlgorithmCheckpointer(str(tmp_path)) as ckpt:
        on_learner(algo, hold_an_object)
        with pytest.raises(rl_ckpt.InvalidInputError, match=r"rank 1: .*handle.* is a builtins.object"):
            ckpt.save(algo)
        assert algo.learner_group._worker_manager.num_healthy_actors() == 1


def test_an_env_runner_that_dies_costs_its_episodes_not_the_save(ray_small: None, tmp_path: Path) -> None:
    config = ppo_config().env_runners(num_env_runners=2)
    with built(config) as algo, AlgorithmCheckpointer(str(tmp_path)) as ckpt:
        algo.train()
        victim = algo.env_runner_group._worker_manager.actors()[1]
        ray.kill(victim)
        info = ckpt.save(algo).result()
        tree = rl_ckpt.Checkpointer(str(tmp_path)).load_state(info.step, select="about")
        assert tree["about"]["env_runners"] == [0, 2]
        there = full_digest(algo)
    loaded = None
    with AlgorithmCheckpointer(str(tmp_path)) as ckpt:
        try:
            loaded = ckpt.load()
            assert full_digest(loaded) == there
            assert any("env runner 1 has no counterpart" in text for text in ckpt.last_restore.notices)
            loaded.train()
        finally:
            if loaded is not None:
                loaded.stop()


def test_a_process_that_fails_to_fetch_changes_nothing(ray_small: None, tmp_path: Path) -> None:
    config = ppo_config().env_runners(num_env_runners=1)
    with built(config) as algo, AlgorithmCheckpointer(str(tmp_path)) as ckpt:
        algo.train()
        ckpt.save(algo).result()
        algo.train()
        before, state = full_digest(algo), torch.get_rng_state()
        (runner,) = algo.env_runner_group._worker_manager.actors().values()
        ray.get(runner.__ray_call__.remote(lambda r: setattr(r, "module", Broken())))
        with pytest.raises(rl_ckpt.WorkerFailuresError, match=r"env runner 1: .*AttributeError.*nothing was changed"):
            ckpt.restore(algo)
        assert full_digest(algo) == before
        assert torch.equal(torch.get_rng_state(), state)
        assert not inside._held
        assert not ray.get(runner.__ray_call__.remote(lambda _: len(inside._held)))


class Broken:
    """No module."""
