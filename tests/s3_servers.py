"""S3 servers for the tests, on loopback and on free ports: moto (from pip) and Ceph RGW (where it is installed).

Each is a real server in processes of its own, stopped by the ids of the processes that were started here.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session

CEPH_PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "ceph", "ceph-authtool", "monmaptool", "radosgw-admin")
_START_S = 60


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


def ceph_is_installed() -> bool:
    """Whether a Ceph server can be started here: its programs are there, and they insist on being root."""
    return all(shutil.which(program) for program in CEPH_PROGRAMS) and os.geteuid() == 0


@contextmanager
def run_moto() -> Iterator[S3Server]:
    """A moto server, empty; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="moto-") as folder, _Processes(Path(folder)) as processes:
        port = free_port()
        processes.start("moto", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)])
        url = f"http://127.0.0.1:{port}"
        processes.wait_until(lambda: _answers(f"{url}/moto-api/"), "moto answers")
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
    with tempfile.TemporaryDirectory(prefix="ceph-", dir="/tmp") as name, _Processes(Path(name)) as processes:
        folder = Path(name)
        port, monitor_port = free_port(), free_port()
        for sub in ("mon", "osd0", "run", "log"):
            (folder / sub).mkdir()
        conf = folder / "ceph.conf"
        cluster_id = str(uuid.uuid4())
        conf.write_text(_ceph_conf(folder, cluster_id, port, monitor_port, store, size_gb))
        processes.environment |= {"CEPH_CONF": str(conf), "CEPH_ARGS": f"-c {conf}"}
        _make_monitor(processes, folder, cluster_id, monitor_port)
        _make_object_server(processes)
        processes.start("rgw", ["radosgw", "-f", "-n", "client.rgw.a"])
        url = f"http://127.0.0.1:{port}"
        processes.wait_until(lambda: _answers(url), "radosgw answers")
        user = ["user", "create", "--uid=test", "--display-name=test", "--access-key=testaccess"]
        processes.call("radosgw-admin", "-n", "client.rgw.a", *user, "--secret-key=testsecret")
        yield S3Server("ceph", url, "testaccess", "testsecret")


def free_port() -> int:
    """A port of loopback that nobody listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


class _Processes:
    """Processes started here, with their output in files; leaving the block ends them, last one first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.environment = dict(os.environ)

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for _name, process in reversed(self._running):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def start(self, name: str, command: list[str]) -> None:
        with open(self._folder / f"{name}.out", "wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=self.environment, start_new_session=True
            )
        self._running.append((name, process))

    def call(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=_START_S)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stdout}{done.stderr}{self._said()}")
        return done.stdout

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _START_S
        while not ready():
            dead = [name for name, process in self._running if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"waited for: {what}; ended: {dead or 'none'}{self._said()}")
            time.sleep(0.05)

    def _said(self) -> str:
        return "".join(
            f"\n--- {out.name}\n{out.read_text(errors='replace')[-2000:]}" for out in self._folder.glob("*.out")
        )


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except OSError:
        return False
    return True


def _make_monitor(processes: _Processes, folder: Path, cluster_id: str, port: int) -> None:
    keyring, monmap = str(folder / "keyring"), str(folder / "monmap")
    processes.call("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    for entity in ("client.admin", "client.rgw.a", "osd.0"):
        caps = [word for service in ("mon", "osd", "mgr") for word in ("--cap", service, "allow *")]
        processes.call("ceph-authtool", keyring, "--gen-key", "-n", entity, *caps)
    address = f"[v2:127.0.0.1:{port}]"
    processes.call("monmaptool", "--create", "--clobber", "--fsid", cluster_id, "--addv", "a", address, monmap)
    processes.call("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
    processes.start("mon", ["ceph-mon", "-f", "-i", "a"])


def _make_object_server(processes: _Processes) -> None:
    osd_id = str(uuid.uuid4())
    processes.call("ceph", "osd", "new", osd_id)
    processes.call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
    processes.call("ceph", "osd", "crush", "add", "osd.0", "1", "root=default", "host=h0")
    processes.start("osd", ["ceph-osd", "-f", "-i", "0"])
    processes.wait_until(lambda: "1 up" in processes.call("ceph", "osd", "stat"), "the object server is up")


def _ceph_conf(folder: Path, cluster_id: str, port: int, monitor_port: int, store: str, size_gb: int) -> str:
    size = size_gb << 30
    return f"""\
[global]
fsid = {cluster_id}
mon_host = v2:127.0.0.1:{monitor_port}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
public_network = 127.0.0.0/8
ms_bind_ipv4 = true
auth_allow_insecure_global_id_reclaim = false
run_dir = {folder}/run
admin_socket = {folder}/run/$name.asok
pid_file = {folder}/run/$name.pid
log_file = {folder}/log/$name.log
crash_dir = {folder}/log
keyring = {folder}/keyring
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 2000
mon_data_avail_crit = 1
mon_data_avail_warn = 2
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
mon_osd_min_up_ratio = 0
osd_pg_stat_report_interval_max = 1
[mon.a]
mon_data = {folder}/mon
[osd]
osd_objectstore = {store}
osd_data = {folder}/osd$id
osd_memory_target = 1073741824
bluestore_block_size = {size}
bluestore_block_create = true
bluestore_fsck_on_mount = false
memstore_device_bytes = {size}
[client.rgw.a]
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_thread_pool_size = 64
rgw_num_control_oids = 1
rgw_gc_max_objs = 4
rgw_gc_obj_min_wait = 2
rgw_gc_processor_period = 2
rgw_lc_max_objs = 2
rgw_enable_ops_log = false
rgw_enable_usage_log = false
rgw_data = {folder}/run
rgw_override_bucket_index_max_shards = 1
"""
