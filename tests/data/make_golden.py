"""Writes golden checkpoints: `python tests/data/make_golden.py v1/run v1/packed v2`, once a version.

The runs under `v<version>/` stay in git, and `tests/unit/format/test_golden.py` loads them with every release. The
shard files of `v1/run` have a column a chunk, those of `v1/packed` a row a chunk. `v2/run` is a fork of `v2/source`.
"""

from __future__ import annotations

import math
import shutil
import struct
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rl_ckpt import Checkpointer, fork
from rl_ckpt.state.dtypes import ML_DTYPES, dtype_from_name

FOLDER = Path(__file__).resolve().parent
PLAIN_CODES = "?bhilBHILefdFD"


def _numbers(dtype: np.dtype[Any]) -> np.ndarray[Any, np.dtype[Any]]:
    return np.arange(12).reshape(3, 4).astype(np.float32).astype(dtype)


def _plain() -> dict[str, Any]:
    return {
        "none": None,
        "bools": [True, False],
        "ints": [0, -1, 2**53 - 1, 2**53, -(2**63), 10**30],
        "floats": [
            0.0,
            -0.0,
            0.1,
            5e-324,
            1e22,
            math.inf,
            -math.inf,
            struct.unpack("<d", b"\x01\0\0\0\0\0\xf8\xff")[0],
        ],
        "strs": ["", "é中😀\0", "lone \ud800", "long " * 400],
        "bytes": [b"", b"\0\xff", bytes(range(256)) * 8],
        "complex": [1j, complex(math.nan, -0.0)],
        "numpy": [np.float32(1.5), np.int64(-(2**40)), np.bool_(True), np.str_("a\0"), np.bytes_(b"b\0")],
        "numpy too": [np.datetime64("2020-01-02", "D"), np.timedelta64("NaT", "us"), ml_dtypes.bfloat16(3)],
        "void": [np.void(b"abc"), np.array([(1, 2.0)], [("a", ">i4"), ("b", "f8")])[0]],
    }


def _arrays() -> dict[str, Any]:
    shared, big = np.arange(7.0), np.arange(300, dtype=np.int32).reshape(20, 15)
    nested = np.zeros(2, np.dtype([("in", [("x", ">f4"), ("s", "U3")], (2,)), ("when", "M8[us]")]))
    nested["in"]["x"], nested["in"]["s"] = [[1, 2], [3, 4]], [["a", "bc"], ["", "d"]]
    aligned = np.array([(1, 2.5), (3, 4.5)], np.dtype([("a", "i1"), ("b", "f8")], align=True))
    return {
        "native": {code: _numbers(np.dtype(code)) for code in PLAIN_CODES},
        "ml_dtypes": {name: np.array([0, 1], dtype_from_name(name)) for name in ML_DTYPES},
        "big-endian": [_numbers(np.dtype(code)) for code in (">i4", ">f8", ">c8")],
        "dates": [np.array(["2020-01-01T00:00:01", "NaT"], "M8[ns]"), np.arange(3).astype("m8[25s]")],
        "text": [np.array(["ab", "c"]), np.array([b"xyz", b""]), np.array([b"ab\0"], "V3")],
        "strings": [
            np.array(["a", "bc"], np.dtypes.StringDType()),
            np.array([["x", None]], np.dtypes.StringDType(na_object=None)),
        ],
        "structured": [nested, aligned],
        "layouts": [
            np.asfortranarray(big),
            big[::-2, 1::3],
            np.array(3.5),
            np.zeros((0, 4)),
            np.broadcast_to(shared, (2, 7)),
        ],
        "chunks": big,
        "tied": [shared, shared],
    }


def golden_state(step: int) -> dict[str, Any]:
    """What the golden checkpoint of `step` (1 or 2) holds; it needs no torch and no jax but for one torch tensor."""
    import torch

    return {
        "plain": _plain(),
        "arrays": _arrays(),
        "containers": [{}, [], (), OrderedDict(), OrderedDict(z=1, a=(2, [3]))],
        "keys": {0: "int", "0": "str", -1: 1, "": 2, "/": 3, "~": 4, "a/b~c": {5: 6}, 2**70: 7},
        "torch": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "changed": np.full(5, step),
    }


def packed_state() -> dict[str, Any]:
    """What the golden checkpoint with a packed file holds; it is cut into chunks of one element."""
    return {
        "bytes": (np.arange(1100) % 256).astype(np.uint8).reshape(-1, 4),
        "native": {code: _numbers(np.dtype(code))[0] for code in PLAIN_CODES},
        "odd": [np.array(["ab", "c"]), np.arange(3).astype(">i4"), np.array([1.5, 2], ml_dtypes.bfloat16)],
    }


def make_run(folder: Path) -> None:
    """Step 1, and step 2 that shares its files."""
    with Checkpointer(str(folder), chunk_bytes=1024) as ckpt:
        ckpt.save_state(1, golden_state(1), metrics={"return": 12.5, "best": np.float32(2)}).result()
        ckpt.save_state(2, golden_state(2), tag="gold").result()


def make_packed(folder: Path) -> None:
    """Step 1, with more chunks than there may be columns."""
    with Checkpointer(str(folder), chunk_bytes=1) as ckpt:
        ckpt.save_state(1, packed_state()).result()


def make_fork(folder: Path) -> None:
    """Step 1, forked, and step 2 in the fork, which leans on the source's files; made elsewhere, and moved here."""
    with tempfile.TemporaryDirectory() as elsewhere:
        source, run = Path(elsewhere) / "source", Path(elsewhere) / "run"
        with Checkpointer(str(source), chunk_bytes=1024) as ckpt:
            ckpt.save_state(1, golden_state(1), metrics={"return": 12.5, "best": np.float32(2)}).result()
        fork(str(source), str(run))
        with Checkpointer(str(run), chunk_bytes=1024) as ckpt:
            ckpt.save_state(2, golden_state(2), tag="gold").result()
        shutil.copytree(elsewhere, folder)


def main(names: list[str]) -> None:
    """Makes the runs that are named anew."""
    for name in names:
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        {"v1/run": make_run, "v1/packed": make_packed, "v2": make_fork}[name](FOLDER / name)


if __name__ == "__main__":
    main(sys.argv[1:])
