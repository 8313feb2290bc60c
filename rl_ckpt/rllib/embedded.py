"""Pickles inside of strings.

RLlib writes some arrays (of filters and spaces) as base64 of a compressed numpy file, and reads them back with
`allow_pickle=True`. So a string may hold a pickle that runs when it is given to RLlib, long after the file it came from
was read. Owns: finding such strings.
"""

from __future__ import annotations

import base64
import binascii
import io
import zlib
from typing import Any

import numpy as np

_SHORTEST = 24  # characters of base64 that a compressed numpy file needs at the least


def hides_pickle(value: Any) -> bool:
    """Whether RLlib's reading of a string would unpickle something: it is compressed, and no array of plain numbers."""
    if not isinstance(value, str | bytes) or len(value) < _SHORTEST:
        return False
    try:
        data = zlib.decompress(base64.b64decode(value))  # exactly as RLlib does it
    except (binascii.Error, ValueError, zlib.error):
        return False
    try:
        return not isinstance(np.load(io.BytesIO(data), allow_pickle=False), np.ndarray)
    except (ValueError, OSError, EOFError):
        return True
