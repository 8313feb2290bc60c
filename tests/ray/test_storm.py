"""A short storm: every kind of process is killed at least once, amid saves and restores; nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ray.holders import several_nodes
from tests.s3_servers import S3Server
from tests.soak.leaks import checkpointer, grown, many_saves
from tests.soak.storm import ROUNDS, storm

SEED = 20
ONE, TWO = [one for one in ROUNDS if len(one) == 1], [two for two in ROUNDS if len(two) > 1]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("store", "persist_every", "kinds"), [("local", 1, ONE), pytest.param("s3", 3, TWO, marks=pytest.mark.soak)]
)
def test_a_short_storm_loses_nothing(
    store: str, persist_every: int, kinds: list[tuple[str, ...]], tmp_path: Path, moto_server: S3Server
) -> None:
    url, options = str(tmp_path / "run"), {}
    if store == "s3":
        url, options = f"s3://{moto_server.new_bucket()}/run", moto_server.storage_options()
    tally = storm(0.0, SEED, url, options, print, options={"persist_every": persist_every}, kinds=kinds)
    print("\n".join(tally.lines()))
    assert tally.lost == []
    assert tally.gave_up == 0, "supervision never ends by a loss"
    assert all(tally.kills[kind] for both in kinds for kind in both)
    assert tally.committed >= tally.rounds == len(kinds)
    assert bool(tally.only_in_memory) == (persist_every > 1)


def test_saves_and_restores_leave_memory_and_files_flat(tmp_path: Path) -> None:
    with several_nodes(3), checkpointer(str(tmp_path / "run")) as ckpt:
        looks = many_saves(ckpt, 40, 10, print, size=1 << 16)
    assert grown(looks[1], looks[-1]) == []
