"""Objects in the memory of this process (fsspec's memory file system): for tests and examples."""

from __future__ import annotations

import threading

from rl_ckpt.store.generic import FsspecStore

_CREATE_LOCK = threading.Lock()


class MemoryStore(FsspecStore):
    """Objects in this process's memory, shared by all stores of the same url in it, not with other processes.

    Args:
        url: `memory://name`.
        storage_options: Only the fields of `RetryPolicy`.
    """

    def _create(self, path: str, data: bytes) -> None:
        # fsspec looks first and then writes; one lock for the process makes that one step.
        with _CREATE_LOCK:
            if self._fs.exists(path):
                raise FileExistsError(path)
            self._fs.pipe_file(path, data)
