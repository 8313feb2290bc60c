"""Large chunks of local files are read and hashed piece by piece: what is wrong with one is found in any piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rl_ckpt import Checkpointer
from rl_ckpt.errors import CorruptionError
from rl_ckpt.store.local_files import PIECE_BYTES

CHUNK = 3 * PIECE_BYTES + 4096
VALUES = np.random.default_rng(0).random(2 * CHUNK // 8)


@pytest.fixture
def run(tmp_path: Path) -> tuple[str, Path]:
    """A run with a checkpoint of two large chunks, and its only shard file."""
    url = str(tmp_path / "run")
    with Checkpointer(url, chunk_bytes=CHUNK, write_streams=1) as ckpt:
        ckpt.save_state(0, {"w": VALUES}).result(60)
    (path,) = Path(url).rglob("*.arrow")
    return url, path


def test_what_was_saved_comes_back(run: tuple[str, Path]) -> None:
    assert Checkpointer(run[0]).load_state()["w"].tobytes() == VALUES.tobytes()


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 6])
def test_a_flipped_bit_in_any_piece_is_found(run: tuple[str, Path], at: int) -> None:
    data = bytearray(run[1].read_bytes())
    begin = data.index(VALUES[:16].tobytes())
    data[begin + at * PIECE_BYTES + 5] ^= 1
    run[1].write_bytes(data)
    with pytest.raises(CorruptionError, match="is damaged: xxh3-128"):
        Checkpointer(run[0]).load_state(0)


def test_a_file_that_ends_early_is_named(run: tuple[str, Path]) -> None:
    run[1].write_bytes(run[1].read_bytes()[: CHUNK + 100_000])
    with pytest.raises(CorruptionError, match=r"has \d+ bytes; checkpoint .* names"):
        Checkpointer(run[0]).load_state(0)


def test_a_file_that_is_missing_is_named(run: tuple[str, Path]) -> None:
    run[1].unlink()
    with pytest.raises(CorruptionError, match="is missing, though checkpoint"):
        Checkpointer(run[0]).load_state(0)
