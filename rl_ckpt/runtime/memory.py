"""Staging memory: files in the node's shared memory, owned by the shard server and mapped by the workers.

Owns: where the files are, their size, and getting rid of them. Promises: a file outlives the worker that staged into it
and a restart of the server; what a killed cluster left is removed by the next server that starts on the machine. Pages
are allocated when a file is made, so that a full /dev/shm is an error here and not a SIGBUS in a worker.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import threading
from pathlib import Path

import msgspec
import psutil

from rl_ckpt.errors import StorageError
from rl_ckpt.plan.parts import PART
from rl_ckpt.runtime import huge_pages

_OWNER = "owner.json"
_MAKING = "making-"

_SPARE = "spare-"

RESTORE = "restore-"
"""How the names of restores' memory begin."""
GENERATION = "generation-"
"""How the names of generations begin; the number follows, and another dash."""


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
        self._renewing = threading.Lock()
        self._sparing = threading.Lock()
        self._kept: set[str] = set()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        parent = psutil.Process(os.getppid())
        owner = _Owner(parent.pid, parent.create_time(), _pid_namespace())
        (self._folder / _OWNER).write_bytes(msgspec.json.encode(owner))
        # Left when this server was killed: what it was making, and what it brought in for restores: nobody is known who
        # would give that back. Who has it mapped keeps it.
        for left in [*self._folder.glob(f"{_MAKING}*"), *self._folder.glob(f"{RESTORE}*")]:
            left.unlink(missing_ok=True)
        remove_orphans()

    def make(self, name: str, size_bytes: int) -> str:
        """A new file of zeros; one of that name goes (who has it mapped keeps the old one).

        Returns:
            Its path.

        Raises:
            StorageError: The shared memory is too small.
        """
        path, making = self._folder / name, self._folder / f"{_MAKING}{name}"
        path.unlink(missing_ok=True)
        making.unlink(missing_ok=True)
        if size_bytes > shutil.disk_usage(self._folder).free:
            self.drop_spares()
        if size_bytes > shutil.disk_usage(self._folder).free:
            raise self._too_small(size_bytes)  # before other processes find the memory taken
        with open(making, "x+b") as file:
            try:
                huge_pages.fill(file.fileno(), max(size_bytes, 1))
                os.posix_fallocate(file.fileno(), 0, max(size_bytes, 1))  # all that got no huge pages
            except OSError as error:
                making.unlink()
                if error.errno != errno.ENOSPC:
                    raise
                raise self._too_small(size_bytes) from error
        os.rename(making, path)  # it has its full size from the start: only whole may it be found by its name
        return str(path)

    def renew(self, prefix: str, name: str, size_bytes: int) -> str:
        """A new file in the place of all others whose name begins with `prefix`; one that is there already is kept.

        Others that must be kept (`keep`) stay as well, until they are given up.

        Returns:
            Its path.

        Raises:
            StorageError: The shared memory is too small.
        """
        path = self._folder / name
        with self._renewing:  # a server may be asked twice at once
            if path.exists() and path.stat().st_size == max(size_bytes, 1):
                return str(path)  # asked twice: what was staged meanwhile stays
            for old in self._folder.glob(f"{prefix}*"):
                if old.name in self._kept:
                    continue
                _empty(old)
                old.unlink(missing_ok=True)
            return self.make(name, size_bytes)

    def _too_small(self, size_bytes: int) -> StorageError:
        free = shutil.disk_usage(self._folder).free
        return StorageError(
            f"{size_bytes} bytes of staging memory don't fit into {self._folder.parent.parent} ({free} free); "
            "give the node or container more shared memory (docker: --shm-size), or save less per node"
        )

    def path(self, name: str) -> str:
        """Path of a file that was made."""
        return str(self._folder / name)

    def names(self, prefix: str) -> list[str]:
        """Files whose names begin so."""
        return [path.name for path in self._folder.glob(f"{prefix}*")]

    def remove(self, name: str) -> None:
        """Gives a file's memory back, once nobody has it mapped any more."""
        (self._folder / name).unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """A small file: whole, or not there.

        Raises:
            StorageError: The shared memory is too small.
        """
        making = self._folder / f"{_MAKING}{name}"
        try:
            making.write_bytes(data)
            os.rename(making, self._folder / name)
        except OSError as error:
            making.unlink(missing_ok=True)
            if error.errno != errno.ENOSPC:
                raise
            raise self._too_small(len(data)) from error

    def read(self, name: str) -> bytes:
        """What `write` wrote."""
        return (self._folder / name).read_bytes()

    def keep(self, name: str) -> None:
        """A generation's file must stay, whatever takes its place."""
        with self._renewing:
            self._kept.add(name)

    def give_up(self, name: str) -> None:
        """A generation's file need not stay any more; it goes where another has taken its place."""
        with self._renewing:
            self._kept.discard(name)
            number = name.removeprefix(GENERATION).partition("-")[0]
            if any(other != name for other in self.names(f"{GENERATION}{number}-")):
                _empty(self._folder / name)
                self.remove(name)

    def rename(self, old: str, new: str) -> str:
        """Gives a file another name.

        Returns:
            Its path.
        """
        with self._renewing:
            os.rename(self._folder / old, self._folder / new)
            self._kept.discard(old)
        return self.path(new)

    def spare(self, name: str) -> None:
        """A file is needed no more, but may be used again: making its memory anew costs more than copying into it."""
        with self._sparing, contextlib.suppress(FileNotFoundError):
            os.rename(self._folder / name, self._folder / f"{_SPARE}{name}")

    def inodes(self) -> set[int]:
        """Of all files that there are."""
        with os.scandir(self._folder) as entries:
            return {entry.inode() for entry in entries}

    def spares(self) -> int:
        """How many there are."""
        return len(self.names(_SPARE))

    def spare_bytes(self) -> int:
        """Of all of them together."""
        with self._sparing:  # none is taken, or dropped, meanwhile
            return sum(path.stat().st_size for path in self._folder.glob(f"{_SPARE}*"))

    def take_spare(self, name: str, size_bytes: int) -> str:
        """A spare file of at least so many bytes, and not many more, under a new name.

        Returns:
            Its path; empty where there is none.
        """
        with self._sparing:
            for spare in self._folder.glob(f"{_SPARE}*"):
                if size_bytes <= spare.stat().st_size <= 2 * size_bytes:
                    os.rename(spare, self._folder / name)
                    return self.path(name)
        return ""

    def drop_spares(self) -> None:
        """Gives the memory of all spare files back."""
        with self._sparing:
            for spare in self._folder.glob(f"{_SPARE}*"):
                _empty(spare)
                spare.unlink(missing_ok=True)

    def room(self, generations: int) -> int:
        """Bytes that there are beside what staging will still take.

        Args:
            generations: How many there may be.
        """
        sizes = []
        for path in self._folder.glob(f"{GENERATION}*"):
            with contextlib.suppress(FileNotFoundError):  # made anew, or made a part, since the listing
                sizes.append(path.stat().st_size)
        left = max(0, generations - len(sizes)) * max(sizes, default=0)
        return shutil.disk_usage(self._folder).free - left

    def close(self) -> None:
        """Gives everything back."""
        for pattern in (f"{GENERATION}*", f"{PART}*", f"{_SPARE}*"):
            for file in self._folder.glob(pattern):
                _empty(file)
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other runs still have folders here
            _root().rmdir()


def _empty(path: Path) -> None:
    """Gives a generation's memory back though workers have it mapped: nobody reads there any more."""
    with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
        huge_pages.empty(file.fileno(), path.stat().st_size)


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
    with _maps_lock:  # from the start: what `forget` takes out after the file was removed does not come back
        try:
            found = os.stat(path)
        except FileNotFoundError as error:
            raise StorageError(f"staging memory {path} is gone: its shard server was ended; save again") from error
        known = _maps.get(path)
        if known is not None and known[:2] == (found.st_ino, found.st_size):
            return known[2]
        _drop_gone()
        with open(path, "r+b") as file:
            view = huge_pages.map_file(file.fileno(), found.st_size)
        _maps[path] = (found.st_ino, found.st_size, view)
        return view


def is_mapped(path: str) -> bool:
    """Whether this process has a file of staging memory mapped."""
    with _maps_lock:
        return path in _maps


def prefault(path: str) -> None:
    """Maps a file of staging memory before it is needed, and has its pages ready in this process.

    Raises:
        StorageError: The file is gone: its server was ended.
    """
    huge_pages.populate(mapped(path))


def drop_gone() -> None:
    """Unmaps what has no file any more: its memory is free once nobody maps it."""
    with _maps_lock:
        _drop_gone()


def _drop_gone() -> None:
    for stale in [path for path in _maps if not os.path.exists(path)]:
        del _maps[stale]


def forget(path: str) -> None:
    """Unmaps a file in this process, once no view of it is left; for good where the file was removed before."""
    with _maps_lock:
        _maps.pop(path, None)
