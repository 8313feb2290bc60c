"""Processes that are started and killed, and the S3 server over its death and restart."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from cluster import ceph
from cluster.processes import Processes, free_port, kill_tree
from tests.s3_servers import S3Server

SLEEP = "import time; time.sleep(600)"
SLEEPER = [sys.executable, "-c", SLEEP]
FAMILY = f"import subprocess; print(subprocess.Popen({SLEEPER!r}).pid, flush=True); {SLEEP}"


def test_a_tree_is_killed_whole_and_nothing_beside_it() -> None:
    with (
        subprocess.Popen(SLEEPER) as beside,
        subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True) as parent,
    ):
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert kill_tree(parent.pid) == 2
        parent.wait()
        assert not psutil.pid_exists(child.pid) or child.wait(30) is None
        assert beside.poll() is None
        beside.kill()


def test_what_was_started_ends_with_the_block(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        pids = [processes.start(name, SLEEPER) for name in ("one", "two")]
        assert all(map(psutil.pid_exists, pids))
    assert not any(map(psutil.pid_exists, pids))


def test_waiting_ends_with_what_a_dead_process_said(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.start("one", [sys.executable, "-c", "import sys; sys.exit('no room')"])
        with pytest.raises(RuntimeError, match=r"waited for: rain; ended: \['one'\](.|\n)*no room"):
            processes.wait_until(lambda: False, "rain")


def test_a_command_that_fails_is_told_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no room"):
        Processes(tmp_path).call(sys.executable, "-c", "import sys; sys.exit('no room')")


@pytest.mark.ceph
def test_the_s3_server_has_everything_after_it_was_killed() -> None:
    if not ceph.is_installed() and os.environ.get("RL_CKPT_REQUIRE_CEPH") != "1":
        pytest.skip("Ceph RGW is not installed (apt: radosgw ceph-mon ceph-osd ceph-common)")
    with tempfile.TemporaryDirectory(prefix="ceph-", dir="/tmp") as name:
        made = ceph.Ceph(Path(name), free_port(), free_port(), "somekey", "somesecret", size_gb=2)
        server = S3Server("ceph", f"http://127.0.0.1:{made.port}", made.key, made.secret)
        with Processes(made.folder) as processes:
            ceph.start(made, processes)
            client = server.client()
            client.create_bucket(Bucket="kept")
            client.put_object(Bucket="kept", Key="a", Body=b"x" * 100_000)
        with Processes(made.folder) as processes:  # leaving the block before was SIGKILL to all of it
            ceph.start(made, processes)
            assert server.client().get_object(Bucket="kept", Key="a")["Body"].read() == b"x" * 100_000
