"""One Ray for each file, with more logical CPUs than cores: RLlib's actors each want one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="module")
def ray_small() -> Iterator[None]:
    """A cluster of one node, connected."""
    ray.init("local", num_cpus=16, include_dashboard=False, object_store_memory=200 << 20, logging_level="ERROR")
    yield
    ray.shutdown()
