"""The file that an export makes: it appears under its name when it is whole and on the disk, or not at all.

Owns: checking the name before anything is read, the hidden temporary file in the same folder, and the last step. An
error or Ctrl-C leaves nothing; a kill -9 leaves at most the temporary file, whose name begins with a dot and ends with
`.rl_ckpt-tmp`. No file is ever replaced.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rl_ckpt.errors import InvalidInputError, StorageError

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def check_path(path: str | os.PathLike[str] | None, default: str) -> Path:
    """Where the file goes.

    Args:
        path: As the caller gave it; None: `default` in the current folder.
        default: A file's name, of which characters that a name can't have are replaced.

    Raises:
        InvalidInputError: No file can be made there, or there is one.
    """
    text = re.sub(r"[/\\\0]|^\.", "_", default) if path is None else os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidInputError(f"path={path!r} must be the name of a file")
    if _SCHEME.match(text):
        raise InvalidInputError(f"path={text!r} must be a local file; copy it from there to where it is needed")
    target = Path(text)
    if target.is_dir():
        raise InvalidInputError(f"{text} is a folder; give the name of a file, such as {target / default}")
    if os.path.lexists(target):
        raise InvalidInputError(_exists(target))
    if not target.parent.is_dir():
        raise InvalidInputError(f"there is no folder {target.parent}; make it first")
    return target


def _exists(target: Path) -> str:
    return f"{target} exists, and an export replaces no file; remove it or give another name"


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A temporary file for the block to fill; when the block is done, it becomes `target`.

    Raises:
        InvalidInputError: `target` was made by somebody else meanwhile, or the folder may not be written to.
        StorageError: The disk failed, or is full.
    """
    temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}.rl_ckpt-tmp")
    try:
        temporary.touch(mode=0o666, exist_ok=False)
        yield temporary
        _finish(temporary, target)
    except OSError as error:
        if error.errno is None:  # one of this package's own, such as CheckpointNotFoundError
            raise
        said = InvalidInputError if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else StorageError
        raise said(f"{target} can't be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _finish(temporary: Path, target: Path) -> None:
    fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    try:
        os.link(temporary, target)  # fails where there is a file by now; a rename would replace it
    except FileExistsError:
        raise InvalidInputError(_exists(target)) from None
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        os.rename(temporary, target)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # A power cut before this line may leave no file under the name, never a part of one.
        os.fsync(folder)
    finally:
        os.close(folder)
