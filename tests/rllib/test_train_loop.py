"""Ray Train's report loop: DistributedDataParallel on two workers, one of them killed."""

import os
import signal
from pathlib import Path

import pytest
import ray.train
import torch
from ray.train.torch import TorchTrainer, prepare_model

from rl_ckpt import Checkpointer, LatestN, Replicated
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


def run(tmp_path, name, killed):
    with TrainLoop(str(tmp_path / name), keep=[LatestN(2)]) as saves:
        result = TorchTrainer(
            train_loop_per_worker,
            train_loop_config={"saves": saves, "killed": str(killed)},
            scaling_config=ray.train.ScalingConfig(num_workers=2),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=str(tmp_path / "theirs"),
                failure_config=ray.train.FailureConfig(max_failures=1),
            ),
        ).fit()
    return result, Checkpointer(str(tmp_path / name))


@pytest.mark.timeout(300)
def test_a_worker_that_is_killed(ray_small, tmp_path):
    done = tmp_path / "done"
    done.touch()
    whole, ckpt = run(tmp_path, "whole", done)
    assert whole.metrics["first"] == 0
    result, broken = run(tmp_path, "broken", tmp_path / "killed")
    assert (tmp_path / "killed").exists()
    assert result.metrics["first"] == 3, "it went on from the newest checkpoint"
    assert [info.step for info in broken.checkpoints()] == [4, 5]
    assert broken.latest().world_size == 2
    assert broken.latest().metrics == {"loss": result.metrics["loss"], "first": 3}
    assert result.metrics["loss"] == whole.metrics["loss"], "as if nothing had happened"
    one, other = (c.load_state(select="model") for c in (ckpt, broken))
    assert all(torch.equal(other["model"][name], value) for name, value in one["model"].items())
    with result.checkpoint.as_directory() as folder:
        assert [path.name for path in Path(folder).iterdir()] == ["rl_ckpt.json"]
        assert read(folder).id == broken.latest().id


def test_only_the_driver_closes(ray_small, tmp_path):
    with TrainLoop(str(tmp_path)) as saves:
        copy = ray.get(ray.put(saves))
        with pytest.raises(InvalidInputError, match="the driver that made"):
            copy.close()
