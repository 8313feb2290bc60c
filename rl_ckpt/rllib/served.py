"""The env-runner state server of IMPALA and APPO: an actor from which env runners take weights whose number is larger.

Owns: replacing what it hands out after a restore. Left alone it would hand out the weights of before: in a rollback
their number is the larger one. Promises: what it hands out afterwards are the restored weights, in their own dtypes,
under the restored number, by the digest of what it gives back.
"""

from __future__ import annotations

from typing import Any

import ray
import torch
from ray.rllib.core import COMPONENT_RL_MODULE
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME, WEIGHTS_SEQ_NO

from rl_ckpt.errors import WorkerFailuresError
from rl_ckpt.rllib.modules import inference_tensors, tensors_digest
from rl_ckpt.rllib.team import AnyAlgorithm
from rl_ckpt.runtime.losses import in_one_line

_ANSWER_S = 120.0


def replace_served(algo: AnyAlgorithm) -> list[dict[str, str]]:
    """Gives the server the weights of the first learner.

    Returns:
        Digests by policy of what the server hands out now; empty where there is no server.

    Raises:
        WorkerFailuresError: The server or the learner is dead or does not answer.
    """
    server = getattr(algo, "_env_runner_state_server", None)
    if server is None:
        return []
    try:
        weights, number = _of_the_learner(algo)
        steps = algo.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0)
        state = {
            COMPONENT_RL_MODULE: weights,
            WEIGHTS_SEQ_NO: number,
            NUM_ENV_STEPS_SAMPLED_LIFETIME: int(steps),
        }
        ray.get(server.push.remote(state), timeout=_ANSWER_S)
        served = ray.get(server.pull.remote(), timeout=_ANSWER_S)
        modules = ray.get(served[COMPONENT_RL_MODULE], timeout=_ANSWER_S)
    except ray.exceptions.RayError as error:
        text = f"the env-runner state server or its learner does not answer: {in_one_line(error)}"
        raise WorkerFailuresError(f"the restore ended half-way: {text}. Restore again", {0: text}) from error
    return [{id_: tensors_digest(tensors) for id_, tensors in modules.items()}]


def _of_the_learner(algo: AnyAlgorithm) -> tuple[Any, int]:
    """A reference to the weights that act, and their number."""
    group = algo.learner_group
    if group._learner is not None:
        weights, number = _weights(group._learner)
        return ray.put(weights), number
    first = next(iter(group._worker_manager.actors().values()))
    call = first.__ray_call__.options(max_task_retries=0, num_returns=2)
    weights, number = call.remote(_weights)
    return weights, ray.get(number, timeout=_ANSWER_S)


def _weights(learner: Any) -> tuple[dict[str, dict[str, torch.Tensor]], int]:
    return {id_: inference_tensors(module) for id_, module in learner.module.items()}, learner._weights_seq_no
