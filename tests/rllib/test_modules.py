"""RLModules as trees: names, dtypes and bits; what does not fit; digests of copies."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchDDPRLModule, TorchRLModule
from ray.rllib.examples.rl_modules.classes.random_rlm import RandomRLModule

from rl_ckpt import Checkpointer, InvalidInputError
from rl_ckpt.rllib.modules import (
    module_extra,
    module_problems,
    module_tree,
    policies_of,
    set_module,
    tensors_digest,
    weights_digest,
)
from rl_ckpt.state.tree import Tie, flatten
from tests.rllib.learner_cases import DISCRETE, DQN, OBS, PPO, SAC, DtypesModule, build


def dtypes_module(seed: int = 0, cls: type[TorchRLModule] = DtypesModule, **given: Any) -> Any:
    torch.manual_seed(seed)
    return RLModuleSpec(module_class=cls, observation_space=OBS, action_space=DISCRETE, **given).build()


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return list(left) == list(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(left.values(), right.values(), strict=True)
    )


def test_every_dtype_comes_back_as_it_was(tmp_path: Path) -> None:
    module, other = dtypes_module(0), dtypes_module(1)
    with torch.no_grad():
        module.head.weight[0, 0] = 1 / 3  # not a float32
    module.steps += 4
    Checkpointer(str(tmp_path)).save_state(0, module_tree(module)).result()

    set_module(other, Checkpointer(str(tmp_path)).load_state())

    assert same(module_tree(module), module_tree(other))
    assert other.seen.tolist() == [2**40, 1]
    assert {str(t.dtype) for t in module_tree(other).values()} == {"torch.bfloat16", "torch.float64", "torch.int64"}
    assert other.tied.weight is other.again.weight


def test_a_tree_is_by_reference_and_tied_weights_are_one_memory() -> None:
    module = dtypes_module()
    tree = module_tree(module)

    assert tree["head.weight"].data_ptr() == module.head.weight.data_ptr()
    assert flatten(tree).nodes["tied.weight"] == Tie("again.weight")


def test_setting_copies_into_the_parameters_that_optimizers_know() -> None:
    module, other = dtypes_module(0), dtypes_module(1)
    parameters = dict(other.named_parameters())
    tree = module_tree(module)

    set_module(other, tree)

    assert all(parameters[name] is value for name, value in other.named_parameters())
    with torch.no_grad():
        other.head.weight += 1
    assert not torch.equal(other.head.weight, tree["head.weight"])


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_ddp_wrapper_does_not_show(group: None) -> None:
    module, other = dtypes_module(0), dtypes_module(1)
    wrapped = TorchDDPRLModule(other)

    set_module(wrapped, module_tree(module))

    assert same(module_tree(wrapped), module_tree(module))
    assert weights_digest(wrapped) == weights_digest(module)


class Renamed(DtypesModule):
    def setup(self) -> None:
        super().setup()
        self.trunk = self.body
        del self.body


class Wider(DtypesModule):
    def setup(self) -> None:
        super().setup()
        self.body = torch.nn.Linear(4, 16).to(torch.bfloat16)


class Narrower(DtypesModule):
    def setup(self) -> None:
        super().setup()
        self.head = self.head.to(torch.float32)


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Renamed, ["not in the checkpoint: 'trunk.weight', 'trunk.bias'", "not in the module here: 'body.weight'"]),
        (Wider, ["body.weight: shape (8, 4) was saved, (16, 4) is here", "body.bias: shape (8,)"]),
        (Narrower, ["head.weight: dtype float64 was saved, float32 is here", "head.bias: dtype float64"]),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(cls: type[TorchRLModule], said: list[str]) -> None:
    tree, other = module_tree(dtypes_module(0)), dtypes_module(1, cls)
    before = weights_digest(other)

    problems = "\n".join(module_problems(other, tree))
    with pytest.raises(InvalidInputError) as raised:
        set_module(other, tree)

    assert all(text in problems for text in said), problems
    assert all(text in str(raised.value) for text in said)
    assert weights_digest(other) == before


def test_numpy_in_place_of_a_tensor_does_not_fit() -> None:
    module = dtypes_module()
    tree = {**module_tree(module), "head.bias": np.zeros(2)}

    assert module_problems(module, tree) == ["head.bias: a ndarray was saved, a Tensor is here"]


@pytest.mark.parametrize("case", [PPO, DQN, SAC], ids=lambda case: case.name)
def test_a_copy_for_inference_takes_what_it_needs_and_has_the_same_digest(case: Any) -> None:
    learner = build(case, seed=1)
    whole = learner.module[DEFAULT_MODULE_ID]
    spec = learner.config.get_multi_rl_module_spec(spaces={DEFAULT_MODULE_ID: (OBS, case.actions)}, inference_only=True)
    copy: Any = spec.build()
    small = copy[DEFAULT_MODULE_ID]
    assert len(module_tree(small)) < len(module_tree(whole))
    assert weights_digest(copy) != weights_digest(learner.module)

    set_module(small, module_tree(whole))

    assert weights_digest(copy) == weights_digest(learner.module) == weights_digest(small)
    assert module_problems(whole, module_tree(small))  # but not the other way round
    (left_out, *_) = set(module_tree(whole)) - set(module_tree(small))
    assert module_problems(whole, {**module_tree(whole), f"{left_out}_more": torch.zeros(1)})


def test_a_digest_sees_one_bit() -> None:
    module = dtypes_module()
    before = weights_digest(module)
    with torch.no_grad():
        module.body.weight.view(torch.int16)[0, 0] ^= 1

    assert weights_digest(module) != before


def test_a_digest_sees_names_dtypes_and_shapes_but_no_order() -> None:
    zeros = torch.zeros(2, 3)
    unlike = [{"a": zeros}, {"b": zeros}, {"a": zeros.to(torch.int32)}, {"a": zeros.T}, {"a": 0}, {}]

    assert len({tensors_digest(tensors) for tensors in unlike}) == len(unlike)
    assert tensors_digest({"a": zeros, "b": zeros + 1}) == tensors_digest({"b": zeros + 1, "a": zeros})


class Counting(DtypesModule):
    """Has state that is no tensor of its own, by RLlib's way and by torch's."""

    def setup(self) -> None:
        super().setup()
        self.head = self.head.to(torch.float32)  # numpy, which the base class's get_state wants, has no bfloat16
        for layer in (self.body, self.again, self.tied):
            layer.to(torch.float32)
        self.visits = {"left": 3}
        self.temperature = 0.5

    def get_state(self, *args: Any, **kwargs: Any) -> Any:
        return {**super().get_state(*args, **kwargs), "visits": dict(self.visits)}

    def set_state(self, state: Any) -> None:
        super().set_state({k: v for k, v in state.items() if k != "visits"})
        self.visits = state["visits"]

    def get_extra_state(self) -> float:
        return self.temperature

    def set_extra_state(self, state: float) -> None:
        self.temperature = state


def test_a_modules_own_state_is_kept(tmp_path: Path) -> None:
    module, other = dtypes_module(0, Counting), dtypes_module(1, Counting)
    module.visits["right"], module.temperature = 8, 0.25
    with torch.no_grad():
        module.scale.fill_(1 / 3)  # float64, which the base class's set_state makes a float32
    tree = {"module": module_tree(module), "extra": module_extra(module)}
    Checkpointer(str(tmp_path)).save_state(0, tree).result()
    loaded = Checkpointer(str(tmp_path)).load_state()

    set_module(other, loaded["module"], loaded["extra"])

    assert (other.visits, other.temperature) == ({"left": 3, "right": 8}, 0.25)
    assert other.scale.item() == 1 / 3


class Broken(DtypesModule):
    def get_state(self, *args: Any, **kwargs: Any) -> Any:
        return super().get_state(*args, **kwargs)


def test_a_get_state_that_fails_says_whose_it_is() -> None:
    with pytest.raises(InvalidInputError, match=r"Broken\.get_state\(\) failed: .*BFloat16.*get_extra_state"):
        module_extra(dtypes_module(0, Broken))


def test_a_module_without_tensors_is_empty() -> None:
    module = RLModuleSpec(module_class=RandomRLModule, observation_space=OBS, action_space=DISCRETE).build()

    assert module_tree(module) == module_extra(module) == {}
    assert module_problems(module, {}) == []
    set_module(module, {})


def test_policies_are_found_below_their_wrapper() -> None:
    learner = build(PPO)

    assert list(policies_of(learner.module)) == [DEFAULT_MODULE_ID]
    assert list(policies_of(dtypes_module())) == [DEFAULT_MODULE_ID]
