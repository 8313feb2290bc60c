"""Clusters for the tests in this folder, one for each file, as starting Ray costs seconds; and a store that waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.ray.gated_s3 import Gate, run_gated
from tests.ray.holders import one_node, several_nodes
from tests.s3_servers import S3Server


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


@pytest.fixture
def gate(moto_server: S3Server) -> Iterator[Gate]:
    """An S3 server that does not take shard files while the test has closed its gate."""
    with run_gated(moto_server) as made:
        yield made
