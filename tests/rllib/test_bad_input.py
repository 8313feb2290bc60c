"""What does not fit is one clear error, before anything in the running Algorithm is changed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.tune.registry import register_env

import rl_ckpt
from rl_ckpt.rllib import AlgorithmCheckpointer, load, restore, save
from tests.rllib.small import (
    assert_all_hold,
    built,
    copies_of,
    digest_of,
    digests_of,
    dqn_config,
    multi_config,
    own_config,
    ppo_config,
)


class Wider(gym.Env[Any, Any]):
    """Observations of 6 numbers, where CartPole's are 4."""

    observation_space = gym.spaces.Box(-1, 1, (6,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, config: Any = None) -> None:
        pass

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return np.zeros(6, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(6, np.float32), 1.0, True, False, {}


def everything_in(algo: Algorithm) -> Any:
    """What a restore could change, comparable."""
    copies = {
        who: {id_: digest_of(part, part) for id_, part in parts.items()} for who, parts in copies_of(algo).items()
    }
    learner = algo.learner_group._learner
    optimizers = [
        [{k: torch.as_tensor(v).tolist() for k, v in state.items()} for state in optimizer.state.values()]
        for optimizer in learner._named_optimizers.values()
    ]
    numbers = (algo.iteration, dict(algo._counters), learner._weights_seq_no, np.random.get_state()[1].tolist())
    return copies, optimizers, numbers, torch.get_rng_state().tolist()


@pytest.fixture(scope="module")
def runs(ray_small: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A saved Algorithm of several kinds."""
    out = {}
    for name, config in {"ppo": ppo_config(), "multi": multi_config(2), "f64": own_config("float64")}.items():
        with built(config) as algo:
            algo.train()
            out[name] = str(tmp_path_factory.mktemp(name))
            save(algo, out[name])
    return out


def wider() -> Any:
    return ppo_config(Wider)


def deeper() -> Any:
    return ppo_config().rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[8, 8], head_fcnet_hiddens=[]))


def other_width() -> Any:
    return ppo_config().rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[16], head_fcnet_hiddens=[]))


@pytest.mark.parametrize(
    ("run", "config", "options", "said"),
    [
        ("ppo", deeper, {}, r"not in the checkpoint: 'encoder.encoder.net.mlp.2.weight'"),
        ("ppo", other_width, {}, r"shape \(8, 4\) was saved, \(16, 4\) is here"),
        (
            "ppo",
            wider,
            {},
            r"observation space is Box\(.*\(6,\).*, and was Box\(.*\(4,\).*shape \(8, 4\) was saved, \(8, 6\) is here",
        ),
        ("f64", lambda: own_config("float32"), {}, r"dtype float64 was saved, float32 is here"),
        ("ppo", own_config, {}, r"not in the checkpoint: .*body.*heads"),
        ("ppo", dqn_config, {}, r"replay buffer"),
        ("multi", lambda: multi_config(3), {}, r"policies \['p2'\] of this Algorithm are not in the checkpoint"),
        ("multi", lambda: multi_config(2), {"policies": ["p7"]}, r"no policies \['p7'\].*it has \['p0', 'p1'\]"),
        ("multi", lambda: multi_config(2), {"policies": {"p0": "q"}}, r"this Algorithm has no policies \['q'\]"),
        ("multi", lambda: multi_config(2), {"policies": {"p0": "p1", "p1": "p1"}}, r"\['p1'\].*from several ones"),
        ("multi", lambda: multi_config(2), {"policies": []}, r"policies=\[\] must be a list of ids"),
    ],
    ids=[
        "layers",
        "width",
        "observations",
        "dtype",
        "module",
        "algorithm",
        "a policy more",
        "unknown",
        "homeless",
        "twice",
        "none",
    ],
)
def test_what_does_not_fit_changes_nothing(
    run: str, config: Callable[[], Any], options: dict[str, Any], said: str, runs: dict[str, str]
) -> None:
    with built(config()) as algo:
        algo.train()
        before = everything_in(algo)
        with pytest.raises(rl_ckpt.InvalidInputError, match=f"(?s){said}"):
            restore(algo, runs[run], **options)
        assert repr(everything_in(algo)) == repr(before)
        algo.train()


@pytest.mark.parametrize(
    "component", ["policies/default_policy/module", "policies/default_policy/optimizers", "learner", "algorithm"]
)
def test_a_missing_component_is_named(component: str, runs: dict[str, str], tmp_path: Path) -> None:
    tree = rl_ckpt.Checkpointer(runs["ppo"]).load_state(select=[f"!{component}"])
    with rl_ckpt.Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save_state(1, tree).result()
    with built(ppo_config()) as algo:
        before = everything_in(algo)
        with pytest.raises(rl_ckpt.InvalidInputError, match=f"has no component '{component}'"):
            restore(algo, str(tmp_path))
        assert repr(everything_in(algo)) == repr(before)


def test_not_an_algorithms_checkpoint(ray_small: None, tmp_path: Path) -> None:
    with rl_ckpt.Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save_state(1, {"w": np.zeros(3)}).result()
    with (
        built(ppo_config()) as algo,
        pytest.raises(rl_ckpt.InvalidInputError, match="holds no checkpoint of an Algorithm"),
    ):
        restore(algo, str(tmp_path))
    with pytest.raises(rl_ckpt.InvalidInputError, match="holds no checkpoint of an Algorithm"):
        load(str(tmp_path))


def test_no_checkpoint_at_all(ray_small: None, tmp_path: Path) -> None:
    with pytest.raises(rl_ckpt.CheckpointNotFoundError):
        load(str(tmp_path / "nothing"))


def test_an_environment_that_nobody_registered_is_named(ray_small: None, tmp_path: Path) -> None:
    register_env("corridor", lambda config: gym.make("CartPole-v1"))
    with built(ppo_config("corridor")) as algo:
        save(algo, str(tmp_path))
    from ray.tune.registry import ENV_CREATOR, _global_registry

    _global_registry.unregister(ENV_CREATOR, "corridor")
    with pytest.raises(
        rl_ckpt.InvalidInputError, match=r"(?s)environment 'corridor' is not registered.*given=\{'env': "
    ):
        load(str(tmp_path))
    algo = load(str(tmp_path), given={"env": "CartPole-v1"})
    algo.train()
    algo.stop()


class Payload:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_weights_come_from_the_checkpoint_and_not_from_the_folder_that_the_first_ones_came_from(
    ray_small: None, tmp_path: Path
) -> None:
    """`RLModuleSpec(load_state_path=…)`: RLlib would unpickle what lies there now."""
    native = tmp_path / "native"
    with built(ppo_config()) as algo:
        algo.get_module().save_to_path(str(native))
    spec = RLModuleSpec(load_state_path=str(native), model_config=ppo_config().model_config)
    with built(ppo_config().rl_module(rl_module_spec=spec)) as algo:
        save(algo, str(tmp_path / "run"))
        digests = digests_of(algo)["learner 0"]
    (native / "module_state.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    algo = load(str(tmp_path / "run"))
    assert not (tmp_path / "ran").exists()
    assert_all_hold(algo, digests)
    algo.stop()


def test_one_id_in_place_of_a_list_of_ids(runs: dict[str, str]) -> None:
    with pytest.raises(rl_ckpt.InvalidInputError, match="policies='default_policy' must be a list of ids"):
        load(runs["ppo"], policies="default_policy")


def test_what_is_no_algorithm_is_refused(ray_small: None, tmp_path: Path) -> None:
    with AlgorithmCheckpointer(str(tmp_path)) as ckpt:
        with pytest.raises(rl_ckpt.InvalidInputError, match="dict is not an RLlib Algorithm"):
            ckpt.save({})  # type: ignore[arg-type]
        with built(ppo_config()) as algo:
            algo.stop()
            with pytest.raises(rl_ckpt.InvalidInputError, match="it was stopped"):
                ckpt.save(algo)
    with pytest.raises(rl_ckpt.InvalidInputError, match="get_state"):
        AlgorithmCheckpointer(str(tmp_path), get_state="dump")
    assert not (tmp_path / "run.json").exists()


def test_a_step_that_was_saved_already(runs: dict[str, str]) -> None:
    with built(ppo_config()) as algo, pytest.raises(rl_ckpt.InvalidInputError, match="step 1"):
        save(algo, runs["ppo"], step=1)
    assert ray.is_initialized()
