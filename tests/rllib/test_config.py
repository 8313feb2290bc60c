"""Configs: every setting comes back, in value and type; what can't be stored is asked for, all of it at once."""

from __future__ import annotations

import collections
import enum
import functools
import math
import pickle
import struct
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, TorchCompileWhatToCompile
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.algorithms.ppo.ppo_catalog import PPOCatalog
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.policy.policy import PolicySpec
from ray.tune.registry import ENV_CREATOR, _global_registry, register_env

from rl_ckpt import Checkpointer, CorruptionError, InvalidInputError
from rl_ckpt.rllib.config import config_from, config_tree, is_known_env
from rl_ckpt.rllib.values import Decoder, Encoder
from tests.unit.trees import assert_same


def stored(tree: Any) -> Any:
    """A tree after a save and a load, in memory."""
    with Checkpointer(f"memory://{uuid.uuid4().hex}", weak_commits=True) as checkpointer:
        checkpointer.save_state(0, {"tree": tree}).result(60)
        return checkpointer.load_state()["tree"]


def again(config: AlgorithmConfig, **given: Any) -> Any:
    return config_from(stored(config_tree(config)), given=given)


class Maze(gym.Env[Any, Any]):
    pass


class MyLearner(PPOTorchLearner):
    pass


class MyCallbacks(RLlibCallback):
    def __init__(self, rate: int = 1) -> None:
        self.rate = rate


class MyConfig(PPOConfig):
    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class or MyPPO)
        self.noise = 0.5


class MyPPO(PPO):
    pass


class Color(enum.Enum):
    RED = "r"


class Pair(NamedTuple):
    left: int
    right: Any


@dataclass(frozen=True)
class Frozen:
    n: int
    more: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Slotted:
    n: int


def mapping(agent_id: str, episode: object, **_: object) -> str:
    return "p1" if agent_id == "a" else "p0"


def make_filter(env: object, spaces: object, device: object) -> MeanStdFilter:
    return MeanStdFilter(multi_agent=False)


def on_result(prefix: str = "", **_: object) -> None:
    pass


def make_maze(env_config: object) -> Maze:
    return Maze()


def local_config() -> type[PPOConfig]:
    class Local(PPOConfig):
        pass

    return Local


def rich_ppo() -> Any:
    box = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    specs = {
        "p0": RLModuleSpec(
            module_class=DefaultPPOTorchRLModule,
            observation_space=box,
            action_space=gym.spaces.Discrete(2, start=1),
            model_config=DefaultModelConfig(
                fcnet_hiddens=[8], fcnet_kernel_initializer=torch.nn.init.orthogonal_, use_lstm=True
            ),
            catalog_class=PPOCatalog,
            inference_only=True,
        ),
        "p1": RLModuleSpec(model_config={"hidden": (8, 8), "init": functools.partial(torch.nn.init.normal_, std=0.1)}),
    }
    config: Any = PPOConfig()
    return (
        config.environment(
            Maze, env_config={"size": 3, "walls": {1: (2, 3)}, "rate": np.float32(0.1)}, clip_rewards=1.0
        )
        .env_runners(
            num_env_runners=2,
            env_to_module_connector=make_filter,
            gym_env_vectorize_mode=gym.VectorizeMode.SYNC,
            explore=False,
        )
        .learners(num_learners=2, num_gpus_per_learner=0)
        .training(lr=[[0, 1e-3], [1000, 1e-4]], learner_class=MyLearner, learner_config_dict={"k": 1}, lambda_=0.9)
        .callbacks(
            functools.partial(MyCallbacks, rate=3), on_train_result=[on_result, functools.partial(on_result, "x")]
        )
        .multi_agent(
            policies={"p0": PolicySpec(observation_space=box), "p1": PolicySpec(config=PPOConfig.overrides(lr=1e-5))},
            policy_mapping_fn=mapping,
            policies_to_train={"p1", "p0"},
        )
        .rl_module(rl_module_spec=MultiRLModuleSpec(rl_module_specs=specs))
        .evaluation(evaluation_num_env_runners=1, evaluation_config=PPOConfig.overrides(explore=False, env=Maze))
        .reporting(metrics_num_episodes_for_smoothing=5)
        .debugging(seed=7)
        .framework(torch_compile_learner_what_to_compile=TorchCompileWhatToCompile.COMPLETE_UPDATE)
    )


@pytest.mark.parametrize(
    "config",
    [
        rich_ppo(),
        DQNConfig().training(
            replay_buffer_config={"type": "PrioritizedEpisodeReplayBuffer", "capacity": 100, "alpha": 0.5},
            epsilon=[(0, 1.0), (500, 0.05)],
            double_q=False,
        ),
        SACConfig().training(twin_q=False, target_entropy="auto", actor_lr=1e-4, initial_alpha=0.3),
        IMPALAConfig().training(vtrace_clip_rho_threshold=2.0).learners(num_aggregator_actors_per_learner=2),
        APPOConfig().env_runners(num_env_runners=3).training(circular_buffer_num_batches=8),
        MyConfig().training(lr=0.1),
        PPOConfig(algo_class=MyPPO),
        AlgorithmConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_every_setting_comes_back(config: AlgorithmConfig) -> None:
    found = again(config)
    assert type(found) is type(config)
    assert found.algo_class is config.algo_class
    assert_equal(found, config)


def assert_equal(found: AlgorithmConfig, config: AlgorithmConfig) -> None:
    """In all settings: by RLlib's own view of them, and bit by bit as we encode them."""
    one, other = found.to_dict(), config.to_dict()
    partials = {key for key, value in other.items() if "functools.partial" in str(value)}  # they equal only themselves
    assert {k: v for k, v in one.items() if k not in partials} == {k: v for k, v in other.items() if k not in partials}
    for key in partials | {"callbacks_class"}:
        assert "missing" not in str(Encoder().encode(one.get(key)))
        assert_same(Encoder().encode(one.get(key)), Encoder().encode(other.get(key)))
    assert list(vars(found).keys() ^ vars(config).keys()) == []


def test_only_differences_are_stored() -> None:
    assert config_tree(PPOConfig())["settings"] == {}
    tree = config_tree(PPOConfig().training(lr=0.1))
    assert tree["settings"] == {"lr": 0.1}
    assert config_tree(PPOConfig().training(gamma=1))["settings"] == {"gamma": 1}


def test_what_comes_back_may_be_changed_though_a_frozen_config_was_saved() -> None:
    config = PPOConfig().training(lr=0.1)
    config.freeze()
    found = again(config)
    found.training(lr=0.2)
    assert config.lr == 0.1


def test_a_setting_that_was_taken_away_is_not_there_either() -> None:
    config = PPOConfig()
    del config.fake_sampler
    assert not hasattr(again(config), "fake_sampler")


def test_one_dict_of_specs_stays_one() -> None:
    spec = again(rich_ppo())._rl_module_spec
    assert spec.module_specs is spec.rl_module_specs


def test_a_config_inside_a_config_comes_back() -> None:
    config: Any = PPOConfig().training(lr=0.1)
    config.evaluation_config = SACConfig().training(twin_q=False)
    found = again(config).evaluation_config
    assert type(found) is SACConfig
    assert found.to_dict() == config.evaluation_config.to_dict()


numbers = st.one_of(st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(max_size=4), st.binary())
values = st.recursive(
    st.one_of(
        st.none(),
        numbers,
        st.sampled_from(
            [np.float32(0.1), np.int8(3), np.zeros((2, 3), "float16"), np.array(1.5), np.dtype("int32"), range(1, 9, 2)]
        ),
        st.sampled_from([torch.bfloat16, torch.device("cpu"), Path("a/b"), Color.RED, Maze, mapping, int, Maze.reset]),
        st.sampled_from([gym.spaces.Discrete(3), Frozen(1, [2]), Slotted(3), gym.VectorizeMode.ASYNC]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(lambda items: collections.deque(items, 5)),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.dictionaries(st.sampled_from(["$", "a/b", "", "v", "0"]), inner, max_size=3),
        st.dictionaries(st.one_of(st.none(), st.booleans(), st.integers(), st.tuples(st.text())), inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict),
        st.builds(Pair, st.integers(), inner),
        st.builds(lambda value: functools.partial(on_result, value, key=value), inner),
        st.sets(st.one_of(st.integers(), st.text(), st.none()), max_size=3),
        st.frozensets(st.one_of(st.integers(), st.tuples(st.text())), max_size=3),
        st.builds(Frozen, st.integers(), st.lists(st.integers(), max_size=2)),
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(values)
def test_any_value_comes_back(value: Any) -> None:
    config = PPOConfig().environment(env_config={"value": value})
    found = again(config).env_config["value"]
    assert_value(found, value)


def test_a_nan_keeps_its_bits_where_others_become_text() -> None:
    (odd,) = struct.unpack("<d", bytes.fromhex("010000000000f87f"))
    value = [odd, *range(20), math.inf, -0.0]
    assert_same(again(PPOConfig().environment(env_config={"value": value})).env_config["value"], value)


def assert_value(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, functools.partial):
        assert found.func is expected.func
        found, expected = [(p.args, p.keywords) for p in (found, expected)]
    if dataclasses_like(expected):
        assert found == expected
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert list(map(type, found)) == list(map(type, expected))
        for key, value in expected.items():
            assert_value(found[key], value)
    elif isinstance(expected, list | tuple | collections.deque):
        assert len(found) == len(expected)
        assert getattr(found, "maxlen", None) == getattr(expected, "maxlen", None)
        for one, other in zip(found, expected, strict=True):
            assert_value(one, other)
    elif isinstance(expected, bool | int | float | complex | str | bytes | np.ndarray | np.generic):
        assert_same(found, expected)
    else:
        assert found == expected


def dataclasses_like(value: Any) -> bool:
    return isinstance(value, Frozen | Slotted)


def test_a_set_is_stored_in_one_order() -> None:
    one, other = Encoder().encode({"a", "b", "c", 1}), Encoder().encode({1, "c", "b", "a"})
    assert_same(one, other)
    assert one["v"] == ["a", "b", "c", 1]


# -- what can't be stored


def test_all_that_is_missing_is_one_error_and_may_be_given() -> None:
    n = 3
    config: Any = PPOConfig()
    config = (
        config.environment(
            "CartPole-v1", env_config={"reward": lambda x: x + n, "size": 3, "deep/er": [Color, object()]}
        )
        .env_runners(env_to_module_connector=lambda env, spaces, device: None)
        .multi_agent(policies={"p0", "p1"}, policy_mapping_fn=lambda agent, episode, **_: "p0")
        .callbacks(on_train_result=[on_result, lambda **_: None])
        .training(lr=0.1)
    )
    tree = stored(config_tree(config))
    with pytest.raises(InvalidInputError) as error:
        config_from(tree, given={"policy_mapping_fn": mapping, "gama": 0.5})
    for said in (
        "env_config/reward: a lambda (test_config.py, line",
        "env_config/deep~1er/1: an object of class builtins:object",
        "env_to_module_connector: a lambda (test_config.py, line",
        "callbacks_on_train_result/1: a lambda (test_config.py, line",
        "gama: is given, but the config has no such setting",
        "given={'env_to_module_connector': ..., 'callbacks_on_train_result/1': ..., 'env_config/reward': ..., ",
    ):
        assert said in str(error.value)
    assert "policy_mapping_fn" not in str(error.value)
    found: Any = config_from(
        tree,
        given={
            "policy_mapping_fn": mapping,
            "env_config/reward": abs,
            "env_config/deep~1er": 5,
            "env_to_module_connector": make_filter,
            "callbacks_on_train_result/1": on_result,
            "gamma": 0.5,
            "lr": 0.2,
            "num_env_runners": 7,
        },
    )
    assert found.policy_mapping_fn is mapping
    assert found.env_config == {"reward": abs, "size": 3, "deep/er": 5}
    assert found._env_to_module_connector is make_filter
    assert found.callbacks_on_train_result == [on_result, on_result]
    assert (found.gamma, found.lr, found.num_env_runners) == (0.5, 0.2, 7)


def test_given_settings_replace_saved_ones_whole() -> None:
    config = PPOConfig().environment(env_config={"reward": lambda x: x}).training(lr=0.1)
    assert again(config, env_config={"size": 1}).env_config == {"size": 1}


def test_a_value_that_contains_itself_is_missing() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    tree = config_tree(PPOConfig().environment(env_config={"loop": loop}))
    with pytest.raises(InvalidInputError, match="env_config/loop/1: a value that contains itself"):
        config_from(tree)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.array([object()]), "object"),
        (np.ma.masked_array([1]), "MaskedArray"),
        (torch.nn.Linear(1, 1), "an object of class torch.nn.modules.linear:Linear"),
        (functools.partial(lambda: 1), "a lambda"),
        (collections.defaultdict(list), "collections:defaultdict"),
        (local_config()(), "the class Local, made inside"),
    ],
    ids=["object array", "masked array", "module", "partial of a lambda", "defaultdict", "config"],
)
def test_odd_values_are_missing_and_described(value: Any, said: str) -> None:
    tree = stored(config_tree(PPOConfig().environment(env_config={"value": value})))
    with pytest.raises(InvalidInputError, match=f"env_config/value.*{said}"):
        config_from(tree)


def test_a_class_made_in_a_function_is_missing_and_may_be_given() -> None:
    config = local_config()().training(lr=0.1)
    tree = config_tree(config)
    with pytest.raises(InvalidInputError, match=r"class: the class Local, made inside .*local_config"):
        config_from(tree)
    with pytest.raises(InvalidInputError, match=r"class: the class .*Maze is given or found, but a class of Algor"):
        config_from(tree, given={"class": Maze})
    assert type(config_from(tree, given={"class": MyConfig})) is MyConfig


def test_a_class_that_can_not_be_imported_is_named() -> None:
    tree = config_tree(PPOConfig().training(learner_class=MyLearner))
    tree["settings"]["_learner_class"]["v"] = "no_such_package.learners:MyLearner"
    with pytest.raises(InvalidInputError) as error:
        config_from(tree)
    assert "learner_class: 'no_such_package.learners:MyLearner' is not found here (ModuleNotFoundError" in str(
        error.value
    )
    assert "given={'learner_class': ...}" in str(error.value)
    assert config_from(tree, given={"learner_class": PPOTorchLearner}).learner_class is PPOTorchLearner


# -- environments


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name for an environment, in a registry that is the test's own."""
    monkeypatch.setattr(_global_registry, "_to_flush", {})
    return "maze-of-the-test"


def forget(name: str) -> None:
    _global_registry.unregister(ENV_CREATOR, name)


def rebuilt(tree: Any, env: Any = None) -> Any:
    return config_from(tree, given=None if env is None else {"env": env})


def test_an_environment_registered_by_an_importable_function_is_registered_again(registered: str) -> None:
    register_env(registered, make_maze)
    tree = stored(config_tree(PPOConfig().environment(registered)))
    forget(registered)
    assert not is_known_env(registered)
    assert rebuilt(tree).env == registered
    assert _global_registry.get(ENV_CREATOR, registered) is make_maze
    assert not ray.is_initialized()


def test_an_environment_registered_by_a_lambda_must_be_registered_or_given(registered: str) -> None:
    register_env(registered, lambda env_config: Maze())
    tree = stored(config_tree(PPOConfig().environment(registered)))
    assert rebuilt(tree).env == registered
    forget(registered)
    with pytest.raises(InvalidInputError) as error:
        config_from(tree)
    assert f"env: the environment {registered!r} is not registered here (it was with a lambda" in str(error.value)
    assert f"call `ray.tune.register_env({registered!r}, ...)` before" in str(error.value)
    assert "given={'env': ...}" in str(error.value)
    assert rebuilt(tree, Maze).env is Maze
    assert rebuilt(tree, "CartPole-v1").env == "CartPole-v1"
    assert rebuilt(tree, make_maze).env == registered
    assert _global_registry.get(ENV_CREATOR, registered) is make_maze


def test_an_environment_that_gymnasium_does_not_know_here_is_named_with_its_entry_point() -> None:
    gym.register("MazeOfTheTest-v0", entry_point=f"{__name__}:Maze")
    config = PPOConfig().environment("CartPole-v1").evaluation(evaluation_config={"env": "MazeOfTheTest-v0"})
    tree = stored(config_tree(config))
    assert config_from(tree).evaluation_config == {"env": "MazeOfTheTest-v0"}
    gym.registry.pop("MazeOfTheTest-v0")
    with pytest.raises(InvalidInputError) as error:
        config_from(tree)
    assert "evaluation_config/env: the environment 'MazeOfTheTest-v0' (its entry point was " in str(error.value)
    given = {"evaluation_config/env": "CartPole-v1"}
    assert config_from(tree, given=given).evaluation_config == {"env": "CartPole-v1"}


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("CartPole-v1", True),
        ("gymnasium.envs.classic_control.CartPoleEnv", True),
        ("no_such_package.CartPoleEnv", False),
        ("no_such_package:CartPole-v1", False),
        ("maze", False),
        ("not a name", False),
    ],
)
def test_which_names_lead_to_an_environment(name: str, known: bool) -> None:
    assert is_known_env(name) is known


# -- what others wrote


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"$": "pickle", "v": b""}, "env_config/x: unknown tag 'pickle'; a newer release may know it"),
        ({"$": "set", "w": []}, "env_config/x: no value is"),
        ({"$": "torch.dtype", "v": "nn"}, "env_config/x: no value is"),
        ({"$": "enum", "class": f"{__name__}:Color", "name": "BLUE"}, "env_config/x: no value is"),
        ({"$": "dtype", "v": "O"}, "env_config/x: no value is"),
    ],
)
def test_a_form_that_is_not_known_is_corruption(value: dict[str, Any], said: str) -> None:
    with pytest.raises(CorruptionError, match=said):
        config_from(tree_with(value))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"$": "ref", "v": "os:system"}, "env_config/x: os:system of Python's own library"),
        ({"$": "enum", "class": f"{__name__}:Maze", "name": "RED"}, "env_config/x.*an Enum is needed"),
        ({"$": "namedtuple", "class": f"{__name__}:Maze", "v": []}, "env_config/x/class.*a named tuple is needed"),
        (
            {"$": "dataclass", "class": {"$": "ref", "v": f"{__name__}:Maze"}, "fields": {}},
            "env_config/x/class: the class .*Maze is no dataclass here",
        ),
        (
            {"$": "partial", "function": {"$": "ref", "v": "subprocess:run"}, "args": (["true"],), "kwargs": {}},
            "env_config/x/function: subprocess:run of Python's own library",
        ),
    ],
)
def test_names_that_lead_astray_are_refused(value: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        config_from(tree_with(value))


def tree_with(value: dict[str, Any]) -> dict[str, Any]:
    return {
        "class": {"$": "ref", "v": "ray.rllib.algorithms.ppo.ppo:PPOConfig"},
        "settings": {"env_config": {"x": value}},
        "removed": [],
    }


def test_fields_that_are_newer_than_what_was_saved_get_their_defaults() -> None:
    tree = Encoder().encode(Frozen(1, [2]))
    del tree["fields"]["more"]
    assert Decoder().decode(tree, "") == Frozen(1, [])


@dataclass
class Tuned:
    """With an attribute that is no field, but made by the constructor."""

    n: int

    def __post_init__(self) -> None:
        self.twice = 2 * self.n
        self.n += 1


@dataclass
class Hiding:
    """With one that others set, as `checkpointing` hides storage options."""

    n: int


def test_of_a_dataclass_its_fields_are_stored_and_what_its_constructor_made() -> None:
    tuned: Any = Decoder().decode(stored(Encoder().encode(Tuned(3))), "")
    assert (tuned.n, tuned.twice) == (4, 6)
    hiding = Hiding(3)
    vars(hiding)["secret"] = functools.partial(dict, key="AKIA")
    tree = stored(Encoder().encode(hiding))
    assert "AKIA" not in str(tree)
    assert Decoder().decode(tree, "") == hiding


def test_nothing_is_pickled_and_no_ray_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickled")

    config = rich_ppo()
    for name in ("dumps", "dump", "loads", "load"):
        monkeypatch.setattr(pickle, name, refuse)
    assert type(again(config)) is PPOConfig
    assert not ray.is_initialized()


def test_credentials_of_offline_data_are_not_stored() -> None:
    config = PPOConfig().offline_data(
        input_filesystem_kwargs={"secret_key": "hush"}, output_filesystem_kwargs={"secret_key": "hush"}
    )
    tree = config_tree(config)
    assert "hush" not in str(tree)
    assert config_from(tree).input_filesystem_kwargs == {}
    given = config_from(tree, given={"input_filesystem_kwargs": {"secret_key": "mine"}})
    assert given.input_filesystem_kwargs == {"secret_key": "mine"}
