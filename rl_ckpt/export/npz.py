"""numpy: an uncompressed .npz file, which `numpy.load` opens with nothing else installed.

dtypes that numpy does not have of its own (bfloat16, float8, int4 …) stand as unsigned integers of the same width; the
metadata say what they are, and `array.view(ml_dtypes.bfloat16)` makes them that again. The metadata are JSON, the text
of the member `__metadata__`. Memory: the largest array, or 64 MiB of small ones.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.export.source import Host, Source, batches, weights_digest
from rl_ckpt.format.digest import digest
from rl_ckpt.state.arrays import flat_bytes
from rl_ckpt.state.dtypes import ML_DTYPES
from rl_ckpt.store.repair import load_repaired

METADATA = "__metadata__"
_BATCH_BYTES = 64 << 20


def write_npz(source: Source, path: Path) -> tuple[str, list[str]]:
    """Writes the file.

    Args:
        source: What goes into it.
        path: Of an empty file.

    Returns:
        The digest of all weights, and texts about damage that was read around.

    Raises:
        InvalidInputError: A name that the format does not have.
        CorruptionError, StorageError: As `Checkpointer.load_state`.
        OSError: The file can't be written.
    """
    if METADATA in source.arrays:
        raise InvalidInputError(f"the name {METADATA!r} is that of the metadata; use another format")
    notices: list[str] = []
    digests: dict[str, tuple[str, tuple[int, ...], str]] = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for names in batches(source, _BATCH_BYTES):
            values, repaired = load_repaired(source.run, source.manifest, source.match(names), False, True)
            notices += repaired
            for name in names:
                host = values.pop(name)
                digests[name] = (*source.dtype_and_shape(name), digest(flat_bytes(host)).hex())
                _add(archive, name, _of_numpys_own(host))
        found = weights_digest(digests)
        foreign = {name: dtype for name, (dtype, _, _) in digests.items() if dtype in ML_DTYPES}
        more = {"dtypes": json.dumps(foreign)} if foreign else {}
        _add(archive, METADATA, np.array(json.dumps(source.metadata(found, more))))
    return found, notices


def _of_numpys_own(host: Host) -> Host:
    return host.view(f"u{host.dtype.itemsize}") if host.dtype.name in ML_DTYPES else host


def _add(archive: zipfile.ZipFile, name: str, host: Host) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, host, allow_pickle=False)
