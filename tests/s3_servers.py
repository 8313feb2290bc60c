"""S3 servers for the tests, on loopback and on free ports: moto (from pip) and Ceph RGW (where it is installed).

Each is a real server in processes of its own, stopped by the ids of the processes that were started here. Ceph is
started as the compose file's S3 server is, by `cluster.ceph`.
"""

from __future__ import annotations

import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session

from cluster import ceph
from cluster.ceph import is_installed as ceph_is_installed
from cluster.processes import Processes, answers, free_port

__all__ = ["S3Server", "ceph_is_installed", "free_port", "run_ceph", "run_moto"]


@dataclass(frozen=True)
class S3Server:
    """A running server."""

    name: str
    endpoint_url: str
    key: str
    secret: str

    def storage_options(self, **more: Any) -> dict[str, Any]:
        """Options with which `open_store` reaches it."""
        return {"endpoint_url": self.endpoint_url, "key": self.key, "secret": self.secret, **more}

    def environment(self) -> dict[str, str]:
        """Environment variables with which every AWS tool reaches it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self) -> Any:
        """A plain botocore client: what the tests look behind the store with."""
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )

    def new_bucket(self) -> str:
        """Create a bucket of a new name."""
        bucket = f"test-{uuid.uuid4().hex[:16]}"
        self.client().create_bucket(Bucket=bucket)
        return bucket


@contextmanager
def run_moto() -> Iterator[S3Server]:
    """A moto server, empty; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="moto-") as folder, Processes(Path(folder)) as processes:
        port = free_port()
        processes.start("moto", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)])
        url = f"http://127.0.0.1:{port}"
        processes.wait_until(lambda: answers(f"{url}/moto-api/"), "moto answers")
        yield S3Server("moto", url, "testing", "testing")


@contextmanager
def run_ceph(*, store: str = "memstore", size_gb: int = 8) -> Iterator[S3Server]:
    """A Ceph object gateway with one monitor and one object server, empty; gone afterwards.

    Args:
        store: `memstore` keeps objects in memory, `bluestore` in a file.
        size_gb: Room for objects, in GiB. What is replaced or deleted is given back some seconds later only, and
            memstore does not stop at its limit: a load of many GiB can take all memory of the machine.
    """
    # Short: the path of a Unix socket, which the programs put into it, has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ceph-", dir="/tmp") as name, Processes(Path(name)) as processes:
        keys = "testaccess", "testsecret"
        server = ceph.Ceph(Path(name), free_port(), free_port(), *keys, store=store, size_gb=size_gb)
        ceph.start(server, processes)
        yield S3Server("ceph", f"http://127.0.0.1:{server.port}", *keys)
