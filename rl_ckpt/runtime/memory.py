"""Staging memory: files in the node's shared memory, owned by the shard server and mapped by the workers.

Owns: where the files are, their size, and getting rid of them. Promises: a file outlives the worker that staged into it
and a restart of the server; what a killed cluster left is removed by the next server that starts on the machine. Pages
are allocated when a file is made, so that a full /dev/shm is an error here and not a SIGBUS in a worker.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import tempfile
import threading
from pathlib import Path

import msgspec
import psutil

from rl_ckpt.errors import StorageError

_OWNER = "owner.json"
_MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it


class _Owner(msgspec.Struct, frozen=True):
    """The raylet below which a server runs: while it lives, the server may come back to its files."""

    pid: int
    started: float
    pid_namespace: str


def _root() -> Path:
    shared = Path("/dev/shm")
    return (shared if shared.is_dir() else Path(tempfile.gettempdir())) / f"rl_ckpt-{os.getuid()}"


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # no /proc: one namespace
        return ""


class ServerMemory:
    """One shard server's files."""

    def __init__(self, name: str) -> None:
        """Takes over the folder of `name`, and removes folders whose cluster is gone."""
        self._folder = _root() / name
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        parent = psutil.Process(os.getppid())
        owner = _Owner(parent.pid, parent.create_time(), _pid_namespace())
        (self._folder / _OWNER).write_bytes(msgspec.json.encode(owner))
        remove_orphans()

    def make(self, name: str, size_bytes: int) -> str:
        """A new file of zeros; one of that name goes (who has it mapped keeps the old one).

        Returns:
            Its path.

        Raises:
            StorageError: The shared memory is too small.
        """
        path = self._folder / name
        path.unlink(missing_ok=True)
        with open(path, "xb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(size_bytes, 1))
            except OSError as error:
                path.unlink()
                if error.errno != errno.ENOSPC:
                    raise
                free = shutil.disk_usage(self._folder).free
                raise StorageError(
                    f"{size_bytes} bytes of staging memory don't fit into {self._folder.parent.parent} ({free} free); "
                    "give the node or container more shared memory (docker: --shm-size), or save less per node"
                ) from error
        return str(path)

    def renew(self, prefix: str, name: str, size_bytes: int) -> str:
        """A new file in the place of all others whose name begins with `prefix`; one that is there already is kept.

        Returns:
            Its path.

        Raises:
            StorageError: The shared memory is too small.
        """
        path = self._folder / name
        if path.exists() and path.stat().st_size == max(size_bytes, 1):
            return str(path)  # asked twice: what was staged meanwhile stays
        for old in self._folder.glob(f"{prefix}*"):
            old.unlink(missing_ok=True)
        return self.make(name, size_bytes)

    def path(self, name: str) -> str:
        """Path of a file that was made."""
        return str(self._folder / name)

    def remove(self, name: str) -> None:
        """Gives a file's memory back, once nobody has it mapped any more."""
        (self._folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Gives everything back."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other runs still have folders here
            _root().rmdir()


def remove_orphans() -> int:
    """Removes the folders of servers whose raylet is gone.

    Returns:
        How many.
    """
    removed = 0
    for folder in _root().iterdir():
        try:
            owner = msgspec.json.decode((folder / _OWNER).read_bytes(), type=_Owner)
        except (OSError, msgspec.DecodeError):
            continue  # being made, or removed, by its server at this moment
        if owner.pid_namespace == _pid_namespace() and not _alive(owner):
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed


def _alive(owner: _Owner) -> bool:
    try:
        return abs(psutil.Process(owner.pid).create_time() - owner.started) < 1.0
    except psutil.NoSuchProcess:
        return False


_maps: dict[str, tuple[int, int, memoryview]] = {}
_maps_lock = threading.Lock()  # a shard server maps from several threads


def mapped(path: str) -> memoryview:
    """A file of staging memory, mapped for writing; kept mapped, so that later saves pay no page faults.

    Raises:
        StorageError: The file is gone: its server was ended.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise StorageError(f"staging memory {path} is gone: its shard server was ended; save again") from error
    with _maps_lock:
        known = _maps.get(path)
        if known is not None and known[:2] == (found.st_ino, found.st_size):
            return known[2]
        for stale in [p for p in _maps if not os.path.exists(p)]:
            del _maps[stale]
        with open(path, "r+b") as file:
            view = memoryview(mmap.mmap(file.fileno(), found.st_size))
        _maps[path] = (found.st_ino, found.st_size, view)
        return view


def populate(view: memoryview) -> None:
    """Maps all pages of a mapped file in one call, where the system can.

    A write to a file whose source is not mapped yet fills the page cache 4 KiB at a time, instead of in large pieces
    (Linux 6.18, ext4): reading that file back out of the cache then takes three times as long, measured.
    """
    if isinstance(view.obj, mmap.mmap):
        with contextlib.suppress(OSError):  # an older kernel: slower reads, no harm
            view.obj.madvise(_MADV_POPULATE_READ)


def forget(path: str) -> None:
    """Unmaps a file in this process, once no view of it is left."""
    with _maps_lock:
        _maps.pop(path, None)
