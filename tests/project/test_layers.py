"""Imports point downward only, and `import rl_ckpt` stays light (STYLE.md, "The house")."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rl_ckpt"

FLOORS = ("ground", "state", "format", "plan", "store", "runtime", "faces")
GROUND = {"_version", "errors", "info", "logs", "metrics", "options", "signals"}
ROOMS = {"state", "format", "plan", "store", "runtime"}
FACES = {"", "catalog", "checkpointer", "cli", "demo", "export", "lineage", "prefetching", "rllib", "transfer", "web"}
# Installed for the tests, never for users.
TEST_ONLY = {"duckdb", "hypothesis", "moto", "polars", "pytest"}
# Optional or heavy: a module-level import of one would make everybody pay for it, or fail without the extra.
NEVER_AT_MODULE_LEVEL = {"jax", "jaxlib", "torch"}
# Faces that nobody imports by accident, and what they may import at module level: their extra, or a script's needs.
AT_HOME = {"demo": {"ray"}, "rllib": {"ray", "torch"}, "export": {"ray", "torch"}}


@dataclasses.dataclass(frozen=True, slots=True)
class Import:
    """One imported module, as a dotted name, and where the statement stands."""

    name: str
    line: int
    lazy: bool
    """Inside a function."""
    typing_only: bool
    """Under `if TYPE_CHECKING`."""


def floor_of(module: str) -> str:
    """The floor of `rl_ckpt.<room>…`; a room that STYLE.md does not know is an error."""
    room = module.removeprefix("rl_ckpt").lstrip(".").split(".")[0]
    if room in GROUND:
        return "ground"
    if room in ROOMS:
        return room
    if room in FACES:
        return "faces"
    raise AssertionError(f"{module}: {room!r} stands on no floor; give it one here and in STYLE.md")


def name_of(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _targets(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        up = module.split(".")
        up = up[: len(up) - node.level + is_package]
        base = ".".join([*up, base] if base else up)
    # `from rl_ckpt import store` and `from . import store` import the room, not a name of the face `rl_ckpt`.
    if base != "rl_ckpt":
        return [base]
    # A name in capitals (or `__version__`) is the face's own.
    return [
        f"{base}.{alias.name}" if alias.name.strip("_").islower() and not alias.name.startswith("__") else base
        for alias in node.names
    ]


def imports_of(source: str, module: str, *, is_package: bool = False) -> list[Import]:
    """All imports of one module, however deep."""

    def walk(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                for name in _targets(child, module, is_package):
                    yield Import(name, child.lineno, lazy, typing_only)
            elif isinstance(child, ast.If) and _is_type_checking(child.test):
                for part in child.body:
                    yield from walk(ast.Module([part], []), lazy, True)
                for part in child.orelse:
                    yield from walk(ast.Module([part], []), lazy, typing_only)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, lazy or inside, typing_only)

    return list(walk(ast.parse(source), False, False))


def violations(module: str, imports: list[Import]) -> list[str]:
    """What of `imports` the house does not allow, ready for a person."""
    floor = floor_of(module)
    bad = []
    for item in imports:
        where = f"{module}:{item.line} ({floor})"
        top = item.name.split(".")[0]
        if top == "rl_ckpt":
            target = floor_of(item.name)
            if FLOORS.index(target) > FLOORS.index(floor):
                bad.append(f"{where} imports {item.name} from the floor above, {target}")
            elif floor == "ground" and item.name not in {"rl_ckpt.errors", "rl_ckpt.logs"}:
                bad.append(f"{where} imports {item.name}; the ground imports nothing of the package but errors, logs")
        elif top in TEST_ONLY:
            bad.append(f"{where} imports {top}, which users do not have")
        elif top in NEVER_AT_MODULE_LEVEL and not (item.lazy or item.typing_only or top in _at_home(module)):
            bad.append(f"{where} imports {top} at module level; import it inside the function that needs it")
        elif top == "ray" and floor not in {"runtime", "faces"}:
            bad.append(f"{where} imports ray; below the runtime everything works without it")
        elif top == "ray" and floor == "faces" and not (item.lazy or item.typing_only or top in _at_home(module)):
            bad.append(f"{where} imports ray at module level; a face imports it inside functions")
    return bad


def _at_home(module: str) -> set[str]:
    return AT_HOME.get(".".join(module.split(".")[1:2]), set())


def test_imports_point_downward() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    bad = []
    for path in files:
        module = name_of(path, ROOT)
        bad += violations(module, imports_of(path.read_text(), module, is_package=path.name == "__init__.py"))
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("rl_ckpt.format.manifest", "from rl_ckpt.plan.write import plan", "floor above, plan"),
        ("rl_ckpt.format.manifest", "from ..plan import write", "floor above, plan"),
        ("rl_ckpt.format.manifest", "def f():\n from rl_ckpt import store", "floor above, store"),
        ("rl_ckpt.format.manifest", "from .. import Checkpointer", "floor above, faces"),
        ("rl_ckpt.errors", "from rl_ckpt.options import SaveOptions", "imports nothing of the package"),
        ("rl_ckpt.store.log", "def f():\n import ray.util", "works without it"),
        ("rl_ckpt.checkpointer", "import ray", "inside functions"),
        ("rl_ckpt.state.torch", "import torch", "at module level"),
        ("rl_ckpt.rllib.learner", "import jax", "at module level"),
        ("rl_ckpt.checkpointer", "import torch", "at module level"),
        ("rl_ckpt.state.tree", "try:\n import jax\nexcept ImportError:\n pass", "at module level"),
        ("rl_ckpt.store.s3", "def f():\n import moto", "users do not have"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, said: str) -> None:
    try:
        found = violations(module, imports_of(source, module))
    except AssertionError as error:
        found = [str(error)]
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rl_ckpt.runtime.coordinator", "import ray\nfrom rl_ckpt.store import log\nfrom . import machine"),
        ("rl_ckpt.checkpointer", "def f():\n import ray"),
        ("rl_ckpt.demo.train", "import ray\nfrom rl_ckpt import checkpointer"),
        ("rl_ckpt.rllib.learner", "import torch\nfrom ray.rllib import algorithms\nfrom rl_ckpt.runtime import calls"),
        ("rl_ckpt.state.torch", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n import torch"),
        ("rl_ckpt.format.manifest", "from rl_ckpt.errors import CorruptionError\nfrom ..state import box"),
    ],
)
def test_a_right_import_is_allowed(module: str, source: str) -> None:
    assert violations(module, imports_of(source, module)) == []


def test_import_of_the_package_is_light() -> None:
    heavy = ["gymnasium", "jax", "matplotlib", "ray", "s3fs", "torch"]
    code = f"import json, sys, rl_ckpt; print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []
