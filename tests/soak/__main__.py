"""`python -m tests.soak`: the storm, on local disk and on S3 in turn, then many saves whose leftovers are counted."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.ray.holders import several_nodes
from tests.s3_servers import run_moto
from tests.soak.leaks import checkpointer, grown, many_saves
from tests.soak.storm import Tally, storm

_SAVES, _LOOK_EVERY, _WARM_UP = 200, 20, 40


def main() -> int:
    """Prints the tables; 1 where anything was lost."""
    parser = argparse.ArgumentParser(description="Kills parts of a job at random, and counts what is lost.")
    parser.add_argument("--seconds", type=float, default=600.0, help="for both storms together (default 600)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31), help="replays a storm")
    parser.add_argument("--store", choices=("local", "s3", "both"), default="both")
    asked = parser.parse_args()
    stores = ("local", "s3") if asked.store == "both" else (asked.store,)
    tallies = [_storm(store, asked.seconds / len(stores), asked.seed) for store in stores]
    more = _flat()
    return 1 if more or any(tally.lost for tally in tallies) else 0


def _storm(store: str, seconds: float, seed: int) -> Tally:
    _say(f"storm over {store}, {seconds:.0f} s, seed {seed}")
    with tempfile.TemporaryDirectory(prefix="rl_ckpt-soak-") as folder:
        if store == "local":
            tally = storm(seconds, seed, str(Path(folder) / "run"), {}, _say)
        else:
            with run_moto() as server:
                tally = storm(seconds, seed, f"s3://{server.new_bucket()}/run", server.storage_options(), _say)
    _say("\n".join(["", f"{store}:", *tally.lines(), ""]))
    return tally


def _flat() -> list[str]:
    """What many saves leave behind, and must not."""
    _say(f"{_SAVES} saves on 3 nodes:")
    with (
        tempfile.TemporaryDirectory(prefix="rl_ckpt-soak-") as folder,
        several_nodes(3),
        checkpointer(str(Path(folder) / "run")) as ckpt,
    ):
        looks = many_saves(ckpt, _SAVES, _LOOK_EVERY, _say)
    more = grown(next(look for look in looks if look.saves >= _WARM_UP), looks[-1])
    _say("\n".join(more) or "nothing grew")
    return more


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
