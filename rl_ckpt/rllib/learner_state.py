"""What RLlib's learners hold beside modules and optimizers, and leave out of their own `get_state`.

By policy, in attributes of the learner that map policy ids to values:

| Learner | Attribute | What |
|---|---|---|
| PPO, APPO | `curr_kl_coeffs_per_module` | the adaptive KL coefficient |
| PPO, IMPALA, APPO | `entropy_coeff_schedulers_per_module` | the scheduled entropy coefficient |
| DQN, SAC, TQC, CQL, IQL | `last_update_ts_by_mid` | the timestep of the last update of the target networks |
| APPO | `_last_update_ts_by_mid` | the same, in trained steps |
| SAC, TQC, CQL | `curr_log_alpha` | the temperature, a parameter of an optimizer of its own |
| MARWIL | `moving_avg_sqd_adv_norms_per_module` | moving average of squared advantages |
| all | `_grad_scalers` | torch's loss scaling |

Attributes of that form of the user's own learners are kept in the same way. SAC's `target_entropy` and IQL's
`expectile` and `temperature` are not: they are the config's. What a learner's class adds to `get_state` is kept too.

Not kept: batches that wait in the queues of IMPALA's and APPO's learner threads (learner_threads.py), and the position
of offline learners in their dataset (`iterator`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from ray.rllib.core import COMPONENT_METRICS_LOGGER, COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO
from ray.rllib.utils.schedules.scheduler import Scheduler

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.rllib.data import UnsavableError, from_data, to_data

_SCALERS = "_grad_scalers"
_NOT_STATE = frozenset((
    "_learner_state", "_lr_schedulers", "_module_optimizers", "_named_optimizers", "_optimizer_lr_schedules",
    "_optimizer_name_to_module", "_optimizer_parameters", "_params", "_temp_losses", "_update_kwargs", _SCALERS,
    "expectile", "target_entropy", "temperature",
))  # fmt: skip
_SCALARS = (bool, int, float, str, np.generic, np.ndarray, torch.Tensor)
_OWN_STATE = frozenset(("should_module_be_updated", WEIGHTS_SEQ_NO))
_COMPONENTS = [COMPONENT_RL_MODULE, COMPONENT_OPTIMIZER, COMPONENT_METRICS_LOGGER]


def policy_state(learner: TorchLearner, policy: str) -> dict[str, Any]:
    """What the learner holds for one policy, by attribute: tensors by reference, numbers, or a scaler's state.

    A value that RLlib has not made yet (it makes them at the first use) is left out.
    """
    tree: dict[str, Any] = {}
    for name, values in _attributes(learner):
        value = values.get(policy)  # makes no default, unlike values[policy]
        if isinstance(value, Scheduler):
            if value.use_schedule:
                current: Any = value.get_current_value()
                tree[name] = current.detach()
        elif isinstance(value, torch.Tensor):
            tree[name] = value.detach()
        elif isinstance(value, _SCALARS):
            tree[name] = value
    scaler = (learner._grad_scalers or {}).get(policy)
    if scaler is not None:
        tree[_SCALERS] = scaler.state_dict()
    return tree


def policy_state_problems(learner: TorchLearner, policy: str, tree: Mapping[str, Any]) -> list[str]:
    """What of it does not fit; nothing is changed."""
    problems = []
    attributes = dict(_attributes(learner, tree))
    for name, saved in tree.items():
        if name == _SCALERS:
            if learner._grad_scalers is None:
                problems.append("loss scaling was saved, and none is configured here (`_torch_grad_scaler_class`)")
        elif name not in attributes:
            problems.append(f"{name!r} was saved, and {type(learner).__qualname__} has no such attribute by policy")
        else:
            here = attributes[name].get(policy)
            here = here.get_current_value() if isinstance(here, Scheduler) and here.use_schedule else here
            if isinstance(here, torch.Tensor) and (
                not isinstance(saved, torch.Tensor) or saved.shape != here.shape or saved.dtype != here.dtype
            ):
                problems.append(f"{name!r}: {_text(saved)} was saved, {_text(here)} is here")
    return problems


def set_policy_state(learner: TorchLearner, policy: str, tree: Mapping[str, Any]) -> None:
    """Puts it back. Only after `policy_state_problems` found nothing.

    What was not saved had its first value, and gets it again.
    """
    for name, values in _attributes(learner, tree):
        if name in tree:
            _set(values, policy, tree[name])
        elif isinstance(values, defaultdict) and not isinstance(values.get(policy), torch.nn.Parameter):
            values.pop(policy, None)
    if learner._grad_scalers is not None:
        learner._grad_scalers.pop(policy, None)
        if _SCALERS in tree:
            learner._grad_scalers[policy].load_state_dict(dict(tree[_SCALERS]))


def _set(values: dict[str, Any], policy: str, saved: Any) -> None:
    if policy not in values and isinstance(values, defaultdict):
        _ = values[policy]  # made by RLlib, on the right device
    here = values.get(policy)
    if isinstance(here, Scheduler):
        if here.use_schedule:  # else the coefficient is a fixed one of the config here
            current: Any = here.get_current_value()
            current.data = saved.clone().to(current.device)
    elif isinstance(here, torch.Tensor):
        here.data.copy_(saved)  # in place: an optimizer may know it
    else:
        values[policy] = from_data(saved)


def custom_state(learner: TorchLearner) -> dict[str, Any]:
    """What the learner's class adds to RLlib's `get_state`, as data.

    Raises:
        InvalidInputError: It is neither arrays nor plain data.
    """
    if type(learner).get_state is Learner.get_state:
        return {}
    state = learner.get_state(not_components=_COMPONENTS)
    try:
        data: dict[str, Any] = to_data({key: value for key, value in state.items() if key not in _OWN_STATE})
    except UnsavableError as why:
        raise InvalidInputError(
            f"what {type(learner).__qualname__}.get_state() adds can't be saved: {why}; give arrays and plain data"
        ) from why
    return data


def set_custom_state(learner: TorchLearner, tree: Mapping[str, Any]) -> None:
    """Puts that back, through the learner's own `set_state`."""
    if tree:
        # No "weights_seq_no" and no module in it, so that RLlib's part of the method does nothing.
        learner.set_state(from_data(dict(tree)))


def policies_to_train(learner: TorchLearner) -> Any:
    """Which policies the learner trains, as data: None (all), a list of ids, or the name of a function."""
    chosen: Any = learner.config.policies_to_train
    if chosen is None:
        return None
    if callable(chosen):
        return {"function": f"{getattr(chosen, '__module__', '?')}:{getattr(chosen, '__qualname__', repr(chosen))}"}
    return list(chosen) if isinstance(chosen, list | tuple) else sorted(chosen)


def _attributes(learner: TorchLearner, saved: Collection[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """The learner's attributes that map ids of policies to values, those in `saved` whatever they map here.

    Some still have entries of policies that were removed: DQN, SAC and APPO forget none.
    """
    policies = set(learner.module.keys())
    for name, values in vars(learner).items():
        if name not in _NOT_STATE and isinstance(values, dict):
            if values and name not in saved and policies.isdisjoint(values):
                continue
            yield name, values


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
