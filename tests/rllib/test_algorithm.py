"""What an Algorithm's own process holds beside learner and runners: callbacks' state, connectors of all runners."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.connectors.env_to_module.mean_std_filter import MeanStdFilter

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.rllib import AlgorithmCheckpointer, checkpointing, load, restore, save
from tests.rllib.small import Pairs, agent_is_policy, built, dqn_config, impala_config, ppo_config


class Steps(RLlibCallback):
    """A user's callback that counts."""

    def __init__(self) -> None:
        self.n = 0

    def get_state(self) -> dict[str, Any]:
        return {"n": self.n}

    def set_state(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


def test_a_callback_gets_its_own_state_wherever_it_stands(ray_small: None, tmp_path: Path) -> None:
    with built(ppo_config().callbacks([Steps, Steps])) as algo:
        algo.callbacks[0].n, algo.callbacks[1].n = 5, 6
        save(algo, str(tmp_path / "run"))
    later = [checkpointing(str(tmp_path / "other")), Steps, Steps]
    with built(ppo_config().callbacks(later)) as algo:
        report = restore(algo, str(tmp_path / "run"))
        assert [callback.n for callback in algo.callbacks[1:]] == [5, 6]
    assert report.notices == ("callback CheckpointCallback has no state in the checkpoint and keeps its own",)
    with built(ppo_config().callbacks(Steps)) as algo:
        report = restore(algo, str(tmp_path / "run"))
        assert algo.callbacks[0].n == 5
    assert report.notices == ("the state of callback Steps#2 in the checkpoint has no such callback here",)


def mean_std(*_args: Any, **_more: Any) -> Any:
    return MeanStdFilter()


def filtered(local: bool) -> PPOConfig:
    """Observations are normalised by what one remote runner has seen."""
    config = ppo_config().env_runners(num_env_runners=1, create_local_env_runner=local)
    return config.env_runners(env_to_module_connector=mean_std)


def statistics(algo: Any) -> Any:
    """What RLlib gives to the runners next."""
    pipeline = algo.env_to_module_connector if algo.env_runner is None else algo.env_runner._env_to_module
    return pipeline.get_state()["MeanStdFilter"]


@pytest.mark.parametrize("was_local", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_what_all_runners_have_seen_is_restored_without_a_local_runner(
    was_local: bool, ray_small: None, tmp_path: Path
) -> None:
    with built(filtered(was_local)) as algo:
        algo.train()
        save(algo, str(tmp_path))
        expected = statistics(algo)
    with built(filtered(False)) as again:
        fresh = statistics(again)
        restore(again, str(tmp_path))
        assert statistics(again) == expected != fresh


def to_p0(agent: Any, episode: Any = None, **_more: Any) -> str:
    """All agents act by one policy."""
    return "p0"


def test_a_buffer_with_steps_of_policies_that_are_left_out_is_left_out_too(ray_small: None, tmp_path: Path) -> None:
    config = dqn_config().environment(Pairs, env_config={"agents": 2})
    config.multi_agent(policies=["p0", "p1"], policy_mapping_fn=agent_is_policy)
    buffer = {"type": "MultiAgentPrioritizedEpisodeReplayBuffer", "capacity": 1000, "alpha": 0.5, "beta": 0.5}
    with built(config.training(replay_buffer_config=buffer)) as algo, AlgorithmCheckpointer(str(tmp_path)) as ckpt:
        algo.train()
        ckpt.save(algo).result()
        part = ckpt.load(policies=["p0"], policy_mapping_fn=to_p0)
        assert part.local_replay_buffer.get_num_timesteps() == 0
        assert any("['p1'], which are left out" in text for text in ckpt.last_restore.notices)
        part.train()  # by itself, with RLlib's own checks of every batch
        assert list(part.local_replay_buffer._module_to_indices) == ["p0"]
        part.stop()


class Own(PPO):
    """A user's Algorithm, for the config of RLlib's."""


@pytest.mark.parametrize("has_name", [True, False])
def test_load_builds_the_class_that_was_saved(has_name: bool, ray_small: None, tmp_path: Path) -> None:
    class Nameless(PPO):
        pass

    config = ppo_config()
    config.algo_class = cls = Own if has_name else Nameless
    with built(config) as algo:
        algo.train()
        save(algo, str(tmp_path))
    if not has_name:
        with pytest.raises(InvalidInputError, match="algo_class: the class Nameless, made inside"):
            load(str(tmp_path))
    algo = load(str(tmp_path), given={} if has_name else {"algo_class": Nameless})
    assert type(algo) is cls
    assert algo.iteration == 1
    algo.stop()


def test_a_checkpoint_of_another_class_is_told_though_all_of_it_fits(ray_small: None, tmp_path: Path) -> None:
    impala = impala_config().env_runners(num_env_runners=0).learners(num_learners=0)
    with built(impala) as algo:
        save(algo, str(tmp_path))
    with built(ppo_config()) as algo:
        report = restore(algo, str(tmp_path))
    assert report.notices == (
        "the checkpoint is of the class ray.rllib.algorithms.impala.impala:IMPALA, and this Algorithm is of "
        "ray.rllib.algorithms.ppo.ppo:PPO; all that was saved fits",
    )


class Evaluating:
    """What of an offline evaluation's runner counts here."""

    _weights_seq_no = 3

    def number(self) -> int:
        return self._weights_seq_no


def test_offline_evaluation_takes_restored_weights_though_their_number_is_smaller(
    ray_small: None, tmp_path: Path
) -> None:
    actor = ray.remote(Evaluating).remote()
    group = SimpleNamespace(local_runner=Evaluating(), _worker_manager=SimpleNamespace(actors=lambda: {1: actor}))
    with built(ppo_config()) as algo:
        save(algo, str(tmp_path))
        algo.offline_eval_runner_group = group
        restore(algo, str(tmp_path))
        del algo.offline_eval_runner_group
    assert group.local_runner.number() == 0, "which RLlib takes for: has no weights"
    assert ray.get(actor.number.remote()) == 0
