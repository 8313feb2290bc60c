"""The public surface: a sorted, complete, documented list, and errors that survive the way between processes."""

from __future__ import annotations

import inspect
import pickle
import re
import tomllib
import types
from pathlib import Path

import pytest

import rl_ckpt
from rl_ckpt import errors


def _error_classes() -> list[type[errors.CheckpointError]]:
    found = [errors.CheckpointError]
    for cls in found:
        found += [sub for sub in cls.__subclasses__() if sub.__module__ == errors.__name__ and sub not in found]
    return sorted(found, key=lambda cls: cls.__name__)


def test_the_list_is_sorted() -> None:
    assert list(rl_ckpt.__all__) == sorted(set(rl_ckpt.__all__))


def _is_public(name: str) -> bool:
    if name.startswith("_") or name in {"TYPE_CHECKING", "annotations"}:
        return False
    return not isinstance(getattr(rl_ckpt, name), types.ModuleType)


def test_the_list_is_complete() -> None:
    # dir() and getattr, so that names which a module __getattr__ imports on first use count too.
    public = {name for name in dir(rl_ckpt) if _is_public(name)}
    listed = {name for name in rl_ckpt.__all__ if not name.startswith("_")}
    assert public == listed
    assert all(getattr(rl_ckpt, name) is not None for name in rl_ckpt.__all__)


@pytest.mark.parametrize("name", [name for name in rl_ckpt.__all__ if not name.startswith("_")])
def test_a_public_name_says_what_it_is(name: str) -> None:
    value = getattr(rl_ckpt, name)
    doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc
    # The signature that dataclasses write by themselves is no docstring.
    assert not doc.startswith(f"{name}("), f"{name} has no docstring of its own"
    if not inspect.isclass(value):
        return
    silent = [
        method
        for method, member in vars(value).items()
        if not method.startswith("_")
        and isinstance(member, types.FunctionType | property | classmethod | staticmethod)
        and not member.__doc__
    ]
    assert silent == [], f"public methods of {name} without a docstring"


def test_the_version_is_the_distribution() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert rl_ckpt.__version__ == project["version"]


@pytest.mark.parametrize("cls", _error_classes())
def test_an_error_survives_pickling(cls: type[errors.CheckpointError]) -> None:
    if cls is errors.WorkerFailuresError:
        error: errors.CheckpointError = errors.WorkerFailuresError("2 workers failed", {0: "lost", 3: "no memory"}, [0])
    else:
        error = cls("step 7: what happened; what to do")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is cls
    assert (str(back), back.code, vars(back)) == (str(error), error.code, vars(error))


def test_the_codes_are_stable_words_and_differ() -> None:
    codes = [cls.code for cls in _error_classes()]
    assert len(set(codes)) == len(codes)
    assert [code for code in codes if not re.fullmatch(r"[a-z]+(_[a-z]+)*", code)] == []


@pytest.mark.parametrize("cls", _error_classes())
def test_an_error_is_found_by_its_code(cls: type[errors.CheckpointError]) -> None:
    error = errors.from_code(cls.code, "message")
    assert (type(error), str(error)) == (cls, "message")
