"""Names of classes and functions: what has one, what it leads to, and what nobody may be led to."""

from __future__ import annotations

import collections
import functools
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_ckpt import InvalidInputError
from rl_ckpt.rllib.refs import class_ref, describe, resolve


class Outer:
    class Inner:
        pass

    @staticmethod
    def static() -> int:
        return 1

    @classmethod
    def made(cls) -> Outer:
        return cls()

    def bound(self) -> None:
        pass


class Heir(Outer):
    pass


def named(value: Any) -> str:
    """For a test's name, which must be the same in every process: without addresses."""
    return re.sub(r" at 0x\w+", "", str(value))


def shadowed() -> int:
    return 1


original: Any = shadowed
shadowed = functools.cache(shadowed)


def local_class() -> type:
    class Local:
        pass

    return Local


def closure(n: int) -> Any:
    def inner() -> int:
        return n

    return inner


@pytest.mark.parametrize(
    ("obj", "ref"),
    [
        (Outer, f"{__name__}:Outer"),
        (Outer.Inner, f"{__name__}:Outer.Inner"),
        (Outer.static, f"{__name__}:Outer.static"),
        (Outer.made, f"{__name__}:Outer.made"),
        (Heir.made, f"{__name__}:Heir.made"),
        (local_class, f"{__name__}:local_class"),
        (torch.nn.ReLU, "torch.nn.modules.activation:ReLU"),
        (torch.nn.init.orthogonal_, "torch.nn.init:orthogonal_"),
        (int, "builtins:int"),
        (collections.OrderedDict, "collections:OrderedDict"),
        (math.tanh, "math:tanh"),
    ],
    ids=named,
)
def test_what_has_a_name_is_found_by_it(obj: Any, ref: str) -> None:
    assert class_ref(obj) == ref
    assert resolve(ref) == obj


@pytest.mark.parametrize(
    ("obj", "said"),
    [
        (lambda: 1, r"a lambda \(test_refs.py, line \d+\)"),
        (closure(1), r"the function inner, made inside .*test_refs:closure \(test_refs.py, line \d+\) .*own \(n\)"),
        (local_class(), "the class Local, made inside .*test_refs:local_class"),
        (Outer().bound, "the method bound of an object of class .*:Outer"),
        (Outer(), "an object of class .*:Outer, which is neither data nor found by a name"),
        (functools.partial(math.tanh, 1), "an object of class functools:partial"),
        (original, "the function .*:shadowed .*stands for something else"),
        (np.tanh, "ufunc"),
        (os.system, "posix:system of Python's own library, which a checkpoint may not name"),
        (subprocess.Popen, "subprocess:Popen of Python's own library"),
        (eval, "builtins:eval of Python's own library"),
    ],
    ids=named,
)
def test_what_has_no_name_is_described(obj: Any, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        class_ref(obj)


def test_a_class_that_its_module_lost_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Heir
    monkeypatch.delattr(sys.modules[__name__], "Heir")
    with pytest.raises(InvalidInputError, match="Heir, which its module does not have"):
        class_ref(lost)


made_here = local_class()
a_lambda = lambda: 1  # noqa: E731  # as people write them
a_closure = closure(2)


@pytest.mark.parametrize("name", ["made_here", "a_lambda", "a_closure"])
def test_what_a_variable_of_a_module_holds_is_found_by_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As RLlib's own examples make environments: `MultiAgentCartPole = make_multi_agent(...)`."""
    module = sys.modules[__name__]
    obj = vars(module)[name]
    assert class_ref(obj) == f"{__name__}:{name}"
    assert resolve(f"{__name__}:{name}") is obj
    elsewhere = types.ModuleType("aaa_elsewhere")
    elsewhere.env = obj  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aaa_elsewhere", elsewhere)
    assert class_ref(obj) == f"{__name__}:{name}"
    monkeypatch.delattr(module, name)
    assert class_ref(obj) == "aaa_elsewhere:env"
    assert resolve("aaa_elsewhere:env") is obj
    with pytest.raises(InvalidInputError, match=f"'{__name__}:{name}' is not found here"):
        resolve(f"{__name__}:{name}")


def in_main(obj: Any) -> Any:
    obj.__module__ = "__main__"
    return obj


def test_the_drivers_script_is_believed_where_main_is_another_one() -> None:
    """In Ray's processes, where classes of the script arrive by value."""
    cls = in_main(type("MazeOfTheScript", (), {}))
    assert class_ref(cls) == "__main__:MazeOfTheScript"
    with pytest.raises(InvalidInputError, match=r"'__main__:MazeOfTheScript' is not found.*in the script that saved"):
        resolve("__main__:MazeOfTheScript")


def test_a_function_of_the_script_that_ray_copied_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    function = in_main(types.FunctionType(local_class.__code__, {}, "make_maze"))
    function.__qualname__ = "make_maze"
    copy = types.FunctionType(function.__code__, {}, "make_maze")
    monkeypatch.setattr(sys.modules["__main__"], "make_maze", copy, raising=False)
    assert class_ref(function) == "__main__:make_maze"
    monkeypatch.setattr(sys.modules["__main__"], "make_maze", closure, raising=False)
    with pytest.raises(InvalidInputError, match="stands for something else"):
        class_ref(function)


def test_a_module_that_is_not_here_is_believed() -> None:
    """A class that came by value into a process that has not its module."""
    cls = type("Far", (), {"__module__": "somewhere.far"})
    assert class_ref(cls) == "somewhere.far:Far"


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("no_such_package.policies:Maze", "'no_such_package.policies:Maze' is not found here.*No module named"),
        ("torch.nn:NoSuchLayer", "'torch.nn:NoSuchLayer' is not found here.*NoSuchLayer"),
        ("numpy:pi", "is a float here, and no class or function"),
        ("numpy", "is no name of a class or function"),
        (":x", "is no name of a class or function"),
        ("os:lambda_of_a_trick", "Python's own library, which a checkpoint may not name"),
        ("builtins:lambda_of_a_trick", "is not found here"),
        ("os:system", "Python's own library, which a checkpoint may not name"),
        ("builtins:eval", "Python's own library, which a checkpoint may not name"),
        ("subprocess:Popen", "Python's own library, which a checkpoint may not name"),
        (f"{__name__}:os.system", "Python's own library, which a checkpoint may not name"),
        ("torch.nn:ReLU", r"leads to 'torch.nn.modules.activation:ReLU' here, which is something else"),
    ],
)
def test_a_name_that_leads_nowhere_or_astray_is_refused(ref: str, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        resolve(ref)


@pytest.mark.parametrize("module", ["this", "package_of_ours.__main__"])
def test_a_module_that_does_something_when_it_is_imported_is_not(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package_of_ours").mkdir()
    for name in ("__init__", "__main__"):
        (tmp_path / "package_of_ours" / f"{name}.py").write_text("class Maze: pass")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(InvalidInputError, match="which a checkpoint may not name"):
        resolve(f"{module}:Maze")
    assert module not in sys.modules


def test_a_module_that_fails_to_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_policies.py").write_text("raise ValueError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidInputError, match=r"'broken_policies:Maze' is not found here \(ValueError: no licence\)"):
        resolve("broken_policies:Maze")


def test_descriptions_name_no_folders() -> None:
    assert str(Path(__file__).parent) not in describe(lambda: 1)
