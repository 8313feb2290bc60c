"""Processes that are started here, watched, killed, and ended in reverse order.

Owns their output, a file each, and their ids. Promises to signal nothing that it did not start, or that was not started
by what it started. Standard library alone: the image of the S3 server has nothing else.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_START_S = 90.0
_PAUSE_S = 0.05
_LAST_WORDS = 2000


class Processes:
    """Named processes; leaving the block ends them and all their descendants, last one first.

    Args:
        folder: Gets their output, `<name>.out`; must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.environment: dict[str, str] = dict(os.environ)
        """Of the processes started from now on."""

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self._running)):
            self.kill(name)

    def start(self, name: str, command: Sequence[str], more: Mapping[str, str] | None = None) -> int:
        """Start a process in a session of its own.

        Args:
            name: For `kill`, `ended` and messages; free, or of a process that has ended.
            command: Program and arguments.
            more: Environment variables beside `environment`.

        Returns:
            Its process id.
        """
        assert name not in self._running or self._running[name].poll() is not None, f"{name} is running"
        with open(self._folder / f"{name}.out", "ab") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**self.environment, **(more or {})},
                start_new_session=True,
            )
        self._running[name] = process
        return process.pid

    def call(self, *command: str) -> str:
        """Run a command to its end.

        Returns:
            What it wrote to its standard output.

        Raises:
            RuntimeError: It failed; with all that it and the processes here said.
        """
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=_START_S, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stdout}{done.stderr}{self._said()}")
        return done.stdout

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait for an event, as long as every process lives.

        Raises:
            RuntimeError: One of the processes ended, or it took too long; with what they said last.
        """
        deadline = time.monotonic() + _START_S
        while not ready():
            dead = self.ended()
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"waited for: {what}; ended: {dead or 'none'}{self._said()}")
            time.sleep(_PAUSE_S)

    def ended(self) -> list[str]:
        """Names of processes that ended by themselves."""
        return [name for name, process in self._running.items() if process.poll() is not None]

    def kill(self, name: str) -> int:
        """SIGKILL a process and everything below it, and forget it.

        Returns:
            How many processes were killed.
        """
        process = self._running.pop(name)
        count = kill_tree(process.pid) if process.poll() is None else 0
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what was begun while the tree was being read
        process.wait()
        return count

    def _said(self) -> str:
        outs = sorted(self._folder.glob("*.out"))
        return "".join(f"\n--- {out.name}\n{out.read_text(errors='replace')[-_LAST_WORDS:]}" for out in outs)


def kill_tree(pid: int) -> int:
    """SIGKILL a process and all its descendants, as a node that loses its power would.

    Args:
        pid: A process that the caller has the right to end.

    Returns:
        How many there were.
    """
    parents = _parents()
    family, grown = {pid}, True
    while grown:
        grown = False
        for child, parent in parents.items():
            if parent in family and child not in family:
                family.add(child)
                grown = True
    for member in family:
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    return len(family)


def _parents() -> dict[int, int]:
    """Process id to that of its parent, of every process of this machine (Linux)."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                # The name, in brackets, may hold spaces and brackets itself.
                after_name = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                found[int(entry.name)] = int(after_name[1])
    return found


def free_port() -> int:
    """A port of loopback that nobody listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def answers(url: str) -> bool:
    """Whether an HTTP server answers there, whatever it says."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except OSError:
        return False
    return True
