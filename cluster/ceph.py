"""Ceph's object gateway on one machine: the S3 server of the compose file, of `cluster.local` and of the tests.

One monitor, one object server and one gateway, with pools of a single copy: keeps the create-only promise and survives
its restart (bluestore), and does not survive the loss of its disk. Needs Debian's `radosgw ceph-mon ceph-osd
ceph-common`, and nothing of Python but the standard library: it is also the entry point of the server's image.

    python3 -m cluster.ceph --dir /data --host 0.0.0.0 --port 8000     # keys: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path

from cluster.processes import Processes, answers

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "ceph", "ceph-authtool", "monmaptool", "radosgw-admin")
_GATEWAY = "client.rgw.a"
_USER = "rl-ckpt"
_MADE = "made"
"""A file that says that the folder holds a complete server; its text is the id of the cluster."""


@dataclass(frozen=True, slots=True)
class Ceph:
    """Where a server runs and what it lets in."""

    folder: Path
    """Short: the path of a Unix socket, which the programs put below it, has at most 107 characters."""
    port: int
    monitor_port: int
    """On loopback; must stay the same when the server is started again on its folder."""
    key: str
    secret: str
    host: str = "127.0.0.1"
    """Address that the gateway listens on; monitor and object server stay on loopback."""
    store: str = "bluestore"
    """`bluestore` keeps objects in a file; `memstore` in memory, until the server ends."""
    size_gb: int = 8
    """Room for objects, in GiB; the file is sparse. memstore does not stop at its limit, and what is deleted is given
    back some seconds later only."""


def is_installed() -> bool:
    """Whether the server can be started here, by any user: its programs are there."""
    return all(shutil.which(program) for program in PROGRAMS)


def start(server: Ceph, processes: Processes) -> None:
    """Start the server, on what its folder holds or on nothing, and wait until it answers.

    Args:
        server: What to start; its folder must exist.
        processes: Takes the three processes, and changes its environment so that Ceph's tools find them.

    Raises:
        RuntimeError: It did not start; with what its programs said.
    """
    folder, marker = server.folder, server.folder / _MADE
    new = not marker.exists()
    if new:
        # A start that was killed half-way left no marker: begin again.
        for name in ("mon", "osd0", "keyring", "monmap"):
            _remove(folder / name)
    for name in ("mon", "osd0", "run", "log"):
        (folder / name).mkdir(exist_ok=True)
    cluster_id = str(uuid.uuid4()) if new else marker.read_text()
    conf = folder / "ceph.conf"
    conf.write_text(_conf(server, cluster_id))
    processes.environment |= {"CEPH_CONF": str(conf), "CEPH_ARGS": f"-c {conf}"}
    if new:
        _make_monitor(server, processes, cluster_id)
    processes.start("mon", ["ceph-mon", "-f", "-i", "a"])
    if new:
        _make_object_server(processes)
    processes.start("osd", ["ceph-osd", "-f", "-i", "0"])
    processes.wait_until(lambda: "1 up" in processes.call("ceph", "osd", "stat"), "the object server is up")
    processes.start("rgw", ["radosgw", "-f", "-n", _GATEWAY])
    processes.wait_until(lambda: answers(f"http://127.0.0.1:{server.port}"), "radosgw answers")
    if new:
        user = ["user", "create", f"--uid={_USER}", f"--display-name={_USER}", f"--access-key={server.key}"]
        processes.call("radosgw-admin", "-n", _GATEWAY, *user, f"--secret-key={server.secret}")
        marker.write_text(cluster_id)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _make_monitor(server: Ceph, processes: Processes, cluster_id: str) -> None:
    keyring, monmap = str(server.folder / "keyring"), str(server.folder / "monmap")
    processes.call("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    for entity in ("client.admin", _GATEWAY, "osd.0"):
        caps = [word for service in ("mon", "osd", "mgr") for word in ("--cap", service, "allow *")]
        processes.call("ceph-authtool", keyring, "--gen-key", "-n", entity, *caps)
    address = f"[v2:127.0.0.1:{server.monitor_port}]"
    processes.call("monmaptool", "--create", "--clobber", "--fsid", cluster_id, "--addv", "a", address, monmap)
    processes.call("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)


def _make_object_server(processes: Processes) -> None:
    osd_id = str(uuid.uuid4())
    processes.call("ceph", "osd", "new", osd_id)
    processes.call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
    processes.call("ceph", "osd", "crush", "add", "osd.0", "1", "root=default", "host=h0")


def _conf(server: Ceph, cluster_id: str) -> str:
    folder, size = server.folder, server.size_gb << 30
    return f"""\
[global]
fsid = {cluster_id}
mon_host = v2:127.0.0.1:{server.monitor_port}
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
osd_objectstore = {server.store}
osd_data = {folder}/osd$id
osd_memory_target = 1073741824
bluestore_block_size = {size}
bluestore_block_create = true
bluestore_fsck_on_mount = false
memstore_device_bytes = {size}
[{_GATEWAY}]
rgw_frontends = beast endpoint={server.host}:{server.port}
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


def main() -> int:
    """Run the server until SIGTERM or SIGINT, or until one of its processes ends.

    Returns:
        0 after a signal; 1 where a process ended by itself, so that a supervisor starts it anew.
    """
    parser = argparse.ArgumentParser(prog="python3 -m cluster.ceph", description="Ceph's S3 server on this machine.")
    parser.add_argument("--dir", type=Path, required=True, help="where objects are kept; a short path")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--monitor-port", type=int, default=3300, help="on loopback")
    parser.add_argument("--size-gb", type=int, default=8)
    args = parser.parse_args()
    keys = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    server = Ceph(args.dir, args.port, args.monitor_port, *keys, host=args.host, size_gb=args.size_gb)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with Processes(args.dir) as processes:
        start(server, processes)
        print(f"S3 on http://{args.host}:{args.port}", flush=True)
        while not stop.wait(1.0):
            if ended := processes.ended():
                print(f"ended by itself: {', '.join(ended)}; see {args.dir}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
