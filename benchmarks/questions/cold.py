"""Cold start: `import rl_ckpt` after `import ray`, in fresh processes; and the first save on a running cluster.

What a user pays for us is the import beside the one of Ray, which every user has: both are imported in one process. The
first save is the whole of it: constructor, starting the service, staging, commit; the workers are there.
"""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial

import rl_ckpt
from benchmarks import harness
from benchmarks.results import LIMIT, Goal, Row, Series
from benchmarks.settings import WARM_UP, Settings

_MIB = 1


def measure(settings: Settings) -> list[Row]:
    """One row for each."""
    return [*_imports(settings), _first_save(settings)]


def _imports(settings: Settings) -> list[Row]:
    programs = {"ours": "import ray, rl_ckpt; rl_ckpt.Checkpointer", LIMIT: "import ray", "alone": "import rl_ckpt"}
    ways: harness.Ways = {name: partial(_program, code) for name, code in programs.items()}
    found = harness.rounds(settings.starts, ways)
    ours, limit, alone = (Series(name, tuple(found[name]["import"])) for name in programs)
    return [
        Row("cold", "import ray, rl_ckpt", "s", ours, limit, goals=(Goal("at most", 1, plus=0.3),)),
        Row("cold", "import rl_ckpt", "s", alone, limit),
    ]


def _program(code: str, _round: int) -> dict[str, float]:
    run = partial(subprocess.run, [sys.executable, "-c", code], check=True, cwd=harness.ROOT)
    return {"import": harness.timed(run)}


def _first_save(settings: Settings) -> Row:
    took = []
    with (
        harness.cluster(4 * settings.workers),
        harness.folder() as folder,
        harness.team(settings.workers, _MIB << 20, "sharded") as actors,
    ):
        for number in range(WARM_UP + settings.starts):
            begun = time.perf_counter()
            with rl_ckpt.Checkpointer(str(folder / f"run-{number}")) as ckpt:
                ckpt.save(0, actors).result()
                took.append(time.perf_counter() - begun)
    case = f"first save until durable, {settings.workers} workers"
    return Row("cold", case, "s", Series("ours", tuple(took[WARM_UP:])), goals=(Goal("at most", 0, "", plus=3.0),))
