"""Ray Train's report loop: DistributedDataParallel on two workers, one of them killed."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from ray.train.torch import TorchTrainer, prepare_model

from rl_ckpt import Best, Checkpointer, EverySteps, LatestN, Replicated
from rl_ckpt.errors import InvalidInputError
from rl_ckpt.rllib.pointer import read
from rl_ckpt.rllib.train_loop import TrainLoop

STEPS = 6


def train_loop_per_worker(config):
    saves, rank = config["saves"].join(), ray.train.get_context().get_world_rank()
    torch.manual_seed(0)
    model = prepare_model(torch.nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    restored = saves.restore()
    first = 0
    if restored is not None:
        model.module.load_state_dict(restored["model"])
        optimizer.load_state_dict(restored["optimizer"])
        first = restored["step"] + 1
        assert restored["mine"] == rank
    killed = Path(config["killed"])
    for step in range(first, STEPS):
        if step == 3 and rank == 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        loss = model(torch.full((3, 4), float(rank + step))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = {
            "step": step,
            "mine": rank,
            "model": Replicated(model.module.state_dict()),
            "optimizer": Replicated(optimizer.state_dict()),
        }
        saves.report({"loss": float(loss), "first": first, "odd": [1]}, step=step, state=state).result()


def saves_when_due(config):
    saves, rank = config["saves"].join(), ray.train.get_context().get_world_rank()
    saves.restore()
    said = []
    for step in range(1, 8):
        # Rank 1 sees other numbers: both must save at the same steps all the same.
        value = {1: 1.0, 2: 5.0, 6: 9.0}.get(step, 0.0) if rank == 0 else float(step)
        if saves.due(step, {"return": value}):
            said.append(step)
            saves.report({"return": value}, step=step, state={"own": rank}).result()
    ray.train.report({"said": said})


def never_interrupted():
    """The model after the same steps, in one process: the gradients' mean is that of the mean of both losses."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in range(STEPS):
        losses = [model(torch.full((3, 4), float(rank + step))).square().mean() for rank in range(2)]
        optimizer.zero_grad()
        ((losses[0] + losses[1]) / 2).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.timeout(300)
def test_a_worker_that_is_killed(ray_small, tmp_path):
    with TrainLoop(str(tmp_path / "ours"), keep=[LatestN(2)]) as saves:
        result = TorchTrainer(
            train_loop_per_worker,
            train_loop_config={"saves": saves, "killed": str(tmp_path / "killed")},
            scaling_config=ray.train.ScalingConfig(num_workers=2),
            run_config=ray.train.RunConfig(
                name="run",
                storage_path=str(tmp_path / "theirs"),
                failure_config=ray.train.FailureConfig(max_failures=1),
            ),
        ).fit()
    assert (tmp_path / "killed").exists()
    assert result.metrics["first"] == 3, "it went on from the newest checkpoint"
    ckpt = Checkpointer(str(tmp_path / "ours"))
    assert [info.step for info in ckpt.checkpoints()] == [4, 5]
    newest = ckpt.latest()
    assert newest.world_size == 2
    assert sorted(newest.metrics) == ["first", "loss"], "what is no plain value is not recorded"
    found, expected = ckpt.load_state(select="model")["model"], never_interrupted()
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in expected.items())
    with result.checkpoint.as_directory() as folder:
        assert [path.name for path in Path(folder).iterdir()] == ["rl_ckpt.json"]
        assert read(folder).id == newest.id


@pytest.mark.timeout(300)
def test_workers_save_when_rank_0_says_so(ray_small, tmp_path):
    with TrainLoop(str(tmp_path / "ours"), when=[EverySteps(3), Best("return")]) as saves:
        TorchTrainer(
            saves_when_due,
            train_loop_config={"saves": saves},
            scaling_config=ray.train.ScalingConfig(num_workers=2),
            run_config=ray.train.RunConfig(name="run", storage_path=str(tmp_path / "theirs")),
        ).fit()
    assert [info.step for info in Checkpointer(str(tmp_path / "ours")).checkpoints()] == [1, 2, 3, 6]
    no_rule: Any = EverySteps
    with pytest.raises(InvalidInputError, match="is no rule"):
        TrainLoop(str(tmp_path / "ours"), when=[no_rule])


def test_only_the_driver_closes(ray_small, tmp_path):
    with TrainLoop(str(tmp_path)) as saves:
        copy = ray.get(ray.put(saves))
        with pytest.raises(InvalidInputError, match="the driver that made"):
            copy.close()
