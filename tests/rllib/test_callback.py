"""`checkpointing(...)` in a config: saves beside training, resumes by itself, keeps the best, saves when told to go."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.rllib.algorithms.ppo import PPO
from ray.rllib.callbacks.callbacks import RLlibCallback

from rl_ckpt import Auto, LatestN
from rl_ckpt.errors import CheckpointError, InvalidInputError, SaveSkippedError
from rl_ckpt.info import Preemption
from rl_ckpt.plan.retention import BestN
from rl_ckpt.rllib import AlgorithmCheckpointer, tune_trainable
from rl_ckpt.rllib.callback import CheckpointCallback, checkpointing, run_url
from rl_ckpt.rllib.config import config_from, config_tree
from rl_ckpt.rllib.result import at, recorded
from tests.rllib.small import ppo_config

ROOT = Path(__file__).parents[2]


def config(url, **options):
    return ppo_config().callbacks(checkpointing(str(url), **options))


def steps(url):
    return [info.step for info in AlgorithmCheckpointer(str(url)).checkpoints()]


def weights(algo):
    return {k: v.clone() for k, v in algo.get_module("default_policy").state_dict().items()}


def test_saves_every_so_often_and_resumes_by_itself(ray_small, tmp_path):
    algo = config(tmp_path, every_iterations=2, keep=[LatestN(3)]).build_algo()
    for _ in range(5):
        algo.train()
    algo.stop()
    assert steps(tmp_path) == [2, 4]
    (info,) = [i for i in AlgorithmCheckpointer(str(tmp_path)).checkpoints() if i.step == 4]
    assert info.metrics["training_iteration"] == 4
    assert info.metrics["num_env_steps_sampled_lifetime"] == 256

    again = config(tmp_path, every_iterations=2).build_algo()
    assert again.iteration == 4
    again.train()
    assert again.iteration == 5
    kept = weights(again)
    again.train()
    again.stop()
    assert steps(tmp_path) == [2, 4, 6]
    assert len(kept) > 0

    anew = config(tmp_path / "other", resume=False).build_algo()
    assert anew.iteration == 0
    anew.stop()


def test_what_load_builds_is_not_restored_twice_and_goes_on_where_it_was_put(ray_small, tmp_path):
    algo = config(tmp_path).build_algo()
    for _ in range(3):
        algo.train()
    algo.stop()
    with AlgorithmCheckpointer(str(tmp_path)) as ckpt:
        loaded = ckpt.load(step=1)
    assert loaded.iteration == 1
    (callback,) = loaded.callbacks
    assert callback.checkpointer.last_restore is None, "restored by load alone"
    loaded.train()
    loaded.stop()
    found = AlgorithmCheckpointer(str(tmp_path)).checkpoints()
    assert [info.step for info in found] == [1, 2, 3, 2]
    assert found[-1].lineage == (found[0].id,)


def test_the_best_is_kept_and_known_after_a_restart(ray_small, tmp_path):
    def results(algo, *values):
        (callback,) = algo.callbacks
        for value in values:
            algo._iteration += 1
            callback.on_train_result(algorithm=algo, result={"env_runners": {"episode_return_mean": value}})

    best = ("env_runners/episode_return_mean", "max")
    algo = config(tmp_path, best=best, every_iterations=10, keep=[LatestN(1)]).build_algo()
    results(algo, 3.0, 9.0, 5.0, float("nan"))
    results(algo, *([1.0] * 6))  # iteration 10, saved as it is time to
    algo.stop()
    assert steps(tmp_path) == [2, 10]

    again = config(tmp_path, best=best, every_iterations=10, keep=[LatestN(1)]).build_algo()
    assert again.iteration == 10
    results(again, 8.0)
    again.callbacks[0].close()
    assert steps(tmp_path) == [2, 10], "9 was better"
    again.stop()


class Counting(RLlibCallback):
    pass


def test_beside_other_callbacks_and_in_env_runners(ray_small, tmp_path):
    both = [Counting, checkpointing(str(tmp_path), every_seconds=1e-9)]
    algo = ppo_config().callbacks(both).env_runners(num_env_runners=1).build_algo()
    algo.train()
    algo.stop()
    assert steps(tmp_path) == [1]


def test_a_save_that_fails_in_the_background_is_raised_by_the_next_call(ray_small, tmp_path):
    run = tmp_path / "run"
    algo = config(run).build_algo()
    algo.train()
    (callback,) = algo.callbacks
    callback._pending[0].result()
    (run / "shards").rename(tmp_path / "aside")
    (run / "shards").write_text("no folder")
    algo.train()  # staged; the write fails
    callback._pending[-1]._future.exception()
    with pytest.raises(CheckpointError, match="Not a directory"):
        algo.train()
    (run / "shards").unlink()
    (tmp_path / "aside").rename(run / "shards")
    algo.train()
    algo.stop()
    assert steps(run)[-1] == 4


def test_an_algorithm_that_does_not_fit_is_not_built(ray_small, tmp_path):
    algo = config(tmp_path).build_algo()
    algo.train()
    algo.stop()
    other = config(tmp_path).rl_module(model_config={"fcnet_hiddens": [9], "head_fcnet_hiddens": []})
    with pytest.raises(InvalidInputError, match="does not fit"):
        other.build_algo()


# --- a job that is killed, or told to go ---

JOB = """
import sys
import ray
from tests.rllib.small import ppo_config
from rl_ckpt.rllib.callback import checkpointing

url, every = sys.argv[1], int(sys.argv[2])
ray.init("local", num_cpus=8, include_dashboard=False, object_store_memory=100 << 20, logging_level="ERROR")
algo = ppo_config().callbacks(checkpointing(url, every_iterations=every, grace_s=60)).build_algo()
print("from", algo.iteration, flush=True)
while True:
    algo.train()
    print("at", algo.iteration, flush=True)
"""


def start(*args):
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", JOB, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT, start_new_session=True)


def read_until(job, wanted):
    for line in job.stdout:
        if line.strip() == wanted:
            return
    raise AssertionError(f"the job ended before it said {wanted!r}")


def finish(job):
    """Ends a job with all its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.stdout.close()
    job.wait(30)


def test_a_killed_job_goes_on_when_it_is_started_again_and_saves_when_it_is_told_to_go(tmp_path):
    job = start(tmp_path, 2)
    try:
        read_until(job, "at 5")
    finally:
        finish(job)
    saved = steps(tmp_path)[-1]
    assert saved >= 2
    again = start(tmp_path, 100_000)
    try:
        read_until(again, f"from {saved}")
        read_until(again, f"at {saved + 1}")
        again.terminate()
        said = [int(line.split()[1]) for line in again.stdout if line.startswith("at ")]
        assert again.wait(60) == 143
    finally:
        finish(again)
    assert steps(tmp_path)[-1] == (said[-1] if said else saved + 1) + 1, "the iteration in which the notice came"


def test_of_two_runs_the_newer_checkpoint_is_resumed_and_one_run_has_one_callback(ray_small, tmp_path):
    def both():
        often, seldom = (
            checkpointing(tmp_path / name, every_iterations=n) for name, n in (("often", 1), ("seldom", 2))
        )
        return ppo_config().callbacks([often, seldom])

    algo = both().build_algo()
    for _ in range(3):
        algo.train()
    algo.stop()
    again = both().build_algo()
    assert again.iteration == 3
    for _ in range(2):
        again.train()
    again.stop()
    assert [steps(tmp_path / name) for name in ("often", "seldom")] == [[1, 2, 3, 4, 5], [2, 4]]

    twice = [checkpointing(tmp_path / "often"), checkpointing(str(tmp_path / "often") + "/")]
    with pytest.raises(InvalidInputError, match="is twice among the callbacks"):
        ppo_config().callbacks(twice).build_algo()


# --- no Ray ---


class Saves:
    """In place of an AlgorithmCheckpointer: refuses the first save, as when earlier ones are being written."""

    def __init__(self):
        self.saved = []
        self.refused = False

    def save(self, algorithm, **_):
        if not self.refused:
            self.refused = True
            raise SaveSkippedError("busy")
        self.saved.append(algorithm.iteration)
        return SimpleNamespace(settled=lambda: True, result=lambda: None, peek=lambda: None, _told=True)


def test_a_best_that_could_not_be_saved_is_not_the_best(monkeypatch):
    monkeypatch.setattr("rl_ckpt.rllib.callback.raise_untold", lambda _: None)
    callback = checkpointing("memory://x", best=("r", "max"), when_busy="skip")()
    callback.checkpointer = saves = Saves()
    for iteration, value in enumerate([5.0, 4.0, 3.0], start=1):
        callback.on_train_result(algorithm=SimpleNamespace(iteration=iteration), result={"r": value})
    assert saves.saved == [2]
    assert callback.get_state()["best"] == {"max r": 4.0}
    again = checkpointing("memory://x", best=("r", "max"))()
    again.set_state(callback.get_state())
    assert again.policy.due(4, {"r": 3.5}) is None
    again.set_state({"best": 9.0})
    assert again.policy.due(4, {"r": 8.0}) is None, "as releases before this one wrote it"
    again.set_state({"best": None})
    assert again.policy.due(4, {"r": 9.5}) is not None


def test_a_signal_is_heard_after_a_drain(monkeypatch):
    callback = checkpointing("memory://x", every_iterations=1000)()
    drain = Preemption("node b is drained", 1e12, False, ("b",), (1,))
    signal = Preemption("SIGTERM, node b is drained", 1e12, True, ("b",), (1,))
    notices = [drain, drain, signal, signal]
    callback._watch = SimpleNamespace(notice=lambda workers=None: notices[0])
    told = []
    while notices:
        due = callback.policy.due(1)
        told.append(due and due.preemption)
        if due:
            callback.policy.began(due)
        del notices[0]
    assert told == [drain, None, signal, None]


def test_a_relative_url_means_this_folder_wherever_it_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpointing("runs/{trial}").url == f"file://{tmp_path}/runs/{{trial}}"
    assert checkpointing(Path("runs")).url == f"file://{tmp_path}/runs"
    assert tune_trainable(PPO, Path("runs")).rl_ckpt_url == f"file://{tmp_path}/runs"
    for wrong in (None, 3, PPO):
        with pytest.raises(InvalidInputError, match="the url of a run must be text"):
            checkpointing(wrong)
    for misspelt in (checkpointing, lambda url: tune_trainable(PPO, url)):
        with pytest.raises(InvalidInputError, match=r"\{trial_id\} stands for nothing in a url"):
            misspelt("runs/{trial_id}")


def test_settings_are_data(tmp_path):
    made = checkpointing(
        "s3://b/run", every_iterations=3, best=("a/b", "min"), auto=Auto(5), keep=[LatestN(2)], memory_tier=False
    )
    made_with = checkpointing("s3://b/run", storage_options={"key": "id", "secret": "hush"})
    assert pickle.loads(pickle.dumps(made_with)).storage.options == {"key": "id", "secret": "hush"}
    assert isinstance(pickle.loads(pickle.dumps(made))(), CheckpointCallback)
    tree = config_tree(ppo_config().callbacks(made))
    (back,) = [config_from(tree).callbacks_class]
    assert back.keep == (LatestN(2), BestN("a/b", "min"))
    assert (back.url, back.every_iterations, back.options) == ("s3://b/run", 3, {"memory_tier": False})
    assert back.auto == Auto(min_s=5)
    assert back.storage.options == {}
    with_secret = config_tree(ppo_config().callbacks(made_with))
    assert "hush" not in str(with_secret)
    assert config_from(with_secret).callbacks_class.storage.options == {}


@pytest.mark.parametrize(
    "bad",
    [
        {"every_iterations": 0},
        {"every_iterations": 1.5},
        {"every_seconds": -1},
        {"best": "a/b"},
        {"best": ("a", "most")},
        {"auto": True},
        {"grace_s": 0},
        {"keep": LatestN},
        {"get_state": "x"},
    ],
)
def test_bad_settings(bad):
    with pytest.raises(InvalidInputError):
        checkpointing("/tmp/x", **bad)


def test_urls_of_trials():
    trial = SimpleNamespace(_storage=SimpleNamespace(trial_dir_name="PPO_t_1"))
    alone = SimpleNamespace(_storage=None)
    assert run_url("/r", alone) == "/r"
    assert run_url("/r/", trial) == "/r/PPO_t_1"
    assert run_url("/r/{trial}/x", trial) == "/r/PPO_t_1/x"
    with pytest.raises(InvalidInputError, match="names a trial"):
        run_url("/r/{trial}", alone)
    # What `load` builds of a trial's checkpoint, without Tune, goes on in the trial's run.
    assert run_url("/r/{trial}", alone, "/r/PPO_t_1") == run_url("/r/", alone, "/r/PPO_t_1") == "/r/PPO_t_1"
    assert run_url("/r", alone, "/copy/of/it") == "/r"
    assert run_url("/r", trial, "/r/PPO_t_2") == "/r/PPO_t_1"


def test_numbers_of_results():
    result = {"a": {"b": {"c": 1.5, "d/e": 2}}, "a/b": {"f": 3}, "n": float("nan"), "s": "x", "t": True}
    assert [at(result, path) for path in ("a/b/c", "a/b/d/e", "a/b/f")] == [1.5, 2, 3]
    assert [at(result, path) for path in ("n", "s", "t", "a", "a/b", "x", "a/b/c/d")] == [None] * 7
    assert recorded({"training_iteration": 4, **result}, ("a/b/c", "max")) == {"training_iteration": 4, "a/b/c": 1.5}


def test_keeping_the_best():
    commits = [SimpleNamespace(id=str(i), metrics={"m": v}) for i, v in enumerate([3, 9.0, 9.0, 5, "x"])]
    commits.append(SimpleNamespace(id="5", metrics={}))
    commits.append(SimpleNamespace(id="6", metrics={"m": {"$": "float", "v": "000000000000f87f"}}))
    assert BestN("m").keep(commits) == {"2"}
    assert BestN("m", "min", 2).keep(commits) == {"0", "3"}
    for bad in ({"mode": "x"}, {"n": 0}):
        with pytest.raises(InvalidInputError):
            BestN("m", **bad)
