"""Clusters for the tests in this folder: one for each file, as starting Ray costs seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.ray.holders import one_node, several_nodes


@pytest.fixture(scope="module")
def ray_node() -> Iterator[None]:
    """A cluster of one node, connected."""
    with one_node():
        yield


@pytest.fixture(scope="module")
def three_nodes(_no_aws_settings_from_outside: None) -> Iterator[Any]:
    """A cluster of three nodes on this machine, connected."""
    with several_nodes(3) as cluster:
        yield cluster
