"""The topology of docker-compose.yml as plain processes of this machine, for people without containers and for tests.

Starts a Ray head with head fault tolerance (where a server with Redis's protocol is installed: Valkey or Redis), worker
nodes, an S3 server with a bucket (Ceph where it is installed, else moto, which keeps all in memory) and Prometheus
(where it is installed). Every node is a raylet of its own. A head that dies is started again, as the compose file does;
a worker stays dead. Ends what it started, and only that.

    python -m cluster.local                        # until ctrl-C; `. DIR/env` in other terminals
    python -m cluster.local -- python -m rl_ckpt.demo --address auto --url s3://rl-ckpt/demo
    python -m cluster.local --dir DIR --kill worker-1      # what `docker kill` does
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from cluster import ceph
from cluster.processes import Processes, answers, free_port, kill_tree

BUCKET = "rl-ckpt"
HERE = Path(__file__).resolve().parent
_KEYS = {"AWS_ACCESS_KEY_ID": "rl-ckpt-local", "AWS_SECRET_ACCESS_KEY": "rl-ckpt-local-secret"}
_STORE_BYTES = 100 << 20
_WATCH_S = 0.2
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_METRIC_PORTS = ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")
_HEALTH = {
    # A node that was killed is known after about 4 s instead of 15, and a busy machine still answers in time.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What is started."""

    workers: int = 3
    """Worker nodes beside the head."""
    cpus: int = 4
    """What each worker node says it has; the head says 0, so that no actor is put there."""
    s3: str = ""
    """`ceph` or `moto`; empty: Ceph where it is installed, else moto."""


class Topology:
    """The running processes.

    Args:
        folder: Gets output, data, `env` and `topology.json`; short, as Unix sockets live below it.
        settings: What to start.
        processes: Takes all that is started.
    """

    def __init__(self, folder: Path, settings: Settings, processes: Processes) -> None:
        self._folder, self._settings, self._processes = folder, settings, processes
        self._ports = {name: free_port() for name in ("gcs", "dashboard", "client", "prometheus", *_METRIC_PORTS)}
        self._pids: dict[str, int] = {}
        self._temp = folder / "ray"
        self._begun_at: dict[str, int] = {}  # where the output of a process's newest start begins
        self._head_environment: dict[str, str] = {}
        self._redis_password = ""
        self.variables: dict[str, str] = {}
        """Environment variables for programs that use the cluster, and for its nodes."""

    @property
    def has_redis(self) -> bool:
        """Whether the head comes back with what it knew."""
        return "RAY_REDIS_ADDRESS" in self._head_environment

    def start(self, say: Callable[[str], None]) -> None:
        """Start everything, one after the other, and wait until the nodes are there.

        Args:
            say: Takes a line for each part.

        Raises:
            RuntimeError: Something did not start; with what it said.
        """
        # Short names first: PYTHONPATH lets the nodes' workers import what the driver imports.
        self.variables = {"PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))}
        self.variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.variables |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(self._temp)}
        say(f"S3: {self._start_s3()}")
        self._head_environment = self._start_redis()
        say(f"head fault tolerance: {self._head_environment.get('RAY_REDIS_ADDRESS', 'no Valkey or Redis here, none')}")
        self._processes.environment |= self.variables | _HEALTH
        self.start_head()
        say(f"Ray head: {self.variables['RAY_ADDRESS']}")
        for name in (f"worker-{number}" for number in range(1, self._settings.workers + 1)):
            # One after the other: two nodes of one session that start at once take the same name for their sockets.
            self._start_worker(name)
            self._processes.wait_until(partial(self._has_joined, name), f"{name} has joined")
            say(f"Ray node: {name}")
        say(f"Prometheus: {self._start_prometheus()}")
        self._tell()

    def start_head(self) -> None:
        """Start the head, for the first time or again: on the same port, over the same Redis."""
        port = self._ports["gcs"]
        # With it, and worker nodes of this machine that name the address, Ray takes the head that died for running.
        (self._temp / "ray_current_cluster").unlink(missing_ok=True)
        command = [*_RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=0"]
        command += [f"--temp-dir={self._temp}", f"--include-dashboard={str(has_ray_default()).lower()}"]
        if has_ray_default():
            command += [f"--dashboard-port={self._ports['dashboard']}"]
            command += [f"--ray-client-server-port={self._ports['client']}"]
            # Fixed ports by default, which another cluster of this machine may have.
            self._head_environment |= {name: str(self._ports[name]) for name in _METRIC_PORTS}
        if self.has_redis:
            command += [f"--redis-password={self._redis_password}"]  # Ray reads it from nowhere else
        self._start_node("head", command, self._head_environment)
        self._processes.wait_until(lambda: bool(self._address()), "the head is up")
        self.variables["RAY_ADDRESS"] = self._address()

    def tend(self, say: Callable[[str], None]) -> None:
        """Do what the compose file's restart policy does: bring back a head that died, forget workers that died.

        Raises:
            RuntimeError: The S3 server, Redis or Prometheus died.
        """
        for name in self._processes.ended():
            self._processes.kill(name)
            del self._pids[name]
            if name == "head":
                say("the head died: starting it again")
                self.start_head()
            elif name.startswith("worker"):
                say(f"{name} is dead")
            else:
                raise RuntimeError(f"{name} died; see {self._folder / name}.out")
            self._tell()

    def _start_s3(self) -> str:
        kind = self._settings.s3 or ("ceph" if ceph.is_installed() else "moto")
        port = free_port()
        self.variables |= {**_KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
        if kind == "ceph":
            data = self._folder / "s3"
            data.mkdir(exist_ok=True)
            ceph.start(
                ceph.Ceph(
                    data, port, free_port(), key=_KEYS["AWS_ACCESS_KEY_ID"], secret=_KEYS["AWS_SECRET_ACCESS_KEY"]
                ),
                self._processes,
            )
        elif importlib.util.find_spec("moto") is None:
            raise RuntimeError(
                "no S3 server here: install Ceph (Debian: radosgw ceph-mon ceph-osd) or pip's moto[server]"
            )
        else:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
            self._processes.start("moto", command)
            url = self.variables["AWS_ENDPOINT_URL"]
            self._processes.wait_until(lambda: answers(f"{url}/moto-api/"), "moto answers")
        self._processes.environment |= self.variables
        self._processes.call(sys.executable, "-m", "cluster.bucket", BUCKET)
        return f"{kind} at {self.variables['AWS_ENDPOINT_URL']}, bucket {BUCKET}"

    def _start_redis(self) -> dict[str, str]:
        server = shutil.which("valkey-server") or shutil.which("redis-server")
        if server is None:
            return {}
        data, port, password = self._folder / "redis", free_port(), secrets.token_hex(16)
        data.mkdir(exist_ok=True)
        conf = data / "redis.conf"
        conf.write_text(f"bind 127.0.0.1\nport {port}\nrequirepass {password}\nappendonly yes\ndir {data}\n")
        self._pids["redis"] = self._processes.start("redis", [server, str(conf)])
        self._processes.wait_until(lambda: "accept connections" in self._said("redis"), "Redis answers")
        self._redis_password = password
        return {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}", "RAY_external_storage_namespace": "rl-ckpt"}

    def _start_worker(self, name: str) -> None:
        command = [*_RAY, "start", "--block", f"--address={self.variables['RAY_ADDRESS']}"]
        self._start_node(name, [*command, f"--num-cpus={self._settings.cpus}"], {})

    def _start_node(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        # One machine for all: each needs ports of its own, and one range of workers' ports would be shared by all.
        command += [f"--node-name={name}", f"--object-store-memory={_STORE_BYTES}", "--min-worker-port=0"]
        command += ["--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
        command += [f"--metrics-export-port={free_port()}", "--disable-usage-stats"]
        out = self._folder / f"{name}.out"
        self._begun_at[name] = out.stat().st_size if out.exists() else 0
        self._pids[name] = self._processes.start(name, command, environment)

    def _has_joined(self, name: str) -> bool:
        """Ray says so once the node is registered."""
        return "Ray runtime started" in self._said(name)

    def _start_prometheus(self) -> str:
        if shutil.which("prometheus") is None:
            return "not installed"
        if not has_ray_default():
            return "not started: without pip's ray[default] Ray exports no metrics"
        conf, token = self._folder / "prometheus.yml", self._folder / "ray_token"
        token.touch(mode=0o600)
        token.write_text(self.variables["RAY_AUTH_TOKEN"])
        conf.write_text(local_prometheus_config(f"127.0.0.1:{self._ports['dashboard']}", token))
        port, data = self._ports["prometheus"], self._folder / "prometheus"
        command = ["prometheus", f"--config.file={conf}", f"--storage.tsdb.path={data}"]
        self._pids["prometheus"] = self._processes.start(
            "prometheus", [*command, f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
        )
        url = f"http://127.0.0.1:{port}"
        self._processes.wait_until(lambda: answers(f"{url}/-/ready"), "Prometheus answers")
        return url

    def _address(self) -> str:
        """Where the head listens, once it is up; the host's own address, whatever it was asked."""
        found = re.search(r"--address='([^']+)'", self._said("head"))
        return found.group(1) if found else ""

    def _said(self, name: str) -> str:
        said = (self._folder / f"{name}.out").read_bytes()[self._begun_at.get(name, 0) :]
        return said.decode(errors="replace")

    def _tell(self) -> None:
        """Write what other programs need: variables for a shell, and the process of each node."""
        env = self._folder / "env"
        env.touch(mode=0o600)  # it holds the token, with which anybody could run code here
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in self.variables.items()]
        env.write_text("".join(lines))
        _replace(self._folder / "topology.json", json.dumps(self._pids))


def has_ray_default() -> bool:
    """Whether Ray has its dashboard, its job server and its metrics here, which `ray[default]` brings."""
    needed = ("aiohttp_cors", "grpc", "opencensus", "opentelemetry", "prometheus_client")
    return all(importlib.util.find_spec(name) is not None for name in needed)


def local_prometheus_config(dashboard: str, token: Path) -> str:
    """The scrape configuration of this folder, with addresses of this machine in place of names of containers.

    Args:
        dashboard: Host and port of the head's dashboard.
        token: File with the cluster's token.
    """
    config = yaml.safe_load((HERE / "prometheus" / "prometheus.yml").read_text())
    config["rule_files"] = [str(HERE / "prometheus" / name) for name in config["rule_files"]]
    (discovery,) = config["scrape_configs"][0]["http_sd_configs"]
    discovery["url"] = discovery["url"].replace("head:8265", dashboard)
    discovery["authorization"]["credentials_file"] = str(token)
    return str(yaml.safe_dump(config, sort_keys=False))


def kill(folder: Path, name: str) -> int:
    """SIGKILL a node of a running topology, with everything below it.

    Args:
        folder: Of the topology.
        name: `head`, `worker-1`, …

    Returns:
        How many processes were killed.

    Raises:
        KeyError: There is no such node, or it is dead already.
    """
    return kill_tree(json.loads((folder / "topology.json").read_text())[name])


def _replace(path: Path, text: str) -> None:
    made = path.with_suffix(".new")
    made.write_text(text)
    made.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the topology, or kill a node of it.

    Returns:
        The command's exit code; without a command 0 after ctrl-C or SIGTERM. 1 where the topology failed, 2 for a node
        that is not there.
    """
    args = _parser().parse_args(argv)
    if args.kill:
        if args.dir is None:
            _parser().error("--kill needs the --dir of a running topology")
        try:
            print(f"{args.kill}: killed {kill(args.dir, args.kill)} processes")
        except (KeyError, FileNotFoundError):
            print(f"no node {args.kill} is running in {args.dir}", file=sys.stderr)
            return 2
        return 0
    if args.dir is not None:
        args.dir.mkdir(parents=True, exist_ok=True)
        return _run(args.dir.resolve(), args)
    with tempfile.TemporaryDirectory(prefix="rlc-", dir="/tmp") as name:
        return _run(Path(name), args)


def _run(folder: Path, args: argparse.Namespace) -> int:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with Processes(folder) as processes:
        topology = Topology(folder, Settings(args.workers, args.cpus, args.s3), processes)
        command: subprocess.Popen[bytes] | None = None
        try:
            topology.start(_say)
            if args.command:
                command = subprocess.Popen(args.command, env={**os.environ, **topology.variables})
            else:
                _say(f"ready: `. {folder}/env` in another terminal; ctrl-C ends it")
            while not stop.wait(_WATCH_S) and (command is None or command.poll() is None):
                topology.tend(_say)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            if command is not None and command.poll() is None:
                command.terminate()
                command.wait()
    return 0 if command is None else command.returncode


def _say(line: str) -> None:
    print(f"[cluster] {line}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=Settings().workers, help="worker nodes beside the head")
    parser.add_argument("--cpus", type=int, default=Settings().cpus, help="CPUs that each worker node offers")
    parser.add_argument("--s3", choices=["ceph", "moto"], default="", help="default: Ceph where it is installed")
    parser.add_argument("--dir", type=Path, help="folder for data and output, kept; default: one in /tmp, removed")
    parser.add_argument("--kill", metavar="NODE", help="SIGKILL this node of the topology in --dir: head, worker-1, …")
    parser.add_argument("command", nargs="*", help="run this on the topology, then end it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
