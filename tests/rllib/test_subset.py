"""Some policies of many: an Algorithm with two of a hundred, one under another name, frozen ones that cost nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

import rl_ckpt
from rl_ckpt.format.manifest import ArrayRef, Manifest
from rl_ckpt.rllib import AlgorithmCheckpointer, load, restore, save
from tests.rllib.small import agent_is_policy, assert_all_hold, built, digests_of, full_digest, multi_config, ppo_config

MANY = 100
TRAINED = ("p3", "p42", "p99")


def only_first_two(agent: str, episode: Any = None, **_more: Any) -> str:
    return "p3" if int(agent[1:]) % 2 else "p42"


@pytest.fixture(scope="module")
def league(ray_small: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A hundred policies, of which three train; saved after each of three iterations."""
    url = str(tmp_path_factory.mktemp("league"))
    config = multi_config(MANY, train_batch_size_per_learner=20, minibatch_size=None)
    config.multi_agent(policies_to_train=list(TRAINED))
    with AlgorithmCheckpointer(url) as ckpt, built(config) as algo:
        infos = []
        for _ in range(3):
            algo.train()
            infos.append(ckpt.save(algo).result())
        optimizers = rl_ckpt.Checkpointer(url).load_state(select="policies/*/optimizers")
        return {
            "url": url,
            "infos": infos,
            "full": full_digest(algo),
            "one": digests_of(algo)["learner 0"],
            "opt": optimizers,
        }


def steps_of(algo: Any) -> dict[str, list[float]]:
    optimizers = algo.learner_group._learner._named_optimizers
    return {name: [float(state["step"]) for state in one.state.values()] for name, one in optimizers.items()}


def test_frozen_policies_cost_no_bytes_later(league: dict[str, Any]) -> None:
    first, second, third = league["infos"]
    tree = rl_ckpt.Checkpointer(league["url"]).load_state(select="policies/**")["policies"]
    assert len(tree) == MANY
    for info in (second, third):
        assert info.bytes_written - manifest_bytes(league["url"], info) < 0.5 * (
            first.bytes_written - manifest_bytes(league["url"], first)
        )
    first_files, last_files = (files_of_modules(league["url"], info) for info in (first, third))
    changed = {path for path, file in first_files.items() if last_files[path] != file}
    assert {path.split("/")[1] for path in changed} == set(TRAINED)  # of no other policy was a byte written again


def files_of_modules(url: str, info: rl_ckpt.CheckpointInfo) -> dict[str, Any]:
    """By path of a tensor of a module: the files, and places in them, where a checkpoint has its values."""
    manifest = msgspec.json.decode(next(Path(url).glob(f"manifests/{info.id}*")).read_bytes(), type=Manifest)
    out = {}
    for path, variants in manifest.nodes.items():
        node = variants[0].node
        if isinstance(node, ArrayRef) and path.startswith("policies/") and "/module/" in path:
            chunks = manifest.arrays[node.index].chunks
            out[path] = [(manifest.files[chunk.file].name, chunk.offset) for chunk in chunks]
    return out


def manifest_bytes(url: str, info: rl_ckpt.CheckpointInfo) -> int:
    return next(Path(url).glob(f"manifests/{info.id}*")).stat().st_size


def test_two_of_a_hundred(league: dict[str, Any]) -> None:
    algo = load(
        league["url"],
        policies=["p3", "p42"],
        policy_mapping_fn=only_first_two,
        given={"env_config": {"agents": 2}},
    )
    try:
        assert_all_hold(algo, {id_: league["one"][id_] for id_ in ("p3", "p42")})
        assert full_digest(algo) == {id_: league["full"][id_] for id_ in ("p3", "p42")}
        assert algo.iteration == 3
        assert set(steps_of(algo)) == {"p3_default_optimizer", "p42_default_optimizer"}
        assert all(step == 3.0 for steps in steps_of(algo).values() for step in steps)
        algo.train()
        assert full_digest(algo)["p3"] != league["full"]["p3"]
        assert full_digest(algo)["p42"] != league["full"]["p42"]
    finally:
        algo.stop()


def test_frozen_again_by_other_ids(league: dict[str, Any]) -> None:
    algo = load(
        league["url"],
        policies=["p3", "p42"],
        policy_mapping_fn=only_first_two,
        policies_to_train=["p42"],
        given={"env_config": {"agents": 2}},
    )
    try:
        algo.train()
        assert full_digest(algo)["p3"] == league["full"]["p3"]
        assert full_digest(algo)["p42"] != league["full"]["p42"]
    finally:
        algo.stop()


def test_one_policy_under_another_name(league: dict[str, Any]) -> None:
    with built(multi_config(3)) as algo:
        algo.train()
        algo.train()
        before = full_digest(algo)
        report = restore(algo, league["url"], policies={"p99": "p1"})
        assert dict(report.policies) == {"p99": "p1"}
        assert full_digest(algo) == {"p0": before["p0"], "p1": league["full"]["p99"], "p2": before["p2"]}
        assert algo.iteration == 2  # of this Algorithm, not the checkpoint's
        assert set(steps_of(algo)["p1_default_optimizer"]) == {3.0}
        everybody = digests_of(algo)
        assert all(copy["p1"] == league["one"]["p99"] for copy in everybody.values())
        algo.train()


def test_unknown_policies_list_the_known_ones(league: dict[str, Any], ray_small: None) -> None:
    with pytest.raises(
        rl_ckpt.InvalidInputError, match=r"no policies \['p100'\]; did you mean .*'p10'.* it has \['p0', 'p1'"
    ):
        load(league["url"], policies=["p1", "p100"], policy_mapping_fn=agent_is_policy)
    with pytest.raises(rl_ckpt.InvalidInputError, match="policy_mapping_fn"):
        load(league["url"], policies=["p1", "p2"])


def test_a_policy_id_may_hold_pattern_characters(ray_small: None, tmp_path: Path) -> None:
    ids = ["a[b]", "a*", "ab"]
    with built(multi_config(3).multi_agent(policies=ids, policy_mapping_fn=ByNumber(ids))) as algo:
        algo.train()
        save(algo, str(tmp_path))
        full = full_digest(algo)
    with built(multi_config(1)) as algo:
        for id_ in ids:
            restore(algo, str(tmp_path), policies={id_: "p0"})
            assert full_digest(algo) == {"p0": full[id_]}
    assert len(set(full.values())) == 3
    with built(ppo_config()) as algo, pytest.raises(rl_ckpt.InvalidInputError, match="shape"):
        restore(algo, str(tmp_path), policies={"a*": "default_policy"})


class ByNumber:
    def __init__(self, ids: list[str]) -> None:
        self.ids = ids

    def __call__(self, agent: str, episode: Any = None, **_more: Any) -> str:
        return self.ids[int(agent[1:])]
