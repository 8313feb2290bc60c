"""Ray Tune: trials with runs of their own, killed sweeps that go on, PBT."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray import tune
from ray.rllib.algorithms.ppo import PPO
from ray.tune.schedulers import PopulationBasedTraining

from rl_ckpt.errors import CheckpointNotFoundError, CorruptionError, InvalidInputError
from rl_ckpt.rllib import AlgorithmCheckpointer, callback, load
from rl_ckpt.rllib import tune as ours
from rl_ckpt.rllib.pointer import Pointer, read, write
from rl_ckpt.rllib.tune import tune_trainable
from tests.rllib.small import ppo_config
from tests.rllib.tune_parts import score

ROOT = Path(__file__).parents[2]


def steps(url):
    return [info.step for info in AlgorithmCheckpointer(str(url)).checkpoints()]


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_population_based_training(ray_small, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # they leave their files open
    config = ppo_config(lr=tune.grid_search([1e-3, 1e-5])).callbacks(on_train_result=score)
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        metric="score",
        mode="max",
        perturbation_interval=2,
        quantile_fraction=0.5,
        resample_probability=0.0,
        hyperparam_mutations={"lr": [1e-3, 1e-5]},
        synch=True,
    )
    results = tune.Tuner(
        tune_trainable(PPO, str(tmp_path / "ours")),
        param_space=config,
        tune_config=tune.TuneConfig(scheduler=scheduler),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "theirs"),
            name="pbt",
            stop={"training_iteration": 5},
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
            verbose=0,
        ),
    ).fit()
    assert not results.errors
    assert [result.metrics["training_iteration"] for result in results] == [5, 5]
    good, bad = (Path(result.path).name for result in results)
    runs = sorted(path.name for path in (tmp_path / "ours").iterdir())
    taken = [name for name in runs if name.startswith(f"{bad}.")]
    goods = [info.id for info in AlgorithmCheckpointer(str(tmp_path / "ours" / good)).checkpoints()]
    assert taken, "the bad trial took the good one's checkpoint over, into a new run"
    assert {name.removeprefix(f"{bad}.") for name in taken} <= set(goods)
    pointer = read(results[1].checkpoint.path)
    assert pointer.owner == bad
    assert [p.name for p in Path(results[1].checkpoint.path).iterdir() if "rl_ckpt" in p.name] == ["rl_ckpt.json"]
    algo = load(pointer.url)  # what a trial saved is an Algorithm like any other
    assert type(algo) is PPO
    assert algo.iteration == pointer.step
    algo.stop()


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """Makes trials as Tune does, in this process."""
    for room in (callback, ours):
        monkeypatch.setattr(room, "trial_of", lambda algo: type(algo).of)

    def make(name):
        cls = tune_trainable(PPO, str(tmp_path / "runs"), wait_s=0.1)
        return type("PPO", (cls,), {"of": name})(config=ppo_config())

    return make


def test_a_trial_saves_once_an_iteration_and_takes_what_is_named(ray_small, trial, tmp_path):
    run, one, two = tmp_path / "runs", tmp_path / "1", tmp_path / "2"
    one.mkdir()
    two.mkdir()
    a = trial("a")
    a.train()
    a.save_checkpoint(str(one))
    a.save_checkpoint(str(two))
    assert read(one) == read(two)
    assert read(one).owner == "a"
    a.train()
    a.save_checkpoint(str(two))
    a.stop()
    assert steps(run / "a") == [1, 2]

    again = trial("a")
    assert again.iteration == 2, "goes on by itself"
    again.load_checkpoint(str(one))
    assert again.iteration == 1, "unless Tune says otherwise"
    again.train()
    again.save_checkpoint(str(two))
    write(one, Pointer(url=read(two).url, id="7-gone", step=7, owner="a"))
    again.load_checkpoint(str(one))
    assert again.iteration == 2, "the newest that was committed"
    again.stop()
    assert steps(run / "a") == [1, 2, 2]

    b = trial("b")
    with pytest.raises(CheckpointNotFoundError, match="trial a began checkpoint 7-gone"):
        b.load_checkpoint(str(one))
    b.load_checkpoint(str(two))
    assert b.iteration == 2
    b.save_checkpoint(str(one))
    b.stop()
    assert read(one).url.endswith(f"runs/b.{read(two).id}")
    assert not (run / "b").exists()


JOB = """
import sys
import time
from pathlib import Path
import ray
from ray import tune
from ray.rllib.algorithms.ppo import PPO
from rl_ckpt.rllib.callback import checkpointing
from rl_ckpt.rllib.tune import tune_trainable
from tests.rllib.small import ppo_config

how, folder, again = sys.argv[1], sys.argv[2], sys.argv[3] == "again"


def gate(*, algorithm, result, **_):
    while algorithm.iteration > 3 and not Path(folder, "open").exists():
        time.sleep(0.1)


ray.init("local", num_cpus=8, include_dashboard=False, object_store_memory=100 << 20, logging_level="ERROR")
url = folder + "/ours"
config = ppo_config(lr=tune.grid_search([1e-3, 1e-5])).callbacks(on_train_result=gate)
if how == "callback":
    config.callbacks(checkpointing(url))
    trainable, checkpoints = "PPO", None
else:
    trainable, checkpoints = tune_trainable(PPO, url), tune.CheckpointConfig(checkpoint_frequency=1)
theirs = folder + "/theirs"
if again:
    tuner = tune.Tuner.restore(theirs + "/sweep", trainable=trainable, param_space=config, resume_errored=True)
else:
    run_config = tune.RunConfig(
        storage_path=theirs, name="sweep", stop={"training_iteration": 5}, verbose=0, checkpoint_config=checkpoints
    )
    tuner = tune.Tuner(trainable, param_space=config, run_config=run_config)
results = tuner.fit()
for result in results:
    m = result.metrics
    print("DONE", Path(result.path).name, m["training_iteration"], m["iterations_since_restore"], flush=True)
"""


def start(how, folder, again):
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "TUNE_GLOBAL_CHECKPOINT_S": "0"}
    command = [sys.executable, "-c", JOB, how, str(folder), again]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT, start_new_session=True)


def finish(job):
    """Ends a job with all its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.stdout.close()
    job.wait(30)


def saved(folder):
    runs = folder / "ours"
    return {run.name: steps(run) for run in runs.iterdir()} if runs.exists() else {}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["trainable", pytest.param("callback", marks=pytest.mark.soak)])
def test_a_killed_sweep_goes_on(how, tmp_path):
    job = start(how, tmp_path, "first")
    try:
        # The gate holds the fourth iteration's end: Tune saves after it, the callback before.
        while list(saved(tmp_path).values()) != [[1, 2, 3] if how == "trainable" else [1, 2, 3, 4]] * 2:
            assert job.poll() is None, "the job ended"
            time.sleep(0.2)  # what happens is seen in the store alone
    finally:
        finish(job)
    (tmp_path / "open").touch()
    again = start(how, tmp_path, "again")
    try:
        said = [line.split()[1:] for line in again.stdout if line.startswith("DONE")]
        assert again.wait(60) == 0
    finally:
        finish(again)
    after = saved(tmp_path)
    assert sorted(name for name, *_ in said) == sorted(after)
    for name, iteration, since in said:
        assert int(iteration) == 5
        assert int(since) <= 3, "not from the beginning"
        assert after[name][-1] == 5
        assert after[name][:3] == [1, 2, 3]


def test_what_is_no_algorithm_or_no_pointer(tmp_path):
    with pytest.raises(InvalidInputError, match="give PPO, not PPOConfig"):
        tune_trainable(ppo_config(), str(tmp_path))
    with pytest.raises(InvalidInputError):
        tune_trainable(PPO, str(tmp_path), get_state="x")
    with pytest.raises(CorruptionError, match="names no checkpoint"):
        read(tmp_path)
    write(tmp_path, Pointer(url="u", id="i", step=1, format=2))
    with pytest.raises(CorruptionError, match="format 2"):
        read(tmp_path)
