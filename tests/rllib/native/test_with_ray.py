"""Imported checkpoints as Algorithms that go on, and exported ones as Ray loads them."""

from __future__ import annotations

import pickle
import shutil
import threading
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core.rl_module.rl_module import RLModule

from rl_ckpt import Checkpointer
from rl_ckpt.errors import InvalidInputError
from rl_ckpt.rllib import load, save
from rl_ckpt.rllib.native import export_native, import_native
from rl_ckpt.rllib.policy import save_policy
from tests.rllib.native.golden import FOLDER, filtered
from tests.rllib.small import (
    Pairs,
    agent_is_policy,
    built,
    dqn_config,
    impala_config,
    lstm_config,
    multi_config,
    own_config,
    ppo_config,
    sac_config,
)

pytestmark = pytest.mark.usefixtures("ray_small")


def learner_state(algo):
    """Of learner 0, local or remote: weights by policy, optimizers as RLlib gives them, number of updates."""

    def look(learner):
        weights = {
            policy: {
                key: value.detach().clone() for key, value in learner.module[policy].unwrapped().state_dict().items()
            }
            for policy in learner.module.keys()  # noqa: SIM118 - no mapping
        }
        optimizers = {name: optimizer.state_dict() for name, optimizer in learner._named_optimizers.items()}
        return weights, optimizers, learner._weights_seq_no

    found = next(iter(algo.learner_group.foreach_learner(look)))
    return found.get() if hasattr(found, "get") else found


def equal(one, other) -> bool:
    """Bit for bit, types of numbers aside."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def lifetime(algo):
    return algo.metrics.peek(("env_runners", "num_env_steps_sampled_lifetime"))


CONFIGS = {
    "ppo": ppo_config,
    "lstm": lstm_config,
    "dqn": dqn_config,
    "sac": sac_config,
    "multi": multi_config,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.soak] if n in ("dqn", "sac", "impala") else []) for n in [*CONFIGS, "impala"]],
)
def test_there_and_back(name, tmp_path):
    """RLlib's own → import → load → export → RLlib's own: the same weights, moments and counters at each place."""
    with built((impala_config if name == "impala" else CONFIGS[name])()) as algo:
        algo.train()
        algo.save_to_path(str(tmp_path / "native"))
        saved = [*learner_state(algo)[:2], algo.iteration, lifetime(algo)]
    import_native(str(tmp_path / "native"), str(tmp_path / "run"), allow_pickle=True, allow_imports=["tests"])
    exported = export_native(str(tmp_path / "run"), tmp_path / "exported")
    algo = load(str(tmp_path / "run"))
    try:
        assert equal([*learner_state(algo)[:2], algo.iteration, lifetime(algo)], saved)
        algo.train()
        assert algo.iteration == saved[2] + 1
        assert not equal(learner_state(algo)[0], saved[0])
    finally:
        algo.stop()
    algo = Algorithm.from_checkpoint(exported)
    try:
        assert equal([*learner_state(algo)[:2], algo.iteration, lifetime(algo)], saved)
    finally:
        algo.stop()
    for policy, weights in saved[0].items():
        module = RLModule.from_checkpoint(f"{exported}/learner_group/learner/rl_module/{policy}")
        assert equal(dict(module.state_dict()), {key: weights[key] for key in module.state_dict()})


def test_of_a_learner_with_a_thread(tmp_path):
    """IMPALA, whose learner is remote and trains in a thread; the import's own ends with it."""
    with built(impala_config().env_runners(num_env_runners=1)) as algo:
        algo.train()
        algo.save_to_path(str(tmp_path / "native"))
        before = set(threading.enumerate())
        import_native(str(tmp_path / "native"), str(tmp_path / "run"), allow_pickle=True)
        assert not [thread for thread in set(threading.enumerate()) - before if "earner" in type(thread).__name__]
    tree = Checkpointer(str(tmp_path / "run")).load_state()
    folder = tmp_path / "native" / "learner_group" / "learner"
    weights = pickle.loads((folder / "rl_module" / "default_policy" / "module_state.pkl").read_bytes())
    native = pickle.loads((folder / "state.pkl").read_bytes())
    saved = tree["policies"]["default_policy"]
    assert all(np.array_equal(saved["module"][key].numpy(), weights[key]) for key in weights)
    (optimizer,) = saved["optimizers"].values()
    (theirs,) = native["optimizer"].values()
    moments = [state["exp_avg"] for state in theirs["state"]["state"].values()]
    assert len(moments) > 4
    assert all(map(np.array_equal, [state["exp_avg"].numpy() for state in optimizer["state"].values()], moments))
    assert tree["learner"]["weights_seq_no"] == native["weights_seq_no"] > 0


def test_a_golden_import_goes_on(tmp_path):
    import_native(str(FOLDER / "native-2.0"), str(tmp_path / "run"), allow_pickle=True)
    with pytest.raises(InvalidInputError, match="env_to_module_connector"):
        load(str(tmp_path / "run"))
    algo = load(str(tmp_path / "run"), given={"env_to_module_connector": filtered, "num_env_runners": 1})
    try:
        saved = Checkpointer(str(tmp_path / "run")).load_state()
        assert algo.iteration == 1
        assert equal(learner_state(algo)[0]["default_policy"], saved["policies"]["default_policy"]["module"])
        (runner,) = saved["env_runners"].values()
        pushes = runner["connectors"]["env_to_module"]["MeanStdFilter"]["items"][0][1]["running_stats"][0]["num_pushes"]
        counts = algo.env_runner_group.foreach_env_runner(
            lambda runner: runner._env_to_module.get_state()["MeanStdFilter"][None]["running_stats"][0]["num_pushes"]
        )
        assert pushes > 0
        assert set(counts) == {pushes}
        before = learner_state(algo)
        algo.train()
        assert not equal(learner_state(algo)[0], before[0])
    finally:
        algo.stop()


def test_our_golden_algorithm_loads():
    algo = load(str(FOLDER / "ours-1"))
    try:
        assert algo.iteration == 1
        saved = Checkpointer(str(FOLDER / "ours-1")).load_state(select="policies")
        assert equal(learner_state(algo)[0]["default_policy"], saved["policies"]["default_policy"]["module"])
    finally:
        algo.stop()


def test_a_newer_format_is_refused(tmp_path):
    tree = Checkpointer(str(FOLDER / "ours-1")).load_state()
    tree["about"]["format"] = 2
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save_state(1, tree).result()
    with pytest.raises(
        InvalidInputError, match=r"in format 2 of rl_ckpt\.rllib; this release .* reads formats up to 1"
    ):
        load(str(tmp_path / "run"))
    with pytest.raises(InvalidInputError, match="in format 2"):
        export_native(str(tmp_path / "run"), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_an_import_of_the_old_stack_is_no_algorithm(tmp_path):
    import_native(str(FOLDER / "native-1.1"), str(tmp_path / "run"), allow_pickle=True)
    with pytest.raises(InvalidInputError, match="load_old_policy"):
        load(str(tmp_path / "run"))
    with pytest.raises(InvalidInputError, match=r"old_stack.*no counterpart"):
        export_native(str(tmp_path / "run"), tmp_path / "exported")


def test_some_policies(tmp_path):
    with built(multi_config(3)) as algo:
        algo.train()
        save(algo, str(tmp_path / "run"))
        saved = learner_state(algo)
    with pytest.raises(InvalidInputError, match=r"p9.*p0"):
        export_native(str(tmp_path / "run"), tmp_path / "exported", policies=["p9"])
    mapping = agent_is_policy
    given = {"env_config": {"agents": 2}}
    where = export_native(
        str(tmp_path / "run"), tmp_path / "exported", policies=["p0", "p1"], policy_mapping_fn=mapping, given=given
    )
    algo = Algorithm.from_checkpoint(where)
    try:
        weights, optimizers, _ = learner_state(algo)
        assert equal(weights, {policy: saved[0][policy] for policy in ("p0", "p1")})
        assert equal(optimizers, {name: state for name, state in saved[1].items() if not name.startswith("p2")})
    finally:
        algo.stop()
    assert Pairs.__module__.endswith("small")


def test_bf16_is_exported_exactly(tmp_path):
    """Of a module with a `get_state` of its own; RLlib's own save of its optimizer raises."""
    with built(own_config("bfloat16")) as algo:
        algo.train()
        saved = learner_state(algo)
        save(algo, str(tmp_path / "run"))
    algo = Algorithm.from_checkpoint(export_native(str(tmp_path / "run"), tmp_path / "exported"))
    try:
        assert equal(learner_state(algo)[:2], saved[:2])
    finally:
        algo.stop()


def test_moments_that_ray_would_change_are_not_exported(tmp_path):
    with built(own_config("float64")) as algo:
        algo.train()
        save(algo, str(tmp_path / "run"))
    with pytest.raises(
        InvalidInputError, match=r"'default_policy_default_optimizer'.*exp_avg of body\.weight \(float64\)"
    ):
        export_native(str(tmp_path / "run"), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


class TestWithoutAlgorithm:
    @pytest.fixture
    def run(self, tmp_path):
        import_native(str(FOLDER / "native-2.1"), str(tmp_path / "run"), allow_pickle=True, allow_imports=["tests"])
        return str(tmp_path / "run")

    def test_an_existing_directory_is_not_touched(self, run, tmp_path):
        full = tmp_path / "full"
        full.mkdir()
        (full / "mine").write_text("x")
        with pytest.raises(InvalidInputError, match="is not empty, and is not overwritten"):
            export_native(run, full)
        with pytest.raises(InvalidInputError, match="is there and no directory"):
            export_native(run, full / "mine")
        assert [path.name for path in full.iterdir()] == ["mine"]
        (tmp_path / "empty").mkdir()
        assert export_native(run, tmp_path / "empty") == str(tmp_path / "empty")
        assert (tmp_path / "empty" / "rllib_checkpoint.json").exists()

    def test_what_fails_half_way_leaves_nothing(self, run, tmp_path, monkeypatch):
        import rl_ckpt.rllib.native.exporting as exporting

        write = exporting.write_component
        written: list[Any] = []

        def full(folder, *args, **kwargs):
            if len(written) == 3:
                raise OSError(28, "No space left on device")
            written.append(folder)
            write(folder, *args, **kwargs)

        monkeypatch.setattr(exporting, "write_component", full)
        with pytest.raises(Exception, match="No space left on device") as caught:
            export_native(run, tmp_path / "exported")
        assert type(caught.value).__name__ == "StorageError"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

    def test_what_another_puts_there_meanwhile_stays(self, run, tmp_path, monkeypatch):
        import rl_ckpt.rllib.native.exporting as exporting

        def other(folder):
            (tmp_path / "exported").mkdir()
            (tmp_path / "exported" / "theirs").write_text("x")

        monkeypatch.setattr(exporting, "_sync", other)
        with pytest.raises(Exception, match="can't be written"):
            export_native(run, tmp_path / "exported")
        assert [path.name for path in (tmp_path / "exported").iterdir()] == ["theirs"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "run"]

    def test_unknown_step(self, run, tmp_path):
        with pytest.raises(FileNotFoundError):
            export_native(run, tmp_path / "exported", step=99)
        assert not (tmp_path / "exported").exists()

    def test_a_policy(self, run, tmp_path):
        module = RLModule.from_checkpoint(str(FOLDER / "native-2.1/learner_group/learner/rl_module/default_policy"))
        save_policy(str(tmp_path / "policy"), module, "mine")
        found = RLModule.from_checkpoint(export_native(str(tmp_path / "policy"), tmp_path / "exported"))
        assert equal(dict(found.state_dict()), dict(module.state_dict()))
        obs = {"obs": torch.from_numpy(np.eye(4, dtype=np.float32))}
        assert equal(
            found.forward_inference(obs)["action_dist_inputs"], module.forward_inference(obs)["action_dist_inputs"]
        )

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_weights_that_ray_would_change_are_not_exported(self, dtype, tmp_path):
        module = RLModule.from_checkpoint(str(FOLDER / "native-2.1/learner_group/learner/rl_module/default_policy"))
        save_policy(str(tmp_path / "policy"), module.to(dtype))
        with pytest.raises(InvalidInputError, match=r"would change encoder\..*\((float64|bfloat16)\)"):
            export_native(str(tmp_path / "policy"), tmp_path / "exported")
        assert not (tmp_path / "exported").exists()

    def test_filters(self, run, tmp_path):
        algo = Algorithm.from_checkpoint(export_native(run, tmp_path / "exported"))
        ours = algo.env_runner._env_to_module.get_state()["MeanStdFilter"][None]
        algo.stop()
        algo = Algorithm.from_checkpoint(str(FOLDER / "native-2.1"))
        theirs = algo.env_runner._env_to_module.get_state()["MeanStdFilter"][None]
        algo.stop()
        assert equal(ours["running_stats"], theirs["running_stats"])
        assert ours["running_stats"][0]["num_pushes"] > 0

    def test_the_directory_stands_alone(self, run, tmp_path):
        where = export_native(run, tmp_path / "exported")
        shutil.rmtree(run)
        assert not any(b"rl_ckpt" in path.read_bytes() for path in (tmp_path / "exported").rglob("*") if path.is_file())
        again = import_native(where, str(tmp_path / "again"), allow_pickle=True)
        assert again.version == "2.1"
