"""Objects as files below a folder of a local disk or a mounted shared file system.

A file appears under its name only when it is whole and on the disk: written under a hidden temporary name in the same
folder, fsynced, then renamed (`put`) or hard-linked (`create`: a link fails when the name exists), then the folder is
fsynced. A crash at any point leaves at most a hidden temporary file, which listings never show and `clean_partial`
removes.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

from rl_ckpt.errors import CorruptionError, InvalidInputError, StorageError
from rl_ckpt.store.base import (
    Buffer,
    ObjectExistsError,
    ObjectMissingError,
    StorageOptions,
    Store,
    StoredObject,
    check_name,
    check_prefix,
    flat_segments,
    spare_none,
)
from rl_ckpt.store.file_writer import advance, write_segments
from rl_ckpt.store.parallel import run_all
from rl_ckpt.store.partial import PartialFile, is_left_over, kept_bytes
from rl_ckpt.store.ranges import Span, plan_spans

T = TypeVar("T")

_IOV_MAX = 1024
_SPAN_BYTES = 8 << 20
_GAP_BYTES = 4096
_PARALLEL_BYTES = 32 << 20
_READ_THREADS = 4
_FOLDERS_KNOWN = 1000
_TMP_SUFFIX = ".rl_ckpt-tmp"

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_CALLER_MUST_CHANGE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_DO = {
    errno.EFBIG: "Raise the limit of file sizes (ulimit -f), or save with a smaller `file_bytes`",
    errno.EIO: "The disk or the way to it is broken: look at the system's log, and save to another url meanwhile",
    errno.ESTALE: "The network file system was taken away: mount it again",
}
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


class LocalStore(Store):
    """Files below one folder; see the module for how they are written.

    Args:
        url: `file:///absolute/path`, as `open_store` normalises it.
        storage_options: Must be empty: a local folder has none.
    """

    def __init__(self, url: str, storage_options: StorageOptions | None = None) -> None:
        super().__init__(url, storage_options)
        if self.storage_options:
            raise InvalidInputError(
                f"{url}: a local folder takes no storage_options, got {', '.join(sorted(self.storage_options))}"
            )
        self.root = url.removeprefix("file://")
        self._on_disk: set[str] = set()  # folders whose names are known to be durable

    def put(self, name: str, segments: Sequence[Buffer]) -> None:
        """Write a hidden file, fsync, rename, fsync the folder."""
        views = flat_segments(segments)
        size = sum(view.nbytes for view in views)
        with self._writing("put", name, size), self._temporary(name, views) as temporary:
            path = self._path(name)
            os.rename(temporary, path)
            # A power cut before this line may leave the old state of the folder: no object, never half of one.
            _fsync_folder(os.path.dirname(path))
        self.stats.count_write(size)

    def create(self, name: str, data: bytes) -> None:
        """Write a hidden file, fsync, hard-link it under the name, fsync the folder."""
        views = flat_segments([data])
        with self._writing("create", name, len(data)), self._temporary(name, views) as temporary:
            path = self._path(name)
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise ObjectExistsError(self.object_url(name)) from None
            except OSError as error:
                if error.errno in _NO_HARD_LINKS:
                    raise InvalidInputError(_no_links(self.object_url(name), error)) from error
                raise
            _fsync_folder(os.path.dirname(path))
        self.stats.count_write(len(data))

    def get(self, name: str) -> bytes:
        """Read the whole file."""
        with self._reading("get", name), open(self._path(name), "rb") as file:
            data = file.read()
        self.stats.count_read(len(data))
        return data

    def read_into(self, name: str, reads: Sequence[tuple[int, memoryview]]) -> None:
        """Read with `preadv`, from 32 MiB on in several threads."""
        spans = plan_spans(reads, span_bytes=_SPAN_BYTES, gap_bytes=_GAP_BYTES)
        with self._reading("read", name), open(self._path(name), "rb", buffering=0) as file:
            fd = file.fileno()
            if sum(span.size_bytes for span in spans) < _PARALLEL_BYTES:
                for span in spans:
                    self._read_span(name, fd, span)
                return
            run_all([partial(self._read_span, name, fd, span) for span in spans], _READ_THREADS)

    def list(self, prefix: str = "") -> list[StoredObject]:
        """Walk the folder part of the prefix."""
        folder = check_prefix(prefix).rpartition("/")[0]
        start = os.path.join(self.root, folder) if folder else self.root
        with self._reading("list", prefix):
            try:
                found = [_stored(self.root, path) for path in _files_below(start)]
            except NotADirectoryError as error:
                if not os.path.isdir(self.root):
                    self._fail("list", prefix, error, writing=False)
                return []  # below an object there is none
        return sorted((f for f in found if f and f.name.startswith(prefix)), key=lambda f: f.name)

    def delete(self, names: Sequence[str]) -> None:
        """Unlink, fsync the folders, and remove those that became empty."""
        folders: set[str] = set()
        with self._writing("delete", ", ".join(names[:3]), 0):
            for name in names:
                path = self._path(name)
                with suppress(FileNotFoundError, NotADirectoryError):
                    os.unlink(path)
                    folders.add(os.path.dirname(path))
            # Deleted for good before returning: else a power cut could keep a commit record whose files are gone.
            for folder in folders:
                _fsync_folder(folder)
            for folder in sorted(folders, key=len, reverse=True):
                self._prune(folder)

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        path = self._path(name)
        with self._reading("exists", name):
            return os.path.isfile(path)

    def clean_partial(self, older_than_s: float, spare: Callable[[str], bool] = spare_none) -> int:
        """Remove old temporary files."""
        limit = time.time() - older_than_s
        removed = 0
        with self._writing("clean", _TMP_SUFFIX, 0):
            for path in _files_below(self.root, hidden=True):
                with suppress(FileNotFoundError):
                    old = path.endswith(_TMP_SUFFIX) and os.stat(path).st_mtime <= limit
                    if (old or is_left_over(path)) and not spare(self._named_by(path)):
                        os.unlink(path)
                        removed += 1
                        self._prune(os.path.dirname(path))
            for folder in _empty_folders(self.root):
                with suppress(FileNotFoundError):
                    if os.stat(folder).st_mtime <= limit and not spare(f"{os.path.relpath(folder, self.root)}/"):
                        self._prune(folder)
        return removed

    def partial(self, name: str, size_bytes: int) -> PartialFile | None:
        """A hidden file beside the object's place; None where another process is at it."""
        path = self._path(name)
        with self._writing("write", name, size_bytes), suppress(BlockingIOError):
            guard = partial(self._writing, "write", name, size_bytes)
            return self._with_folder(path, lambda: PartialFile(path, size_bytes, guard, self.stats.count_write))
        return None

    def partial_bytes(self, name: str) -> int:
        """Of the hidden file, as far as it is filled."""
        return kept_bytes(self._path(name))

    def local_path(self, name: str) -> str | None:
        """Path of the file, whether it exists or not."""
        return self._path(name)

    def free_bytes(self) -> int | None:
        """Bytes that an ordinary user can still write on this disk."""
        folder = Path(self.root)
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        with self._reading("statvfs", ""):
            stat = os.statvfs(folder)
        return stat.f_bavail * stat.f_frsize

    def _path(self, name: str) -> str:
        return os.path.join(self.root, check_name(name))

    def _named_by(self, temporary: str) -> str:
        """Name of the object that a temporary file was to become; one of more than 100 characters cut short."""
        folder, last = os.path.split(os.path.relpath(temporary, self.root))
        return "/".join(filter(None, [folder.replace(os.sep, "/"), last[1:].rsplit(".", 3)[0]]))

    @contextmanager
    def _temporary(self, name: str, views: Sequence[memoryview]) -> Iterator[str]:
        """A whole, fsynced temporary file beside the object; gone when the block is left, whatever happens in it."""
        path = self._path(name)
        folder, last = os.path.split(path)
        # The object's name is cut short so that a longest-possible one still leaves room for the rest.
        temporary = os.path.join(folder, f".{last[:100]}.{uuid.uuid4().hex}{_TMP_SUFFIX}")
        fd = self._create_file(temporary)
        try:
            try:
                write_segments(fd, views)
                os.fsync(fd)
            finally:
                os.close(fd)
            yield temporary
        finally:
            with suppress(OSError):  # where the disk takes no changes any more, that is for clean_partial
                os.unlink(temporary)

    def _create_file(self, path: str) -> int:
        """Open a new file for writing, with the folders above it."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        return self._with_folder(path, lambda: os.open(path, flags, 0o666))

    def _with_folder(self, path: str, make: Callable[[], T]) -> T:
        """Make a file, with the folders above it; one that a deleter just removed is made again."""
        folder = os.path.dirname(path)
        for left in range(10, -1, -1):
            if folder not in self._on_disk:
                self._make_folders(folder)
            try:
                return make()
            except FileNotFoundError:
                self._on_disk.clear()
                if not left:
                    raise
        raise AssertionError  # the last try raised

    def _make_folders(self, folder: str) -> None:
        """Make a folder of the run and its missing parents, each durable in the one above it.

        One that is there may have been made by a process that was killed before it was durable: a power cut would take
        all that is in it. So those are synced too, once by each process.
        """
        path, chain = folder, [folder]
        while (path.startswith(self.root + os.sep) or not os.path.isdir(path)) and path != os.path.dirname(path):
            path = os.path.dirname(path)
            chain.append(path)
        for path in reversed(chain):
            if path in self._on_disk:
                continue
            made = False
            with suppress(FileExistsError, FileNotFoundError):
                os.mkdir(path)
                made = True
            if os.path.exists(path) and not os.path.isdir(path):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            try:
                _fsync_folder(os.path.dirname(path))
            except FileNotFoundError:
                return  # a deleter removed what became empty: the caller tries again
            except PermissionError:
                if made:
                    raise  # else it is not this user's to sync, nor to make
            if len(self._on_disk) >= _FOLDERS_KNOWN:
                self._on_disk.clear()
            self._on_disk.add(path)

    def _read_span(self, name: str, fd: int, span: Span) -> None:
        targets = _with_gaps(span)
        offset = span.offset_bytes
        for begin in range(0, len(targets), _IOV_MAX):
            batch = targets[begin : begin + _IOV_MAX]
            while batch:
                count = os.preadv(fd, batch, offset)
                if count == 0:
                    raise CorruptionError(short_message(self.object_url(name), span.end_bytes, os.fstat(fd).st_size))
                offset += count
                batch = advance(batch, count)
        self.stats.count_read(span.size_bytes)

    def _prune(self, folder: str) -> None:
        """Remove a folder that became empty, and its empty parents up to the run's own."""
        while folder.startswith(self.root + os.sep):
            try:
                os.rmdir(folder)
            except OSError:
                return  # Not empty, or a writer is just putting something there: it stays.
            self._on_disk.discard(folder)
            folder = os.path.dirname(folder)

    @contextmanager
    def _reading(self, operation: str, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ObjectMissingError(self.object_url(name)) from error
        except OSError as error:
            if error.errno == errno.ENOTDIR and not os.path.isfile(self.root):
                raise ObjectMissingError(self.object_url(name)) from error
            self._fail(operation, name, error, writing=False)

    @contextmanager
    def _writing(self, operation: str, name: str, size_bytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise StorageError(self._disk_full(operation, name, size_bytes, error)) from error
            self._fail(operation, name, error, writing=True)

    def _disk_full(self, operation: str, name: str, size_bytes: int, error: OSError) -> str:
        what, do = "disk full", "Free space, or let fewer checkpoints be kept"
        if error.errno == errno.EDQUOT:
            what, do = "disk quota used up", f"Raise the quota of uid {os.geteuid()}, or let fewer checkpoints be kept"
        return (
            f"{what}: {operation} of {self.object_url(name)} needs {size_bytes} bytes, {self.free_bytes()} are free "
            f"({error.strerror}). What was written of it is removed, everything saved before is untouched. {do}"
        )

    def _fail(self, operation: str, name: str, error: OSError, *, writing: bool) -> NoReturn:
        said = f"{operation} of {self.object_url(name)} failed: {error.strerror or error}"
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOTDIR, errno.EISDIR):
            raise InvalidInputError(f"{said}{where}. Something on the way is a file: give a folder as url") from error
        if writing and error.errno in _CALLER_MUST_CHANGE:
            raise InvalidInputError(
                f"{said}{where}. Make {self.root} writable for uid {os.geteuid()}, or give another url"
            ) from error
        do = _DO.get(error.errno or 0, "Check the disk and its mount, then try again")
        raise StorageError(f"{said}{where}, after 1 try. {do}") from error


def short_message(object_url: str, expected_bytes: int, found_bytes: int) -> str:
    """Message of an object that ends too early."""
    return (
        f"{object_url} is too short: expected at least {expected_bytes} bytes, found {found_bytes}. It was truncated "
        "after it was committed; restore from another source or an older checkpoint"
    )


def _no_links(object_url: str, error: OSError) -> str:
    return (
        f"create of {object_url} failed: this file system cannot make hard links ({error.strerror}), by which a commit "
        "is made exactly once. Use a file system that can, or an S3 url"
    )


def _fsync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _with_gaps(span: Span) -> list[memoryview]:
    """The span's buffers with scratch memory for the gaps between them."""
    targets: list[memoryview] = []
    position = span.offset_bytes
    for offset, view in span.pieces:
        if offset > position:
            targets.append(memoryview(bytearray(offset - position)))
        targets.append(view)
        position = offset + view.nbytes
    return targets


def _files_below(folder: str, *, hidden: bool = False) -> Iterator[str]:
    """Paths of the files below a folder; none when it does not exist or vanishes meanwhile."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir():
            if not entry.name.startswith("."):
                yield from _files_below(entry.path, hidden=hidden)
        elif hidden or not entry.name.startswith("."):
            yield entry.path


def _empty_folders(root: str) -> list[str]:
    """Folders below the root, it itself not, with nothing in them."""
    return [folder for folder, folders, files in os.walk(root) if folder != root and not folders and not files]


def _stored(root: str, path: str) -> StoredObject | None:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None  # Deleted since the folder was read.
    return StoredObject(os.path.relpath(path, root).replace(os.sep, "/"), stat.st_size, stat.st_mtime)
