"""Cold start: `import rl_ckpt` after `import ray`, in fresh processes; and the first save on a running cluster.

What a user pays for us is the import beside the one of Ray, which every user has: both are imported in one process. The
first save is the whole of it: constructor, starting the service, staging, commit; the workers are there.
"""

from __future__ import annotations

import subprocess
import sys

import rl_ckpt
from benchmarks import harness
from benchmarks.results import LIMIT, Goal, Row, Series
from benchmarks.settings import WARM_UP, Settings

_MIB = 1


def measure(settings: Settings) -> list[Row]:
    """One row for each."""
    return [_imports(settings), _first_save(settings)]


def _imports(settings: Settings) -> Row:
    programs = {"ours": "import ray, rl_ckpt; rl_ckpt.Checkpointer", LIMIT: "import ray", "alone": "import rl_ckpt"}
    ways: harness.Ways = {name: lambda _, code=code: {"import": _program(code)} for name, code in programs.items()}
    found = harness.rounds(settings.starts, ways)
    ours, limit, alone = (Series(name, tuple(found[name]["import"])) for name in programs)
    alone = Series("import rl_ckpt alone", alone.values)
    return Row("cold", "import ray, rl_ckpt", "s", ours, limit, (alone,), (Goal("at most", 1, plus=0.3),))


def _program(code: str) -> float:
    return harness.timed(lambda: subprocess.run([sys.executable, "-c", code], check=True, cwd=harness.ROOT))


def _first_save(settings: Settings) -> Row:
    took = []
    with (
        harness.cluster(4 * settings.workers),
        harness.folder() as folder,
        harness.team(settings.workers, _MIB << 20, "sharded") as actors,
    ):
        for number in range(WARM_UP + settings.starts):

            def first(number: int = number) -> None:
                ckpt = rl_ckpt.Checkpointer(str(folder / f"run-{number}"))
                runs.append(ckpt)
                ckpt.save(0, actors).result()

            runs: list[rl_ckpt.Checkpointer] = []
            took.append(harness.timed(first))
            runs[0].close()
    case = f"first save until durable, {settings.workers} workers"
    return Row("cold", case, "s", Series("ours", tuple(took[WARM_UP:])), goals=(Goal("at most", 0, "", plus=3.0),))
