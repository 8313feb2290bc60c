"""Fixtures that every test folder may use: S3 servers, started once per session and only where a test asks for one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.s3_servers import S3Server, ceph_is_installed, run_ceph, run_moto

pytest_plugins = ("tests.crash.points",)

# Before numpy and torch are there: their threads would fight over the cores with the file of tests that runs beside,
# and on matrices as small as these they cost thirty times as much as they do.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_AWS_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)


@pytest.fixture(scope="session", autouse=True)
def _no_aws_settings_from_outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The machine's own AWS settings reach no test, and nothing asks a metadata service for credentials."""
    empty = tmp_path_factory.mktemp("aws") / "empty"
    empty.touch()
    with pytest.MonkeyPatch.context() as patch:
        for variable in _AWS_VARIABLES:
            patch.delenv(variable, raising=False)
        patch.setenv("AWS_CONFIG_FILE", str(empty))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(empty))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Server]:
    """A moto S3 server."""
    with run_moto() as server:
        yield server


@pytest.fixture(scope="session")
def ceph_server() -> Iterator[S3Server]:
    """A Ceph object gateway; skips where it is not installed, unless RL_CKPT_REQUIRE_CEPH=1."""
    if not ceph_is_installed():
        message = "Ceph RGW is not installed (apt: radosgw ceph-mon ceph-osd ceph-common)"
        if os.environ.get("RL_CKPT_REQUIRE_CEPH") == "1":
            pytest.fail(message)
        pytest.skip(message)
    with run_ceph() as server:
        yield server


@pytest.fixture(scope="session", params=["moto", pytest.param("ceph", marks=pytest.mark.ceph)])
def s3_server(request: pytest.FixtureRequest) -> S3Server:
    """Each S3 server in turn."""
    server: S3Server = request.getfixturevalue(f"{request.param}_server")
    return server
