"""A learner on another node, and an object store: weights and optimizer are in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

import rl_ckpt
from rl_ckpt.rllib import AlgorithmCheckpointer
from tests.rllib.small import OwnModule, built, full_digest, ppo_config
from tests.s3_servers import S3Server

STORE_BYTES = 150 << 20


class Heavy(OwnModule, InferenceOnlyAPI):
    """With a tensor that only learners have."""

    def setup(self) -> None:
        super().setup()
        if not self.inference_only:
            self.ballast = torch.nn.Parameter(torch.arange(self.model_config["ballast"], dtype=torch.float32))

    def get_non_inference_attributes(self) -> list[str]:
        return ["ballast"]

    def get_state(self, *args: Any, inference_only: bool = False, **kwargs: Any) -> dict[str, Any]:
        state = super().get_state()
        return {name: value for name, value in state.items() if name != "ballast"} if inference_only else state

    def set_state(self, state: Any) -> None:
        self.load_state_dict(dict(state), strict=False)


def heavy_config(elements: int) -> Any:
    model = {"dtype": "float32", "ballast": elements}
    config = ppo_config().rl_module(rl_module_spec=RLModuleSpec(module_class=Heavy, model_config=model))
    return config.learners(num_learners=1, custom_resources_per_learner={"far": 1})


@pytest.fixture(scope="module")
def two_nodes(_no_aws_settings_from_outside: None) -> Iterator[None]:
    """A cluster of two nodes; learners run on the second."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 8, "object_store_memory": STORE_BYTES, "include_dashboard": False},
    )
    try:
        cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES, resources={"far": 2})
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def where(_learner: Any) -> str:
    return str(ray.get_runtime_context().get_node_id())


def look(learner: Any) -> Any:
    (optimizer,) = learner._named_optimizers.values()
    return [{k: v.sum().item() for k, v in state.items()} for state in optimizer.state.values()]


@pytest.mark.parametrize(
    "elements", [1 << 20, pytest.param(300 << 20, marks=[pytest.mark.soak, pytest.mark.timeout(900)])]
)
def test_a_learner_on_another_node_is_in_the_store(two_nodes: None, moto_server: S3Server, elements: int) -> None:
    url, options = f"s3://{moto_server.new_bucket()}/run", moto_server.storage_options()
    with built(heavy_config(elements)) as algo:
        (learner,) = algo.learner_group._worker_manager.actors().values()
        assert ray.get(learner.__ray_call__.remote(where)) != ray.get_runtime_context().get_node_id()
        algo.train()
        with AlgorithmCheckpointer(url, storage_options=options) as ckpt:
            info = ckpt.save(algo).result()
        full, moments = full_digest(algo), ray.get(learner.__ray_call__.remote(look))
    assert info.bytes > 4 * elements

    tree = rl_ckpt.Checkpointer(url, storage_options=options).load_state(select="policies/default_policy/optimizers")
    (optimizer,) = tree["policies"]["default_policy"]["optimizers"].values()
    assert len(optimizer["state"]) == len(moments)

    with AlgorithmCheckpointer(url, storage_options=options) as ckpt:
        loaded = ckpt.load()
        try:
            (learner,) = loaded.learner_group._worker_manager.actors().values()
            assert full_digest(loaded) == full
            assert ray.get(learner.__ray_call__.remote(look)) == moments
            assert ckpt.last_restore.bytes_from["store"] > 4 * elements
            loaded.train()
        finally:
            loaded.stop()
