"""Writes the pinned requirement files from the ranges in pyproject.toml; `make pins` runs it.

One resolution covers all extras, and every file is cut from it, so that all of them can be installed into one
environment in any order. The build backend is pinned too, as the package itself is installed without build isolation.
Promises nothing about platforms other than the one it runs on (Linux, the lowest supported Python).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FILES = {
    "demo": "demo",
    "rllib": "rllib",
    "cluster": "cluster",
    "test": "test",
    "bench": "bench",
    "lint": "lint,test",
    "docs": "docs",
}


def resolve(extras: str, build: list[str], constraints: Path | None) -> dict[str, str]:
    """Distribution name to version of everything that `.[extras]` needs, this project left out."""
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), f"{ROOT}[{extras}]", *build]
        if constraints is not None:
            command += ["--constraint", str(constraints)]
        subprocess.run(command, check=True)
        entries = json.loads(report.read_text())["install"]
    found = {entry["metadata"]["name"]: entry["metadata"]["version"] for entry in entries}
    found.pop("rl-ckpt")
    # A local version (2.13.0+cpu) says which build was taken here; the release is what is pinned.
    return {name: version.split("+")[0] for name, version in found.items()}


def text(pins: dict[str, str]) -> str:
    """Requirement lines, sorted without regard to case."""
    return "".join(f"{name}=={pins[name]}\n" for name in sorted(pins, key=str.lower))


def main() -> None:
    """Resolves everything once, then cuts each file from it."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    with tempfile.TemporaryDirectory() as tmp:
        everything = Path(tmp, "all.txt")
        everything.write_text(text(resolve(",".join(sorted({*FILES, *FILES.values()})), build, None)))
        for name, extras in FILES.items():
            pins = resolve(extras, build, everything)
            header = f"# Made by `make pins`: all that rl-ckpt[{extras}] needs. Ranges: pyproject.toml.\n"
            (HERE / f"{name}.txt").write_text(header + text(pins))
            print(f"requirements/{name}.txt: {len(pins)} packages")


if __name__ == "__main__":
    main()
