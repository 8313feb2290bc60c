"""`python -m tests.soak`: the storm, on local disk and on S3 in turn, then many saves whose leftovers are counted."""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    parser.add_argument("--persist-every", type=int, help="default: storms of 1 and of 3")
    parser.add_argument("--no-leaks", action="store_true", help="the storms alone")
    asked = parser.parse_args()
    stores = ("local", "s3") if asked.store == "both" else (asked.store,)
    every = (1, 3) if asked.persist_every is None else (asked.persist_every,)
    storms = [(store, k) for store in stores for k in every]
    tallies = [_storm(store, k, asked.seconds / len(storms), asked.seed) for store, k in storms]
    more = [] if asked.no_leaks else [line for store in stores for line in _flat(store)]
    return 1 if more or any(tally.lost for tally in tallies) else 0


def _storm(store: str, persist_every: int, seconds: float, seed: int) -> Tally:
    title = f"storm over {store}, every {persist_every}. save to the store"
    _say(f"{title}: {seconds:.0f} s, seed {seed}")
    with _place(store) as (url, storage_options):
        tally = storm(seconds, seed, url, storage_options, _say, options={"persist_every": persist_every})
    _say("\n".join(["", f"{title}:", *tally.lines(), ""]))
    return tally


def _flat(store: str) -> list[str]:
    """What many saves leave behind, and must not."""
    _say(f"{_SAVES} saves on 3 nodes over {store}:")
    with _place(store) as (url, options), several_nodes(3), checkpointer(url, storage_options=options) as ckpt:
        looks = many_saves(ckpt, _SAVES, _LOOK_EVERY, _say)
    more = grown(next(look for look in looks if look.saves >= _WARM_UP), looks[-1])
    _say("\n".join(more) or "nothing grew")
    return more


@contextlib.contextmanager
def _place(store: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Url and storage options of a new run."""
    if store == "local":
        with tempfile.TemporaryDirectory(prefix="rl_ckpt-soak-") as folder:
            yield str(Path(folder) / "run"), {}
    else:
        with run_moto() as server:
            yield f"s3://{server.new_bucket()}/run", server.storage_options()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
