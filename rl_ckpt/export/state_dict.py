"""state_dict: what `torch.save` writes of a dict of plain tensors; `torch.load(path, weights_only=True)` reads it.

The tensors have the names of the module's state dict, so that `module.load_state_dict(torch.load(...))` is all there is
to do. The metadata are JSON, in a record of their own beside torch's (a .pt file is a zip archive): torch ignores it.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.export.source import Source, weights_digest
from rl_ckpt.format.digest import digest
from rl_ckpt.state.arrays import flat_bytes, from_host, to_host
from rl_ckpt.store.repair import load_repaired

RECORD = "rl_ckpt.json"
"""Name of the metadata's record, below the archive's folder, as torch's own records."""
_FOLDER = "archive"  # torch names it after the file otherwise, which has a temporary name


def write_state_dict(source: Source, path: Path) -> tuple[str, list[str]]:
    """Writes the file.

    Args:
        source: What goes into it; all of it is in memory at once.
        path: Of an empty file.

    Returns:
        The digest of all weights, and texts about damage that was read around.

    Raises:
        InvalidInputError: torch is not installed, or has no such dtype.
        CorruptionError, StorageError: As `Checkpointer.load_state`.
        OSError: The file can't be written.
    """
    torch = import_torch("state_dict")
    hosts, notices = load_repaired(source.run, source.manifest, source.match([*source.arrays]), False, True)
    tensors: dict[str, Any] = {}
    for name, host in hosts.items():
        try:
            tensors[name] = from_host(host, "torch")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InvalidInputError(
                f"torch has no tensor of dtype {host.dtype} ({name}); leave it out, or use format='numpy'"
            ) from error
    found = weights_digest(
        {
            name: (*source.dtype_and_shape(name), digest(flat_bytes(to_host(t, "torch"))).hex())
            for name, t in tensors.items()
        }
    )
    with path.open("wb") as file:
        torch.save(tensors, file)
    with zipfile.ZipFile(path, "a") as archive:
        record = zipfile.ZipInfo(f"{_FOLDER}/{RECORD}")  # with no time of now: equal weights give equal files
        archive.writestr(record, json.dumps(source.metadata(found)))
    return found, notices


def import_torch(format: str) -> Any:
    """torch, or an error that says how to get it.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"format={format!r} needs torch: pip install 'rl-ckpt[torch]'") from error
    return torch
