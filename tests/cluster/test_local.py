"""The compose file's topology as processes of this machine: the demo outlives a node, the head comes back."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import Settings, Topology, has_ray_default, kill
from cluster.processes import Processes
from tests.cluster.files import ROOT

HAS_REDIS = shutil.which("valkey-server") is not None or shutil.which("redis-server") is not None
KEEPER = """
import ray
ray.init(address="auto", log_to_driver=False)
@ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
class Keeper:
    def __init__(self): self.kept = 41
    def add(self): self.kept += 1; return self.kept
"""
MAKE = (
    KEEPER
    + "print(ray.get(Keeper.options(name='k', namespace='n', lifetime='detached', num_cpus=1).remote().add.remote()))"
)
SAVE = """
import ray, rl_ckpt, sys
ray.init(address="auto", log_to_driver=False)
@ray.remote
class Worker:
    def get_state(self): return {"x": 1}
    def set_state(self, state): pass
with rl_ckpt.Checkpointer("s3://rl-ckpt/watched") as ckpt:
    ckpt.save(7, [Worker.remote()]).result()
    sys.stdin.read()
"""
LEAVE = """
import ray, rl_ckpt
ray.init(address="auto", log_to_driver=False)
@ray.remote(num_cpus=1)
class Worker:
    def get_state(self): return {"x": 1}
    def set_state(self, state): pass
workers = [Worker.remote()]
with rl_ckpt.Checkpointer("s3://rl-ckpt/leaving") as ckpt, ckpt.preemption(grace_s=30) as watch:
    ckpt.save(1, workers).result()
    print("saved", flush=True)
    while (notice := watch.notice(workers)) is None: pass
    ckpt.save(2, workers, deadline_s=notice.seconds_left - 5).result()
    print(notice.ranks, notice.seconds_left > 15, ckpt.latest().step, flush=True)
"""
ASK = "import ray; ray.init(address='auto', log_to_driver=False); print(ray.get(ray.get_actor('k', 'n').add.remote()))"


class Running:
    """The topology, its folder, and what it said."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder, self.processes = folder, processes
        self.said: list[str] = []
        self.topology = Topology(folder, Settings(workers=2), processes)
        self.topology.start(self.said.append)

    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.topology.variables}

    def python(self, code: str) -> str:
        """Output of a driver's code, its last line."""
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=self.environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()[-1]

    def tend_until(self, said: str) -> None:
        """Tend until it has said something new."""
        begun = len(self.said)
        while not any(said in line for line in self.said[begun:]):
            self.topology.tend(self.said.append)


@pytest.fixture(scope="module")
def running(_no_aws_settings_from_outside: None) -> Iterator[Running]:
    # Short: Unix sockets live below it.
    with tempfile.TemporaryDirectory(prefix="rlc-", dir="/tmp") as name, Processes(Path(name)) as processes:
        yield Running(Path(name), processes)


def test_the_demo_outlives_a_worker_that_somebody_kills(running: Running, tmp_path: Path) -> None:
    arguments = "--address auto --kill you --iterations 8 --save-every 4 --workers 2 --workers-after 1"
    command = [sys.executable, "-m", "rl_ckpt.demo", *arguments.split(), "--out", str(tmp_path)]
    killed, lines = "", []
    url = ["--url", "s3://rl-ckpt/demo"]
    with subprocess.Popen(
        [*command, *url],
        cwd=ROOT,
        env=running.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            lines.append(line)
            if asked := re.search(r"now kill a worker node.* the learner is on node (\S+) ", line):
                killed = asked.group(1)
                assert kill(running.folder, killed) > 1
    said = "".join(lines)
    assert demo.returncode == 0, said
    assert killed.startswith("worker-")
    assert "ok  state came back bit for bit" in said
    assert "went on from its checkpoint" in said
    running.tend_until(f"{killed} is dead")
    with pytest.raises(KeyError):
        kill(running.folder, killed)

    # One is left: to kill that would end the job.
    other = [*command, "--url", "s3://rl-ckpt/other"]
    done = subprocess.run(other, cwd=ROOT, env=running.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "needs two or more" in done.stderr


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed (Debian: prometheus)")
@pytest.mark.skipif(not has_ray_default(), reason="without ray[default] Ray exports no metrics")
def test_prometheus_finds_the_nodes_and_calls_metrics_by_their_names(running: Running) -> None:
    url = next(line for line in running.said if line.startswith("Prometheus: ")).partition(": ")[2]
    query = urllib.parse.urlencode({"query": "max by (run) (rl_ckpt_last_committed_step)"})
    command = [sys.executable, "-c", SAVE]
    with subprocess.Popen(command, cwd=ROOT, env=running.environment(), stdin=subprocess.PIPE) as job:

        def known() -> str:
            with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=10) as answer:
                made: str = answer.read().decode()
            return made

        running.processes.wait_until(lambda: "s3://rl-ckpt/watched" in known(), "Prometheus has scraped the run")
        assert '"7"' in known()
        job.communicate(b"enough")
    assert job.returncode == 0


@pytest.mark.skipif(not HAS_REDIS, reason="neither Valkey nor Redis is installed (Debian: redis-server)")
def test_a_head_that_is_killed_comes_back_with_what_it_knew(running: Running) -> None:
    assert running.python(MAKE) == "42"
    address = running.topology.variables["RAY_ADDRESS"]
    kill(running.folder, "head")
    running.tend_until("the head died")
    assert running.topology.variables["RAY_ADDRESS"] == address
    assert running.python(ASK) == "43"  # found by its name, and the same: it never stopped


def test_a_node_that_gets_sigterm_as_containers_do_leaves_time_for_a_save(running: Running) -> None:
    pids: dict[str, int] = json.loads((running.folder / "topology.json").read_text())
    command = [sys.executable, "-c", LEAVE]
    with subprocess.Popen(command, cwd=ROOT, env=running.environment(), stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "saved\n"
        for name, pid in pids.items():
            if name.startswith("worker"):
                os.kill(pid, signal.SIGTERM)
        assert job.stdout.readline() == "(0,) True 2\n"


def test_a_node_that_is_not_there_cannot_be_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.local", "--dir", str(tmp_path), "--kill", "worker-9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no node worker-9 is running" in done.stderr
