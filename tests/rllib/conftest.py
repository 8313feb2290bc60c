"""One Ray for each file, with more logical CPUs than cores: RLlib's actors each want one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ray_small() -> Iterator[None]:
    """A cluster of one node, connected."""
    ray.init(
        "local",
        num_cpus=16,
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
        _system_config={"prestart_worker_first_driver": False},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """For torch here, as in Ray's workers: tiny nets on several threads mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every process that imports RLlib takes seconds to start: on two busy cores, tests with several take minutes."""
    for item in items:
        if item.path.is_relative_to(HERE) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600))
