"""A run: one process for each group of questions, one after the other, and what the machine is.

A process of its own gives each question a fresh cluster and ends everything it started, however it ends. A question
that fails or takes too long is reported as failed; the others go on.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psutil
from rich.console import Console

from benchmarks import show
from benchmarks.harness import ROOT
from benchmarks.questions import QUESTIONS
from benchmarks.results import Failed, Results, Row
from benchmarks.settings import Settings

_TIMEOUT_S = 600
_TAIL_LINES = 30
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Timeout)\b.*")
PACKAGES = (
    "ray",
    "pyarrow",
    "numpy",
    "fsspec",
    "s3fs",
    "torch",
    "safetensors",
    "orbax-checkpoint",
    "torchrl",
    "obstore",
    "botocore",
)


def run(names: Sequence[str], settings: Settings) -> Results:
    """Answers the questions."""
    console = Console(width=None if os.isatty(1) else 160)
    hardware = machine()
    show.machine(hardware, console)
    begun, rows, failed = time.monotonic(), list[Row](), list[Failed]()
    groups: dict[tuple[str, str], list[str]] = {}
    for name in QUESTIONS:
        if name in names:
            groups.setdefault((QUESTIONS[name].module, QUESTIONS[name].function), []).append(name)
    for (module, function), group in groups.items():
        started = time.monotonic()
        answer = _ask(module, function, settings)
        took = time.monotonic() - started
        if isinstance(answer, str):
            failed += [Failed(name, answer) for name in group]
            console.print(f"[red]{', '.join(group)}: failed after {took:.0f} s[/]", highlight=False)
            console.print(answer, markup=False, highlight=False)
            continue
        console.print(f"{', '.join(group)}: {took:.0f} s", highlight=False)
        chosen = [row for row in answer if row.question in group]
        rows += chosen
        for name in group:
            show.question(name, [row for row in chosen if row.question == name], console)
    order = list(QUESTIONS)
    return Results(
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=hardware,
        settings=settings.as_dict(),
        seconds=time.monotonic() - begun,
        rows=tuple(sorted(rows, key=lambda row: order.index(row.question))),
        failed=tuple(failed),
    )


def _ask(module: str, function: str, settings: Settings) -> list[Row] | str:
    """Rows, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")
        command = [sys.executable, "-m", "benchmarks", "answer", module, function]
        command += [json.dumps(settings.as_dict()), str(out)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with open(Path(folder, "said"), "w+") as said:
            process = subprocess.Popen(
                command, stdout=said, stderr=said, cwd=ROOT, env=environment, start_new_session=True
            )
            try:
                code = process.wait(_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
            said.seek(0)
            tail = "".join(said.readlines()[-_TAIL_LINES:])
        if code is None:
            return f"no answer after {_TIMEOUT_S} s\n{tail}"
        if code != 0:
            return f"{_last_words(tail) or f'ended with {code}'}\n{tail}"
        return msgspec.json.decode(out.read_bytes(), type=list[Row])


def _last_words(tail: str) -> str:
    """The exception that ended a process, as far as it said one."""
    lines = [line for line in tail.splitlines() if _EXCEPTION.match(line)]
    return lines[-1] if lines else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and whatever it left, by id: Ray's daemons have process groups of their own."""
    family = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def answer(module: str, function: str, settings: str, out: Path) -> None:
    """Answers one group of questions in this process; the rows go to a file."""
    measure = getattr(importlib.import_module(f"benchmarks.questions.{module}"), function)
    out.write_bytes(msgspec.json.encode(measure(Settings(**json.loads(settings)))))


def machine() -> dict[str, str]:
    """What is measured on, and with."""
    found = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> str:
    with suppress(FileNotFoundError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
