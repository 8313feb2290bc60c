"""Environment runners: after a restore they sample what they would have sampled."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("ray.rllib")

import torch
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from rl_ckpt import Checkpointer
from rl_ckpt.rllib.data import from_data
from rl_ckpt.rllib.packing import pack
from rl_ckpt.rllib.runner import runner_parts, runner_problems, runner_tree, set_runner
from tests.rllib.runner_cases import (
    CASES,
    SEQ_NO,
    Pictures,
    known_ids,
    restore,
    runner_of,
    sample,
    sampled,
    save,
    weights_of,
)
from tests.rllib.same import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:gymnasium")  # RLlib registers its environment anew

ROOT = Path(__file__).resolve().parents[2]
SAVABLE = [case for case in CASES if case != "unsavable"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By case: the url, ids of running episodes, what the runner sampled after the save, and the runner."""
    found = {}
    for case, config in CASES.items():
        runner = runner_of(config())
        sampled(runner, [], 3)
        sample(runner)  # and nobody has asked for its metrics yet
        url = str(tmp_path_factory.mktemp("runs") / case)
        save(url, runner)
        known = known_ids(runner)
        found[case] = (url, known, sampled(runner, known), runner)
    return found


@pytest.fixture(scope="module")
def fresh(saved: dict[str, Any]) -> dict[str, Any]:
    """By case: notices, and what a runner in another process sampled after the restore."""
    cases = json.dumps({case: (url, known) for case, (url, known, _, _) in saved.items()})
    command = [sys.executable, "-m", "tests.rllib.runner_cases", cases]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", SAVABLE)
def test_a_fresh_process_goes_on_bit_for_bit(case: str, saved: dict[str, Any], fresh: dict[str, Any]) -> None:
    notices, samples = fresh[case]
    assert notices == []
    assert samples == saved[case][2]


@pytest.mark.parametrize("case", SAVABLE)
def test_rollback_in_place_goes_on_bit_for_bit(case: str, saved: dict[str, Any]) -> None:
    url, known, samples, runner = saved[case]
    assert restore(url, runner) == []
    assert sampled(runner, known) == samples


def test_an_environment_without_state_starts_anew_and_says_so(saved: dict[str, Any], fresh: dict[str, Any]) -> None:
    url, known, _, runner = saved["unsavable"]
    notices = restore(url, runner)
    assert notices == fresh["unsavable"][0]
    assert len(notices) == 1
    assert "Unsavable has no get_state() and set_state(state); after a restore, running episodes are drop" in notices[0]
    assert known_ids(runner) == []
    first = runner.sample(num_timesteps=10)
    assert not set(known) & {chunk.id_ for chunk in first}
    assert all(chunk.t_started == 0 for chunk in first)


def test_a_seeded_runner_that_starts_anew_does_not_replay_the_start(tmp_path: Path) -> None:
    start = runner_of(CASES["unsavable"]()).sample(num_timesteps=4)
    runners = [runner_of(CASES["unsavable"]()) for _ in range(2)]
    runners[0].num_env_steps_sampled_lifetime = 1  # as RLlib's synchronisation sets it
    save(str(tmp_path), runners[0])
    again = []
    for runner in runners:
        restore(str(tmp_path), runner)
        again.append(runner.sample(num_timesteps=4)[0].get_observations(0))
    assert np.array_equal(again[0], again[1])  # the same at every restore of this checkpoint
    assert not np.array_equal(again[0], start[0].get_observations(0))


@pytest.mark.parametrize("case", ["filters", "agents"])
def test_another_runner_takes_connectors_and_counters_alone(case: str, saved: dict[str, Any]) -> None:
    url, known, _, _ = saved[case]
    runner = runner_of(CASES[case]())
    before = random.getstate()
    assert restore(url, runner, own=False) == []
    assert random.getstate() == before
    assert known_ids(runner) == []
    tree, theirs = runner_tree(runner), loaded(url)["env_runners"][1]
    assert_same(tree["connectors"], theirs["connectors"])
    assert tree["counters"] == theirs["counters"]
    assert sampled(runner, known)


def test_each_of_two_filters_has_its_own_statistics(saved: dict[str, Any]) -> None:
    connectors = loaded(saved["filters"][0])["env_runners"][1]["connectors"]["env_to_module"]
    assert list(connectors) == ["MeanStdFilter", "MeanStdFilter#2"]
    first, second = (from_data(connectors[name])[None]["running_stats"][0]["mean_array"] for name in connectors)
    assert first.dtype == np.float64
    assert not np.array_equal(first, second)


def without_filter() -> Any:
    return CASES["filters"]().env_runners(env_to_module_connector=None)


def wider() -> Any:
    return CASES["plain"]().rl_module(model_config={"fcnet_hiddens": [9]})


@pytest.mark.parametrize(
    ("case", "config", "said"),
    [
        ("filters", without_filter, r"environment runner 1, env_to_module: .* a connector MeanStdFilter, and there is"),
        ("plain", wider, r"environment runner 1, policy .*encoder.*: shape \(8, 4\) was saved, \(9, 4\) is here"),
        ("plain", CASES["agents"], r"it is a multi-agent runner, and the checkpoint's was single-agent"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_changes(
    case: str, config: Any, said: str, saved: dict[str, Any]
) -> None:
    tree, runner = loaded(saved[case][0]), runner_of(config())
    weights = {name: policy["module"] for name, policy in tree["policies"].items()}
    before = runner_tree(runner)
    problems = runner_problems(runner, tree["env_runners"][1], weights)
    assert re.search(said, "\n".join(problems)), problems
    assert_same(runner_tree(runner), before)


def test_weights_of_another_dtype_or_name_do_not_fit(saved: dict[str, Any]) -> None:
    runner = saved["plain"][3]
    weights = {name: tensor.double() for name, tensor in weights_of(runner)["default_policy"].items()}
    problems = "\n".join(runner_problems(runner, {}, {"default_policy": weights}))
    assert "dtype float64 was saved, float32 is here" in problems
    weights.pop(first := next(iter(weights)))
    assert f"not in the checkpoint: '{first}'" in "\n".join(runner_problems(runner, {}, {"default_policy": weights}))


def test_another_number_of_environments_starts_anew(saved: dict[str, Any]) -> None:
    runner = runner_of(CASES["plain"]().env_runners(num_envs_per_env_runner=3))
    notices = restore(saved["plain"][0], runner)
    assert len(notices) == 1
    assert "it has 3 environments, and had 2; running episodes are dropped" in notices[0]
    assert sampled(runner, [])


def test_running_episodes_of_a_policy_that_is_gone_are_dropped(saved: dict[str, Any]) -> None:
    config = CASES["turns"]().multi_agent(policies={"even"}, policy_mapping_fn=lambda agent, episode, **_: "even")
    spec = MultiRLModuleSpec(rl_module_specs={"even": RLModuleSpec()})
    runner = runner_of(config.rl_module(rl_module_spec=spec))
    tree = loaded(saved["turns"][0])
    notices = set_runner(runner, tree["env_runners"][1], {"even": tree["policies"]["even"]["module"]}, SEQ_NO)
    assert len(notices) == 1
    assert "running episodes use the policies ['odd'], which are not here; running episodes are dropped" in notices[0]
    assert sampled(runner, [])


class Angry(Pictures):
    """Takes no state back."""

    def set_state(self, state: Any) -> None:
        raise OSError("not today")


def test_an_environment_that_refuses_its_state_is_made_anew(saved: dict[str, Any]) -> None:
    runner = runner_of(CASES["stack"]().environment(Angry))
    tree = loaded(saved["stack"][0])["env_runners"][1]
    parts = runner_parts(tree)
    rename(parts["env"], "Pictures", "Angry")
    tree["packed"] = pack(parts)
    made = runner.env
    notices = set_runner(runner, tree, None, None)
    assert notices == [
        "environment runner 1: the environment raised OSError: not today; running episodes are dropped and the "
        "environments are reset before the first sample"
    ]
    assert runner.env is not made
    assert sampled(runner, [])


class Seen(RLlibCallback):
    """Looks at the chunks that were returned already."""

    lengths: ClassVar[list[list[int]]] = []

    def on_episode_end(self, **kwargs: Any) -> None:
        Seen.lengths.append([len(chunk.get_observations()) for chunk in kwargs["prev_episode_chunks"]])


def test_callbacks_see_whole_chunks(tmp_path: Path) -> None:
    config = CASES["plain"]().callbacks(Seen)
    runner = runner_of(config)
    sampled(runner, [], 3)
    save(str(tmp_path), runner)
    Seen.lengths.clear()
    sampled(runner, [])
    expected = list(Seen.lengths)
    assert any(lengths for lengths in expected)
    other = runner_of(config)
    assert restore(str(tmp_path), other) == []
    Seen.lengths.clear()
    sampled(other, [])
    assert expected == Seen.lengths


def test_chunks_that_only_metrics_want_are_saved_without_observations(saved: dict[str, Any]) -> None:
    chunks = runner_parts(loaded(saved["plain"][0])["env_runners"][1])["episodes"]["chunks"]
    assert chunks
    assert all("observations" not in chunk for of_episode in chunks.values() for chunk in of_episode)


def test_a_runner_without_environment_is_saved_too(tmp_path: Path) -> None:
    config = CASES["filters"]().env_runners(num_env_runners=1)
    runner = SingleAgentEnvRunner(config=config, worker_index=0, spaces=runner_of(CASES["filters"]()).get_spaces())
    assert runner.env is None
    save(str(tmp_path), runner)
    assert restore(str(tmp_path), runner) == []


class Sparse(Pictures):
    """Gives a tensor that no checkpoint takes."""

    def get_state(self) -> dict[str, Any]:
        return {"sparse": torch.zeros(2).to_sparse()}


def test_an_array_that_no_checkpoint_takes_costs_the_episodes_alone(tmp_path: Path) -> None:
    runner = runner_of(CASES["stack"]().environment(Sparse))
    runner.sample(num_timesteps=4)
    save(str(tmp_path), runner)
    (notice,) = restore(str(tmp_path), runner)
    assert "a torch tensor of layout torch.sparse_coo" in notice
    assert "running episodes are dropped" in notice


def loaded(url: str) -> Any:
    with Checkpointer(url) as ckpt:
        return ckpt.load_state()


def rename(env: Any, old: str, new: str) -> None:
    """Makes a saved environment one of another class."""
    for layer in env["layers"]:
        layer["class"] = layer["class"].replace(old, new)
        for inner in layer.get("envs", ()):
            rename(inner, old, new)
