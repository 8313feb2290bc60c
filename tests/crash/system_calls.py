"""A folder seen from below the store: each system call that changes it, and what a power cut at that instant leaves.

The model of a disk is the weakest that POSIX allows: a file's bytes are there for sure only since its own fsync, a name
(of a file, or of a folder) only since the fsync of the folder that it is in. Of names that changed since then any may
be there or not; bytes that were not synced may be cut short.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Inode:
    """A file that was made under the eyes of the model."""

    path: str
    """One that leads to it, as long as there is one."""
    synced: bytes | None = None
    live: bytes = b""


@dataclass(eq=False)
class Change:
    """Of one folder, not yet on the disk for sure."""

    folder: str
    apply: Callable[[Disk], object]


@dataclass
class Disk:
    """Names as they are on the disk."""

    files: dict[str, Inode] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)


class Model:
    """What is on the disk for sure, and what may be."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.disk = Disk(folders={os.path.dirname(root)})
        self.pending: list[Change] = []
        self.inodes: dict[str, Inode] = {}  # as a process sees it
        for folder, _, names in os.walk(root):
            self.disk.folders.add(folder)
            for name in names:
                path = os.path.join(folder, name)
                data = _read(path)
                self.inodes[path] = self.disk.files[path] = Inode(path, data, data)

    def change(self, path: str, apply: Callable[[Disk], object]) -> None:
        self.pending.append(Change(os.path.dirname(path), apply))

    def made(self, path: str) -> None:
        inode = self.inodes[path] = Inode(path)
        self.change(path, lambda disk: disk.files.update({path: inode}))

    def linked(self, source: str, path: str) -> None:
        inode = self.inodes[path] = self.inodes[source]
        self.change(path, lambda disk: disk.files.update({path: inode}))

    def renamed(self, source: str, path: str) -> None:
        inode = self.inodes[path] = self.inodes.pop(source)
        inode.path = path

        def apply(disk: Disk) -> None:
            disk.files.pop(source, None)
            disk.files[path] = inode

        self.change(path, apply)

    def unlinked(self, path: str) -> None:
        inode = self.inodes.pop(path)
        inode.path = next((p for p, other in self.inodes.items() if other is inode), "")
        self.change(path, lambda disk: disk.files.pop(path, None))

    def folder_made(self, path: str) -> None:
        self.change(path, lambda disk: disk.folders.add(path))

    def folder_gone(self, path: str) -> None:
        self.change(path, lambda disk: disk.folders.discard(path))

    def synced(self, path: str) -> None:
        if os.path.isdir(path):
            for change in self.pending:
                if change.folder == path:
                    change.apply(self.disk)
            self.pending = [change for change in self.pending if change.folder != path]
        else:
            self.inodes[path].synced = _read(path)

    def cuts(self) -> Iterator[dict[str, bytes | None]]:
        """What a power cut now may leave, as path below the root → bytes, None for a folder: no change that was not
        synced is there, all are, or one of them is."""
        for inode in self.inodes.values():
            inode.live = _read(inode.path)
        chosen: list[Sequence[Change]] = [(), self.pending]
        if len(self.pending) > 1:
            chosen += [[change] for change in self.pending]
        for changes in chosen:
            disk = Disk(dict(self.disk.files), set(self.disk.folders))
            for change in changes:
                change.apply(disk)
            yield self._image(disk)

    def _image(self, disk: Disk) -> dict[str, bytes | None]:
        image: dict[str, bytes | None] = {}
        for path in disk.folders:
            if path.startswith(self.root) and self._reachable(disk, path):
                image[os.path.relpath(path, self.root)] = None
        for path, inode in disk.files.items():
            if self._reachable(disk, os.path.dirname(path)):
                data = inode.live[: len(inode.live) // 2] if inode.synced is None else inode.synced
                image[os.path.relpath(path, self.root)] = data
        return image

    def _reachable(self, disk: Disk, folder: str) -> bool:
        while folder in disk.folders:
            if folder == os.path.dirname(self.root):
                return True
            folder = os.path.dirname(folder)
        return False


class TracedOs:
    """Stands for the module `os` in the modules that write files. `watch` is called before each change, with its name,
    and in the middle of each write."""

    def __init__(self, model: Model, watch: Callable[[str], None]) -> None:
        self._model, self._watch = model, watch
        self._paths: dict[int, str] = {}
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            self._watch("open")
        fd = os.open(path, flags, mode)
        if flags & os.O_CREAT:
            self._model.made(path)
        self._paths[fd] = path
        return fd

    def close(self, fd: int) -> None:
        self._paths.pop(fd, None)
        os.close(fd)

    def write(self, fd: int, data: Any) -> int:
        self._watch("write")
        half = memoryview(data)[: len(data) // 2 // 4096 * 4096]  # whole blocks: it may be a direct write
        if not half.nbytes:
            return os.write(fd, data)
        count = os.write(fd, half)
        self._watch("half a write")
        return count

    def writev(self, fd: int, views: Sequence[memoryview]) -> int:
        self._watch("write")
        data = b"".join(views)
        os.write(fd, data[: len(data) // 2])
        self._watch("half a write")
        os.write(fd, data[len(data) // 2 :])
        return len(data)

    def fsync(self, fd: int) -> None:
        self._watch("fsync")
        self._model.synced(self._paths[fd])

    def rename(self, source: str, path: str) -> None:
        self._watch("rename")
        os.rename(source, path)
        self._model.renamed(source, path)

    def link(self, source: str, path: str) -> None:
        self._watch("link")
        os.link(source, path)
        self._model.linked(source, path)

    def unlink(self, path: str) -> None:
        self._watch("unlink")
        os.unlink(path)
        self._model.unlinked(path)

    def mkdir(self, path: str) -> None:
        self._watch("mkdir")
        os.mkdir(path)
        self._model.folder_made(path)

    def rmdir(self, path: str) -> None:
        self._watch("rmdir")
        os.rmdir(path)
        self._model.folder_gone(path)


def snapshot(root: str) -> dict[str, bytes | None]:
    """What kill -9 leaves: all that was done, whether it was synced or not."""
    image: dict[str, bytes | None] = {}
    for folder, _, names in os.walk(root):
        image[os.path.relpath(folder, root)] = None
        image |= {
            os.path.relpath(os.path.join(folder, name), root): _read(os.path.join(folder, name)) for name in names
        }
    return image


def write_image(image: dict[str, bytes | None], to: str) -> None:
    """Makes a folder of it."""
    for name in sorted(name for name, data in image.items() if data is None):
        os.makedirs(os.path.join(to, name), exist_ok=True)
    for name, data in image.items():
        if data is not None:
            with open(os.path.join(to, name), "wb") as file:
                file.write(data)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
