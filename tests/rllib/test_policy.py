"""One policy saved and loaded on its own: equal outputs, only its bytes read, no Ray, no environment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
from gymnasium import spaces
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.ppo_catalog import PPOCatalog
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import TargetNetworkAPI
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModule, RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule

from rl_ckpt import Checkpointer, CheckpointNotFoundError, InvalidInputError
from rl_ckpt.rllib.about import FORMAT, about_tree
from rl_ckpt.rllib.modules import module_tree
from rl_ckpt.rllib.policy import build_module, load_policy, policy_about, save_policy
from rl_ckpt.store.run import Run
from tests.unit.trees import assert_same

ROOT = Path(__file__).resolve().parents[2]
BOX = spaces.Box(-np.inf, np.inf, (4,), np.float32)
TWO: Any = spaces.Discrete(2)


class Small(TorchRLModule):
    """A module of a user's own, in the dtype that its config asks for, with buffers of other dtypes."""

    def setup(self: Any) -> None:
        dtype = getattr(torch, self.model_config.get("dtype", "float32"))
        self.norm = torch.nn.BatchNorm1d(4)
        self.layer = torch.nn.Linear(4, int(self.action_space.n)).to(dtype)
        self.register_buffer("steps", torch.tensor(2**40))

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        obs = self.norm(batch[Columns.OBS]).to(self.layer.weight.dtype)
        return {Columns.ACTION_DIST_INPUTS: self.layer(obs)}


class Wide(Small):
    """Another architecture."""

    def setup(self) -> None:
        super().setup()
        self.layer = torch.nn.Linear(4, 7)


class Custom(spaces.Discrete):
    """A space that is not stored."""


class Counting(Small):
    """A module with more state than its tensors."""

    def setup(self) -> None:
        super().setup()
        self.visits = {"a": 0, ("b", 1): 0}

    def get_state(self, *args: Any, **kwargs: Any) -> Any:
        return {**super().get_state(*args, **kwargs), "visits": dict(self.visits)}

    def set_state(self, state: Any) -> None:
        self.visits = dict(state["visits"])
        super().set_state({key: value for key, value in state.items() if key != "visits"})


def ppo(inference_only: bool = False, **model: Any) -> RLModule:
    return RLModuleSpec(
        module_class=DefaultPPOTorchRLModule,
        observation_space=BOX,
        action_space=TWO,
        inference_only=inference_only,
        model_config=DefaultModelConfig(**{"fcnet_hiddens": [16], **model}),
        catalog_class=PPOCatalog,
    ).build()


def of(config: Any, action_space: gym.Space[Any] = TWO) -> RLModule:
    """The module that a learner of this config would have."""
    config.rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[16], head_fcnet_hiddens=[8]))
    multi: Any = config.get_multi_rl_module_spec(spaces={"default_policy": (BOX, action_space)}).build()
    module: RLModule = multi["default_policy"]
    if isinstance(module, TargetNetworkAPI):
        module.make_target_networks()
    return module


def small(cls: type[RLModule] = Small, action_space: gym.Space[Any] = TWO, **model: Any) -> RLModule:
    return RLModuleSpec(
        module_class=cls, observation_space=BOX, action_space=action_space, model_config=dict(model)
    ).build()


def trained(module: Any) -> Any:
    """With values that no constructor makes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.1)
    return module


def batch_of(module: Any) -> dict[str, Any]:
    batch: dict[str, Any] = {Columns.OBS: torch.linspace(-1, 1, 12).reshape(3, 4)}
    dtypes = {tensor.dtype for tensor in module.parameters()}
    if dtypes in ({torch.bfloat16}, {torch.float64}):
        batch[Columns.OBS] = batch[Columns.OBS].to(*dtypes)
    if module.is_stateful():
        batch[Columns.OBS] = batch[Columns.OBS].unsqueeze(1)
        batch[Columns.STATE_IN] = {
            k: torch.as_tensor(v).expand(3, *v.shape) for k, v in module.get_initial_state().items()
        }
    return batch


def assert_same_policy(found: Any, module: Any) -> None:
    assert type(found) is type(module)
    assert_same(dict(found.state_dict()), dict(module.state_dict()))
    one, other = (m.forward_inference(batch_of(m)) for m in (found, module))
    assert_same(torch.utils._pytree.tree_leaves(one), torch.utils._pytree.tree_leaves(other))
    assert (found.observation_space, found.action_space) == (module.observation_space, module.action_space)
    assert found.model_config == module.model_config
    assert (found.inference_only, found.learner_only) == (bool(module.inference_only), module.learner_only)
    assert not found.training


KINDS: dict[str, Callable[[], RLModule]] = {
    "PPO": ppo,
    "PPO for inference": lambda: ppo(inference_only=True),
    "PPO with one encoder": lambda: ppo(vf_share_layers=True),
    "LSTM": lambda: ppo(use_lstm=True, lstm_cell_size=8),
    "bf16": lambda: ppo().to(torch.bfloat16),  # type: ignore[attr-defined]
    "f64": lambda: ppo().to(torch.float64),  # type: ignore[attr-defined]
    "DQN": lambda: of(DQNConfig()),
    "SAC": lambda: of(SACConfig(), spaces.Box(-2, 2, (1,))),
    "APPO": lambda: of(APPOConfig()),
    "PPO as its config builds it": lambda: of(PPOConfig()),
    "custom": small,
    "custom bf16": lambda: small(dtype="bfloat16"),
    "custom f64": lambda: small(dtype="float64"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    module = trained(KINDS[kind]())
    info = save_policy(str(tmp_path), module, metrics={"return": 3.0})
    assert (info.step, info.metrics) == (0, {"return": 3.0})
    assert_same_policy(load_policy(str(tmp_path)), module)
    assert not ray.is_initialized()


def test_a_policy_of_a_step_and_a_name_comes_back(tmp_path: Path) -> None:
    first, second = trained(small()), small()
    first.learner_only = True
    save_policy(str(tmp_path), first, "left/wing [1]*", step=3)
    save_policy(str(tmp_path), second, "right", step=5)
    assert_same_policy(load_policy(str(tmp_path), "left/wing [1]*", step=3), first)
    assert_same_policy(load_policy(str(tmp_path), "right"), second)
    with pytest.raises(InvalidInputError, match="has no policy 'left'; its policies are 'right'"):
        load_policy(str(tmp_path), "left")
    with pytest.raises(CheckpointNotFoundError):
        load_policy(str(tmp_path), step=4)


@pytest.mark.parametrize("inference_only", [None, False])
def test_what_a_modules_own_get_state_adds_comes_back(tmp_path: Path, inference_only: bool | None) -> None:
    module: Any = trained(small(Counting))
    module.visits = {"a": 3, ("b", 1): 2**40}
    save_policy(str(tmp_path), module)
    found: Any = load_policy(str(tmp_path), inference_only=inference_only)
    assert_same_policy(found, module)
    assert found.visits == module.visits
    module.visits = {"a": object()}
    with pytest.raises(InvalidInputError, match=r"what get_state\(\) of the module adds can't be saved: .*object"):
        save_policy(str(tmp_path), module, step=1)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Bytes read from stores since the last call."""
    opened: list[Run] = []
    open_run = Run.open

    def spy(*args: Any) -> Run:
        opened.append(open_run(*args))
        return opened[-1]

    def count() -> int:
        total = sum(run.store.stats.snapshot().bytes_read for run in opened)
        opened.clear()
        return total

    monkeypatch.setattr("rl_ckpt.checkpointer.Run.open", spy)
    return count


def algorithm_tree(modules: dict[str, RLModule]) -> dict[str, Any]:
    """A tree as an Algorithm's checkpoint has it, as far as policies are concerned."""
    parts = {
        id_: {
            "about": policy_about(module),
            "module": module_tree(module),
            "optimizers": {"adam": {k: torch.ones_like(v) for k, v in module_tree(module).items()}},
        }
        for id_, module in modules.items()
    }
    config = {"class": {"$": "ref", "v": "no_such_package:Config"}, "settings": {}, "removed": []}
    return {"about": about_tree("algorithm", list(modules)), "config": config, "policies": parts}


def test_only_one_policys_bytes_are_read_out_of_many(tmp_path: Path, reads: Callable[[], int]) -> None:
    modules: dict[str, Any] = {f"p{i}": trained(ppo()) for i in range(100)}
    modules["p7"] = trained(ppo(fcnet_hiddens=[1000, 1000], vf_share_layers=False))
    with Checkpointer(str(tmp_path)) as checkpointer:
        checkpointer.save_state(7, algorithm_tree(modules)).result(60)
    reads()
    (manifest,) = (path.stat().st_size for path in (tmp_path / "manifests").iterdir())
    whole = sum(tensor.nbytes for tensor in module_tree(modules["p7"]).values())
    assert_same_policy(load_policy(str(tmp_path), "p7"), modules["p7"])
    assert whole <= reads() <= whole + manifest + 65536, "with the log, and what lies between chunks"
    assert manifest < 0.1 * whole
    # What only training needs (half of it: the value function) is not read where it is not wanted.
    found: Any = load_policy(str(tmp_path), "p7", inference_only=True)
    lean = sum(tensor.nbytes for tensor in found.state_dict().values())
    assert lean <= 0.51 * whole
    assert lean <= reads() <= lean + 2 * (manifest + 65536), "read twice: the module is built in between"
    assert found.inference_only
    batch = batch_of(found)
    assert torch.equal(
        found.forward_inference(batch)[Columns.ACTION_DIST_INPUTS],
        modules["p7"].forward_inference(batch)[Columns.ACTION_DIST_INPUTS],
    )


FRESH = """
import json, sys
import numpy as np, torch
from rl_ckpt.rllib.policy import load_policy
module = load_policy(sys.argv[1], "pilot")
import ray
out = module.forward_inference({"obs": torch.linspace(-1, 1, 12).reshape(3, 4)})["action_dist_inputs"]
print(json.dumps({"ray": ray.is_initialized(), "out": out.tolist(), "here": __name__, "made": type(module).__name__}))
"""


def test_a_process_that_has_not_the_environment_loads_and_acts(tmp_path: Path) -> None:
    module = trained(ppo())
    tree = algorithm_tree({"pilot": module, "other": trained(small())})
    tree["config"]["settings"] = {"env": {"$": "ref", "v": "no_such_package.mazes:Maze"}}
    tree["policies"]["other"]["about"]["class"]["v"] = "no_such_package.policies:Other"
    with Checkpointer(str(tmp_path)) as checkpointer:
        checkpointer.save_state(0, tree).result(60)
    command = [sys.executable, "-W", "ignore", "-c", FRESH, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["ray"] is False
    expected = module.forward_inference(batch_of(module))[Columns.ACTION_DIST_INPUTS]
    assert torch.equal(torch.tensor(said["out"]), expected)


# -- what does not work, and how it is told


def saved(path: Path, module: RLModule, change: Callable[[dict[str, Any]], None] = lambda about: None) -> str:
    tree = {"about": about_tree("policy", ["default_policy"])}
    parts = {"about": policy_about(module), "module": module_tree(module)}
    change(parts["about"])
    with Checkpointer(str(path)) as checkpointer:
        checkpointer.save_state(0, {**tree, "policies": {"default_policy": parts}}).result(60)
    return str(path)


def test_a_class_that_is_not_importable_is_named_and_may_be_given(tmp_path: Path) -> None:
    module = trained(small())

    def lose(about: dict[str, Any]) -> None:
        about["class"] = {"$": "ref", "v": "no_such_package.policies:Small"}

    url = saved(tmp_path, module, lose)
    with pytest.raises(InvalidInputError) as error:
        load_policy(url)
    assert "class: 'no_such_package.policies:Small' is not found here (ModuleNotFoundError" in str(error.value)
    assert "module_class=... of load_policy" in str(error.value)
    assert_same_policy(load_policy(url, module_class=Small), module)
    with pytest.raises(InvalidInputError, match=r"shape \(2, 4\) was saved, \(7, 4\) is here"):
        load_policy(url, module_class=Wide)
    with pytest.raises(
        InvalidInputError, match=r"the class .*Linear is given or found, but a class of RLModule is needed"
    ):
        load_policy(url, module_class=torch.nn.Linear)  # type: ignore[arg-type]


def test_parts_that_are_not_stored_are_asked_for_all_at_once(tmp_path: Path) -> None:
    module = trained(small(action_space=Custom(2), scale=lambda x: x))
    save_policy(str(tmp_path), module)
    with pytest.raises(InvalidInputError) as error:
        load_policy(str(tmp_path), given={"scale": 1})
    for said in (
        "action_space: an object of class",
        ":Custom, a space that is not stored",
        "model_config/scale: a lambda (test_policy.py, line",
        "scale: is given, but the policy has no such part",
        "given={'action_space': ..., 'model_config/scale': ...}",
    ):
        assert said in str(error.value)
    with pytest.raises(InvalidInputError, match="action_space: 5 is given, but a space is needed"):
        load_policy(str(tmp_path), given={"action_space": 5, "model_config/scale": abs})
    given = {"action_space": module.action_space, "model_config/scale": module.model_config["scale"]}
    assert_same_policy(load_policy(str(tmp_path), given=given), module)


def test_a_policy_that_was_saved_for_inference_can_not_be_made_whole(tmp_path: Path) -> None:
    save_policy(str(tmp_path), ppo(inference_only=True))
    with pytest.raises(InvalidInputError, match=r"not in the checkpoint: 'vf.log_std_clip"):
        load_policy(str(tmp_path), inference_only=False)


def test_a_checkpoint_of_something_else_is_told(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as checkpointer:
        checkpointer.save_state(0, {"policies": {"default_policy": {"module": {"w": 1}}}}).result(60)
        checkpointer.save_state(1, {"w": 1}).result(60)
    with pytest.raises(InvalidInputError, match="holds no checkpoint of an Algorithm or a policy"):
        load_policy(str(tmp_path), step=0)
    with pytest.raises(InvalidInputError, match=r"no policy can be loaded from .*at the top the checkpoint has: w"):
        load_policy(str(tmp_path), step=1)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as checkpointer:
        about = {**about_tree("policy", ["default_policy"]), "format": FORMAT + 1, "rl_ckpt": "9.0"}
        checkpointer.save_state(0, {"about": about, "policies": {}}).result(60)
    said = rf"was saved by rl_ckpt 9.0 in format {FORMAT + 1} of rl_ckpt.rllib; this release .* up to {FORMAT}. Upgrade"
    with pytest.raises(InvalidInputError, match=said):
        load_policy(str(tmp_path))


def test_bad_arguments_of_a_save_leave_no_trace(tmp_path: Path) -> None:
    module = small()
    many = MultiRLModuleSpec(
        rl_module_specs={"a": RLModuleSpec.from_module(module), "b": RLModuleSpec.from_module(module)}
    ).build()
    for bad, policy_id, said in (
        (many, "p", r"a MultiRLModule holds several policies \(a, b\); give one of them"),
        (torch.nn.Linear(1, 1), "p", "module is a Linear; give an RLModule"),
        (module, "", "policy_id='' must be a string, and not empty"),
        (module, 3, "policy_id=3 must be a string"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            save_policy(str(tmp_path / "run"), bad, policy_id)  # type: ignore[arg-type]
    for wrong in (None, ""):
        with pytest.raises(InvalidInputError, match=f"policy_id={wrong!r} must be a string"):
            load_policy(str(tmp_path / "run"), wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_target_networks_are_made_where_they_were(tmp_path: Path) -> None:
    without = of(PPOConfig())
    assert policy_about(without)["target_networks"] is False
    dqn: Any = of(DQNConfig())
    assert policy_about(dqn)["target_networks"] is True
    fresh: Any = build_module({**policy_about(dqn), "target_networks": False})
    assert policy_about(fresh)["target_networks"] is False
    save_policy(str(tmp_path), dqn)
    lean: Any = load_policy(str(tmp_path), inference_only=True)
    assert [name for name in lean.state_dict() if "target" in name] == []
