"""Optimizers by the names of their parameters."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.rllib.core import ALL_MODULES, DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch.torch_learner import TorchLearner

from rl_ckpt import Checkpointer, InvalidInputError
from rl_ckpt.rllib.learner import learner_tree, set_learner
from rl_ckpt.rllib.optimizers import optimizers_problems, optimizers_tree, own_state, set_optimizers
from tests.rllib.learner_cases import CASES, DTYPES, PPO, SAC, Case, DtypesLearner, DtypesModule, build, train

MID = DEFAULT_MODULE_ID


def configured(optimizer: Any, base: type[TorchLearner] = DtypesLearner) -> type[TorchLearner]:
    """A learner class with another optimizer."""

    class Configured(base):  # type: ignore[misc, valid-type]
        def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
            made = optimizer(self._module[module_id].unwrapped())
            params = [p for group in made.param_groups for p in group["params"]]
            self.register_optimizer(module_id=module_id, optimizer=made, params=params)

    return Configured


def moments(learner: Any, optimizer: str = "default_optimizer", key: str = "exp_avg") -> dict[str, torch.Tensor]:
    """By the name of the parameter, found by the parameter itself."""
    state = learner.get_optimizer(MID, optimizer).state
    return {name: state[p][key] for name, p in learner.module[MID].unwrapped().named_parameters() if p in state}


def test_moments_go_to_their_parameters_though_the_order_is_another() -> None:
    learner = build(DTYPES)
    train(learner, DTYPES, 3)
    turned = configured(lambda m: torch.optim.AdamW(
        [{"params": [m.again.weight, m.body.bias, m.body.weight]}, {"params": [m.scale, m.head.bias, m.head.weight]}]
    ))  # fmt: skip
    other = build(DTYPES, 1, learner_class=turned)

    set_learner(other, learner_tree(learner))

    assert moments(other).keys() == moments(learner).keys()
    assert all(torch.equal(value, moments(learner)[name]) for name, value in moments(other).items())
    groups = other.get_optimizer(MID).param_groups
    assert [group["lr"] for group in groups] == [0.02, 0.01]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.01]
    assert groups[0]["params"][0] is other.module[MID].unwrapped().again.weight


def test_all_of_sacs_optimizers_and_the_temperature(tmp_path: Path) -> None:
    learner, other = build(SAC), build(SAC, 1)
    train(learner, SAC, 3)
    tree = optimizers_tree(learner, MID)
    assert list(tree) == ["qf", "qf_twin", "policy", "alpha"]
    assert tree["alpha"]["param_groups"][0]["params"] == [".learner.curr_log_alpha"]
    assert list(own_state(tree)) == ["alpha"]
    temperature = other.curr_log_alpha[MID]
    Checkpointer(str(tmp_path)).save_state(0, learner_tree(learner)).result()

    set_learner(other, Checkpointer(str(tmp_path)).load_state())

    assert other.curr_log_alpha[MID] is temperature  # the optimizer knows this one
    assert other.curr_log_alpha[MID].requires_grad
    assert torch.equal(temperature, learner.curr_log_alpha[MID])
    assert torch.equal(
        other.get_optimizer(MID, "alpha").state[temperature]["exp_avg"],
        learner.get_optimizer(MID, "alpha").state[learner.curr_log_alpha[MID]]["exp_avg"],
    )
    assert all(torch.equal(v, moments(learner, "policy")[k]) for k, v in moments(other, "policy").items())


def test_state_keeps_a_dtype_that_is_not_its_parameters() -> None:
    learner, other = build(DTYPES), build(DTYPES, 1)
    train(learner, DTYPES, 2)
    for state in learner.get_optimizer(MID).state.values():
        state["exp_avg"] = state["exp_avg"].to(torch.float32) + 1e-4

    set_learner(other, learner_tree(learner))

    found = moments(other)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert all(torch.equal(value, moments(learner)[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), ["class torch.optim.adamw:AdamW was saved, torch.optim"]),
        (lambda m: torch.optim.AdamW(m.parameters()), ["2 parameter groups were saved, 1 are here"]),
        (
            lambda m: torch.optim.AdamW([{"params": [m.scale]}, {"params": [m.head.bias, m.body.bias]}]),
            ["parameter group 0 has parameters that are not in the checkpoint: ['scale']",
             "parameter group 1 of the checkpoint has parameters that are not here: ['scale', 'head.weight']"],
        ),
    ],
)  # fmt: skip
def test_an_optimizer_that_does_not_fit(other: Any, said: list[str]) -> None:
    tree = optimizers_tree(build(DTYPES), MID)
    learner = build(DTYPES, 1, learner_class=configured(other))

    found = "\n".join(optimizers_problems(learner, MID, tree))

    assert all(f"optimizer 'default_optimizer': {text}" in found for text in said), found


def test_missing_and_unexpected_optimizers_list_both_sides() -> None:
    learner = build(SAC)
    tree = optimizers_tree(learner, MID)
    tree["more"] = tree.pop("qf_twin")

    assert optimizers_problems(learner, MID, tree) == [
        "optimizers not in the checkpoint: ['qf_twin']; it has ['qf', 'policy', 'alpha', 'more']",
        "optimizers in the checkpoint but not here: ['more']; here are ['qf', 'qf_twin', 'policy', 'alpha']",
    ]


def test_a_parameter_that_nobody_knows_is_kept_with_its_value(tmp_path: Path) -> None:
    def with_more(module: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam([*module.parameters(), torch.nn.Parameter(torch.rand(3))])

    learner, other = (build(DTYPES, seed, learner_class=configured(with_more)) for seed in (0, 1))
    mine, its = (list(x.get_optimizer(MID).param_groups[0]["params"])[-1] for x in (learner, other))
    learner.get_optimizer(MID).state[mine] = adams(mine, 1)
    assert not torch.equal(mine, its)
    Checkpointer(str(tmp_path)).save_state(0, optimizers_tree(learner, MID)).result()

    set_optimizers(other, MID, Checkpointer(str(tmp_path)).load_state())

    assert torch.equal(mine, its)
    assert other.get_optimizer(MID).state[its]["exp_avg"].tolist() == [1, 1, 1]


def adams(parameter: torch.Tensor, value: float) -> dict[str, torch.Tensor]:
    """State as Adam has it, with a mean that tells whose it is."""
    zeros = torch.zeros_like(parameter, requires_grad=False)
    return {"step": torch.tensor(1.0), "exp_avg": zeros + value, "exp_avg_sq": zeros}


class TwoOverAll(PPO.config().learner_class):  # type: ignore[misc]
    """One optimizer for all policies together."""

    def configure_optimizers(self) -> None:
        params = [p for module in self.module.values() for p in module.parameters()]
        self.register_optimizer(optimizer=torch.optim.Adam(params), params=params, lr_or_lr_schedule=0.01)


def test_an_optimizer_of_all_policies() -> None:
    case: Case = next(case for case in CASES if case.name == "ppo-multi")
    learner, other = (build(case, seed, learner_class=TwoOverAll) for seed in (0, 1))
    optimizer = learner._named_optimizers[f"{ALL_MODULES}_default_optimizer"]
    for group in optimizer.param_groups:
        for at, parameter in enumerate(group["params"]):
            optimizer.state[parameter] = adams(parameter, at)
    tree = learner_tree(learner)
    names = tree["learner"]["optimizers"]["default_optimizer"]["param_groups"][0]["params"]
    assert {tuple(name.split(".")[:3]) for name in names} == {("", "policies", "a--b"), ("", "policies", "a_b")}
    assert tree["policies"]["a_b"]["optimizers"] == {}

    set_learner(other, tree)

    ours = other._named_optimizers[f"{ALL_MODULES}_default_optimizer"].state_dict()["state"]
    assert [state["exp_avg"].flatten()[0].item() for state in ours.values()] == list(range(len(names)))


def _milestones(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.5)


def scheduled(*schedulers: Any) -> Case:
    """Trains with torch's lr schedulers, which RLlib makes at the first update and never saves."""
    return Case("scheduled", lambda: DTYPES.config().experimental(_torch_lr_scheduler_classes=list(schedulers)))


def test_torchs_lr_schedulers_go_on(tmp_path: Path) -> None:
    case = scheduled(_milestones)
    learner, other, fresh = build(case), build(case, 1), build(case)
    untrained = learner_tree(fresh)["policies"][MID]["optimizers"]
    train(learner, case, 3)
    tree = optimizers_tree(learner, MID)
    assert tree["default_optimizer"]["schedulers"][0]["class"].endswith(":MultiStepLR")
    Checkpointer(str(tmp_path)).save_state(0, learner_tree(learner)).result()

    set_learner(other, Checkpointer(str(tmp_path)).load_state())
    rates = [[group["lr"] for group in x.get_optimizer(MID).param_groups] for x in (learner, other)]
    train(learner, case, 2, start=3)
    train(other, case, 2, start=3)
    later = [[group["lr"] for group in x.get_optimizer(MID).param_groups] for x in (learner, other)]

    (scheduler,) = other._lr_schedulers[MID][f"{MID}_default_optimizer"]
    assert list(scheduler.milestones.elements()) == [2, 4]  # a Counter, which is no plain data
    assert rates[0] == rates[1] == [0.01, 0.005]
    assert later[0] == later[1] == [0.005, 0.0025]

    set_optimizers(other, MID, untrained)
    train(other, case, 3)
    assert [group["lr"] for group in other.get_optimizer(MID).param_groups] == rates[0]


def test_torchs_lr_scheduler_counts_and_not_the_fixed_rate() -> None:
    case = Case("ppo", lambda: PPO.config().experimental(_torch_lr_scheduler_classes=[_milestones]))
    learner, other = build(case), build(case, 1)
    train(learner, case, 3)

    set_learner(other, learner_tree(learner))

    assert other.get_optimizer(MID).param_groups[0]["lr"] == 1.5e-3


def test_another_lr_scheduler_does_not_fit() -> None:
    case = scheduled(_milestones)
    learner = build(case)
    train(learner, case, 1)
    other = build(scheduled(functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)), 1)

    found = optimizers_problems(other, MID, optimizers_tree(learner, MID))

    assert found == [
        "optimizer 'default_optimizer': lr schedulers ['torch.optim.lr_scheduler:MultiStepLR'] were saved, "
        "['torch.optim.lr_scheduler:ExponentialLR'] are configured here"
    ]


def test_a_fixed_learning_rate_is_the_configs_from_the_first_update_on() -> None:
    learner, other = build(PPO), build(PPO, lr=0.125)
    train(learner, PPO, 1)

    set_learner(other, learner_tree(learner))

    assert learner.get_optimizer(MID).param_groups[0]["lr"] == 3e-3
    assert other.get_optimizer(MID).param_groups[0]["lr"] == 0.125


def test_a_scheduled_learning_rate_is_where_it_was() -> None:
    case = Case("ppo", lambda: PPO.config().training(lr=[[0, 1e-2], [1000, 1e-3]]), update=PPO.update)
    learner, other = build(case), build(case, 1)
    train(learner, case, 3)
    rate = learner.get_optimizer(MID).param_groups[0]["lr"]

    set_learner(other, learner_tree(learner))

    assert rate < 1e-2
    assert other.get_optimizer(MID).param_groups[0]["lr"] == rate


def test_state_that_is_no_data_is_named() -> None:
    learner = build(DTYPES)
    learner.get_optimizer(MID).param_groups[0]["hook"] = object()

    with pytest.raises(
        InvalidInputError, match=r"optimizer 'default_optimizer' of policy 'default_policy' can't be saved"
    ):
        optimizers_tree(learner, MID)


def test_no_entry_is_made_for_a_policy_without_optimizers() -> None:
    learner = build(PPO)

    assert optimizers_tree(learner, ALL_MODULES) == {}
    assert ALL_MODULES not in learner._module_optimizers


def test_state_of_other_forms() -> None:
    def both(module: DtypesModule) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

    learner, other = (build(DTYPES, seed, learner_class=configured(both)) for seed in (0, 1))
    first = next(iter(learner.get_optimizer(MID).param_groups[0]["params"]))
    learner.get_optimizer(MID).state[first] = {"momentum_buffer": None, "old_dirs": [torch.ones(2)], "func_evals": 3}

    set_optimizers(other, MID, optimizers_tree(learner, MID))

    its = next(iter(other.get_optimizer(MID).param_groups[0]["params"]))
    state = other.get_optimizer(MID).state[its]
    assert (state["momentum_buffer"], state["func_evals"]) == (None, 3)
    assert state["old_dirs"][0].tolist() == [1, 1]
