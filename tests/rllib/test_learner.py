"""Learners: from one through a checkpoint into a fresh one, and on, bit for bit."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from ray.rllib.core import DEFAULT_MODULE_ID

from rl_ckpt import Checkpointer, InvalidInputError
from rl_ckpt.rllib.learner import learner_problems, learner_tree, set_learner
from rl_ckpt.rllib.learner_threads import held
from rl_ckpt.rllib.modules import module_tree, policies_of, weights_digest
from rl_ckpt.state.tree import flatten
from tests.rllib.learner_cases import APPO, CASES, DQN, IMPALA, MARWIL, PPO, SAC, Case, build, train

Build = Callable[..., Any]


@pytest.fixture
def built() -> Iterator[Build]:
    """Builds learners, and ends their threads."""
    made: list[Any] = []

    def make(case: Case, seed: int = 0, **changes: Any) -> Any:
        learner = build(case, seed, **changes)
        made.append(learner)
        return learner

    yield make
    for learner in made:
        learner.shutdown()


def through_a_checkpoint(tree: Any, folder: Path) -> Any:
    Checkpointer(str(folder)).save_state(0, tree).result()
    return Checkpointer(str(folder)).load_state()


def taken(learner: Any) -> Any:
    """Everything of a learner, as a checkpoint would have it, in memory of its own."""
    with held(learner):
        flat = flatten(learner_tree(learner))
        arrays = {path: np.array(_host(value)) for path, value in flat.arrays.items()}
        return flat.nodes, {path: (str(array.dtype), array.tobytes()) for path, array in arrays.items()}


def _host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.view(torch.int16).numpy() if value.dtype is torch.bfloat16 else value.numpy()
    return value


def differences(left: Any, right: Any) -> list[str]:
    """Paths at which two learners differ, without what is measured in seconds."""
    out = []
    for one, other in zip(left, right, strict=True):
        out += [path for path in {**one, **other} if one.get(path) != other.get(path)]
    return sorted({path for path in out if "/metrics/" not in path})


def generators() -> Any:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_generators(state: Any) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fresh_learner_goes_on_bit_for_bit(case: Case, built: Build, tmp_path: Path) -> None:
    learner = built(case)
    train(learner, case, 3)
    with held(learner):
        saved = through_a_checkpoint(learner_tree(learner), tmp_path)
    at_save = taken(learner)
    train(learner, case, 3, start=3)
    at_end = taken(learner)
    after = generators()

    other = built(case, seed=99)
    train(other, case, 1, start=50)  # so that it has state of its own everywhere
    set_learner(other, saved)
    restored = taken(other)
    train(other, case, 3, start=3)

    assert differences(at_save, restored) == []
    assert differences(at_end, taken(other)) == []
    assert str(after) == str(generators())
    assert len(differences(at_save, at_end)) > 3  # else it did not train


@pytest.mark.parametrize("case", [PPO, DQN, SAC, MARWIL, APPO], ids=lambda case: case.name)
def test_a_rollback_takes_everything_back(case: Case, built: Build) -> None:
    learner = built(case)
    with held(learner):
        first = through_memory(learner_tree(learner))
    begun = taken(learner)
    train(learner, case, 4)
    assert "learner/weights_seq_no" in differences(begun, taken(learner))

    set_learner(learner, first)

    assert differences(begun, taken(learner)) == []


def through_memory(tree: Any) -> Any:
    """A copy of a tree; containers and tensors of its own."""
    if isinstance(tree, dict):
        return type(tree)((key, through_memory(value)) for key, value in tree.items())
    if isinstance(tree, list | tuple):
        return type(tree)(through_memory(value) for value in tree)
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    return np.array(tree) if isinstance(tree, np.ndarray) else tree


# What RLlib's own `get_state` leaves out, by learner: the tree's paths, and that it has changed since the build.
FORGOTTEN = [
    (PPO, "curr_kl_coeffs_per_module"),
    (PPO, "entropy_coeff_schedulers_per_module"),
    (APPO, "curr_kl_coeffs_per_module"),
    (APPO, "_last_update_ts_by_mid"),
    (DQN, "last_update_ts_by_mid"),
    (SAC, "curr_log_alpha"),
    (MARWIL, "moving_avg_sqd_adv_norms_per_module"),
]


@pytest.mark.parametrize(("case", "name"), FORGOTTEN, ids=lambda value: getattr(value, "name", value))
def test_what_rllib_forgets_is_in_the_tree_and_put_back(case: Case, name: str, built: Build) -> None:
    learner, other = built(case), built(case, seed=9)
    train(learner, case, 4)
    value = learner_tree(learner)["policies"][DEFAULT_MODULE_ID]["learner"][name]
    before = learner_tree(other)["policies"][DEFAULT_MODULE_ID]["learner"].get(name)
    assert before is None or before != value

    set_learner(other, learner_tree(learner))

    assert learner_tree(other)["policies"][DEFAULT_MODULE_ID]["learner"][name] == value
    assert name not in str(learner.get_state(not_components=["rl_module", "optimizer", "metrics_logger"]))


@pytest.mark.parametrize("case", [DQN, SAC, APPO], ids=lambda case: case.name)
def test_target_networks_are_part_of_the_module(case: Case, built: Build) -> None:
    learner = built(case)
    train(learner, case, 4)
    names = module_tree(learner.module[DEFAULT_MODULE_ID])

    assert any("target" in name or "old_" in name for name in names)


def test_policies_with_odd_names_keep_their_own(built: Build, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "ppo-multi")
    learner, other = built(case), built(case, seed=3)
    train(learner, case, 2)
    saved = through_a_checkpoint(learner_tree(learner), tmp_path)

    set_learner(other, saved)

    digests = weights_digest(other.module)
    assert digests == weights_digest(learner.module)
    assert digests["a--b"] != digests["a_b"]


def test_one_policy_goes_into_another_learner_under_another_name(built: Build, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "ppo-multi")
    learner, other = built(case), built(PPO, seed=3)
    train(learner, case, 3)
    train(other, PPO, 1)
    Checkpointer(str(tmp_path)).save_state(0, learner_tree(learner)).result()
    part = Checkpointer(str(tmp_path)).load_state(select="policies/a_b")
    number, drawn = other._weights_seq_no, torch.get_rng_state()

    set_learner(other, part, {"a_b": DEFAULT_MODULE_ID})

    assert weights_digest(other.module)[DEFAULT_MODULE_ID] == weights_digest(learner.module)["a_b"]
    mine, theirs = (x.state_dict()["state"] for x in (other.get_optimizer(), learner.get_optimizer("a_b")))
    assert str(mine) == str(theirs)
    assert len(mine) > 3
    assert other._weights_seq_no == number  # the rest of the learner goes on
    assert torch.equal(drawn, torch.get_rng_state())


def test_state_of_policies_is_kept_though_the_learner_has_still_some_of_removed_ones(built: Build) -> None:
    case = next(case for case in CASES if case.name == "dqn")
    learner, other = built(case), built(case, seed=3)
    learner.last_update_ts_by_mid[DEFAULT_MODULE_ID] = 300
    learner.last_update_ts_by_mid["removed"] = other.last_update_ts_by_mid["also removed"] = 7

    set_learner(other, learner_tree(learner))

    assert other.last_update_ts_by_mid[DEFAULT_MODULE_ID] == 300


@pytest.mark.parametrize(
    ("policies", "said"),
    [
        ({"c": "a_b"}, "the checkpoint has no policy 'c'; it has ['a--b', 'a_b']"),
        ({"a--b": "x"}, "this learner has no policy 'x'; it has ['a--b', 'a_b']"),
    ],
)
def test_unknown_policies_list_the_known(policies: dict[str, str], said: str, built: Build) -> None:
    case = next(case for case in CASES if case.name == "ppo-multi")
    learner = built(case)

    assert learner_problems(learner, learner_tree(learner), policies) == [said]


def test_policies_that_only_one_side_has_are_both_named(built: Build) -> None:
    case = next(case for case in CASES if case.name == "ppo-multi")
    one, two = built(PPO), built(case)

    found = learner_problems(one, learner_tree(two))

    assert any("policies ['default_policy'] are not in the checkpoint" in text for text in found)
    assert any("this learner has no policy 'a--b'; it has ['default_policy']" in text for text in found)


def test_everything_that_does_not_fit_is_told_at_once_and_nothing_changes(built: Build) -> None:
    learner, other = built(PPO), built(PPO, 5)
    train(learner, PPO, 2)
    train(other, PPO, 1)
    tree = through_memory(learner_tree(learner))
    policy = tree["policies"][DEFAULT_MODULE_ID]
    policy["module"]["pi.renamed"] = policy["module"].pop("pi.net.mlp.0.bias")
    policy["module"]["vf.net.mlp.0.bias"] = policy["module"]["vf.net.mlp.0.bias"].double()
    policy["optimizers"]["default_optimizer"]["class"] = "torch.optim.sgd:SGD"
    policy["learner"]["curr_kl_coeffs_per_module"] = torch.zeros(3)
    policy["learner"]["unheard_of"] = 1
    unknown = json.dumps([[["x"], {"stats_cls_identifier": "mine"}]]).encode()
    tree["learners"][0]["metrics"] = {"text": zlib.compress(unknown), "arrays": []}
    before, drawn = taken(other), torch.get_rng_state()

    with pytest.raises(InvalidInputError) as raised:
        set_learner(other, tree)

    for said in (
        "policy 'default_policy': not in the checkpoint: 'pi.net.mlp.0.bias'",
        "in the checkpoint but not in the module here: 'pi.renamed'",
        "vf.net.mlp.0.bias: dtype float64 was saved, float32 is here",
        "optimizer 'default_optimizer': class torch.optim.sgd:SGD was saved, torch.optim.adam:Adam is here",
        "'curr_kl_coeffs_per_module': a float32 tensor of shape (3,) was saved",
        "'unheard_of' was saved",
        "metrics use statistics ['mine']",
    ):
        assert said in str(raised.value)
    assert differences(before, taken(other)) == []
    assert torch.equal(drawn, torch.get_rng_state())


@pytest.mark.parametrize("part", ["module", "optimizers", "learner"])
def test_a_missing_component_is_a_problem(part: str, built: Build) -> None:
    learner = built(PPO)
    tree = learner_tree(learner)
    del tree["policies"][DEFAULT_MODULE_ID][part]

    assert learner_problems(learner, tree) == [f"policy 'default_policy': the checkpoint has no {part} of it"]


class AddingLearner(PPO.config().learner_class):  # type: ignore[misc]
    """Adds to RLlib's state as its documentation says, and in an attribute by policy."""

    def build(self) -> None:
        super().build()
        self.seen: dict[str, Any] = {"rows": np.arange(3)}
        self.wins: dict[str, int] = {}

    def get_state(self, *args: Any, **kwargs: Any) -> Any:
        return {**super().get_state(*args, **kwargs), "seen": self.seen, "names": {"x", "y"}}

    def set_state(self, state: Any) -> None:
        super().set_state(state)
        self.seen, self.names = state["seen"], state["names"]


def test_what_a_learners_class_adds_is_kept(built: Build, tmp_path: Path) -> None:
    learner, other = (built(PPO, seed, learner_class=AddingLearner) for seed in (0, 1))
    train(learner, PPO, 2)
    learner.seen["rows"] += 5
    learner.wins[DEFAULT_MODULE_ID] = 4

    set_learner(other, through_a_checkpoint(learner_tree(learner), tmp_path))

    assert other.seen["rows"].tolist() == [5, 6, 7]
    assert other.names == {"x", "y"}
    assert other.wins == {DEFAULT_MODULE_ID: 4}
    assert weights_digest(other.module) == weights_digest(learner.module)


def test_a_learner_without_counterpart_takes_what_the_first_one_had(built: Build) -> None:
    learner, second = built(SAC), built(SAC, 1)
    train(learner, SAC, 3)
    second._learner_index = 1
    tree = through_memory(learner_tree(learner))
    torch.rand(1)
    drawn = torch.get_rng_state()

    set_learner(second, tree)

    assert torch.equal(second.curr_log_alpha[DEFAULT_MODULE_ID], learner.curr_log_alpha[DEFAULT_MODULE_ID])
    assert torch.equal(drawn, torch.get_rng_state())  # not the first one's generators: they would draw the same


def test_learners_that_train_together_keep_what_they_do_not_share(built: Build) -> None:
    first, second, third = built(SAC), built(SAC, 1), built(SAC, 2)
    train(first, SAC, 3)
    train(second, SAC, 2)
    second._learner_index = third._learner_index = 1
    one, two = learner_tree(first), learner_tree(second)
    policy = two["policies"][DEFAULT_MODULE_ID]
    assert "learner" not in policy
    assert policy["optimizers"]["alpha"]["state"] == {}
    both = {**one, "learners": {**one["learners"], **two["learners"]}}  # as the restore sees them

    set_learner(third, both)

    mid = DEFAULT_MODULE_ID
    assert weights_digest(third.module) == weights_digest(first.module)
    assert torch.equal(third.curr_log_alpha[mid], second.curr_log_alpha[mid])
    alphas = [x.get_optimizer(mid, "alpha").state_dict()["state"][0] for x in (second, third)]
    assert str(alphas[0]) == str(alphas[1])


def test_policies_to_train_are_data(built: Build) -> None:
    case = next(case for case in CASES if case.name == "ppo-multi")
    learner = built(case)

    def chosen(value: Any) -> Any:
        learner.config.policies_to_train = value
        return learner_tree(learner)["learner"]["policies_to_train"]

    assert chosen(None) is None
    assert chosen({"a_b", "a--b"}) == ["a--b", "a_b"]
    assert chosen(len) == {"function": "builtins:len"}


def test_nothing_of_the_tree_is_kept(built: Build) -> None:
    learner, other = built(SAC), built(SAC, 1)
    train(learner, SAC, 2)
    with held(learner):
        tree = through_memory(learner_tree(learner))
    before = through_memory(tree)

    set_learner(other, tree)
    train(other, SAC, 2)

    flat, was = flatten(tree), flatten(before)
    assert all(np.array_equal(_host(flat.arrays[path]), _host(was.arrays[path])) for path in was.arrays)


def test_modules_are_named_as_they_are(built: Build) -> None:
    learner = built(IMPALA)

    tree = learner_tree(learner)["policies"]

    assert {policy: list(part["module"]) for policy, part in tree.items()} == {
        policy: list(cast(torch.nn.Module, module).state_dict())
        for policy, module in policies_of(learner.module).items()
    }
