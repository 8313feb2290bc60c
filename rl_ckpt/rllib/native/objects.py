"""From what a restricted reading of a pickle gives (`nodes.py`) to real objects: spaces, specs, configs, classes.

Owns: which classes and functions may be imported by the name that a pickle gives. Promises: only classes of RLlib,
gymnasium and torch.nn, and of packages that the caller named, are imported; data classes get their attributes set, and
no constructor is called with what a pickle says, other than gymnasium's spaces. What is left out becomes a
`NotImported`, which tells why. Values that are no nodes (of a file that was read with full trust) pass unchanged.
"""

from __future__ import annotations

import enum
import importlib
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import gymnasium as gym
import numpy as np

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.rllib.native.nodes import Call, Code, Named, Record

_PACKAGES = ("ray.rllib", "gymnasium", "torch.nn", "torch.optim")
_NOT_FROM = ("ray.rllib.examples", "ray.rllib.tests", "ray.rllib.utils.test_utils")
"""Examples: one of their RLModules loads further pickles, from a path in its config."""
_BUILTINS = ("bool", "bytes", "complex", "dict", "float", "int", "list", "object", "set", "str", "tuple")
_TORCH_DTYPES = ("bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8")
_OLD_GYM = "gym.spaces."


class NotImported:
    """Stands for something of a pickle that was not made.

    Attributes:
        name: Of what it was, for people.
        why: What it was and how to have it all the same.
    """

    __slots__ = ("name", "why")

    def __init__(self, name: str, why: str) -> None:
        self.name = name
        self.why = why

    def __repr__(self) -> str:
        return f"<not imported: {self.name}>"


class Objects:
    """Makes real objects out of nodes, within what may be imported.

    Attributes:
        left_out: Every `NotImported` that was made, in order.
    """

    def __init__(self, allow_imports: Sequence[str] = ()) -> None:
        """Takes packages whose classes and functions may be imported too.

        Raises:
            InvalidInputError: It is no list of names of packages.
        """
        if isinstance(allow_imports, str) or not all(isinstance(name, str) and name for name in allow_imports):
            raise InvalidInputError(f"allow_imports={allow_imports!r} must be a list of packages, as ['my_project']")
        self._given = tuple(allow_imports)
        self.left_out: list[NotImported] = []

    def real(self, value: Any) -> Any:
        """A value with all its nodes made, or replaced by a `NotImported`.

        Raises:
            CorruptionError: A node that does not have what every object of its class has.
        """
        if isinstance(value, dict):
            return type(value)((self.real(key), self.real(item)) for key, item in value.items())
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(self.real(item) for item in value)
        if isinstance(value, set | frozenset):
            return type(value)(self.real(item) for item in value)
        if isinstance(value, deque):
            return deque((self.real(item) for item in value), value.maxlen)
        if isinstance(value, Named):
            return self.named(value)
        if isinstance(value, Code):
            return self._not(
                value.name, f"{value.name}: code inside of the pickle, which a restricted reading leaves out"
            )
        if isinstance(value, Record):
            return self._record(value)
        assert not isinstance(value, Call)  # reading refuses it
        return value

    def named(self, what: Named) -> Any:
        """A class or function by name, imported where that is allowed."""
        if what.module in ("builtins", "__builtin__") and what.name in _BUILTINS:
            return getattr(importlib.import_module("builtins"), what.name)
        if what.module == "numpy" and isinstance(getattr(np, what.name, None), type):
            return getattr(np, what.name)
        if what.module == "torch" and what.name in _TORCH_DTYPES:
            return getattr(importlib.import_module("torch"), what.name)
        if not self.may_import(what.module):
            package = what.module.partition(".")[0]
            return self._not(
                what.dotted,
                f"{what.dotted}, which a restricted reading does not import; if it is yours, import with "
                f"allow_imports=[{package!r}]",
            )
        try:
            found: Any = importlib.import_module(what.module)
            for part in what.name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            return self._not(what.dotted, f"{what.dotted}, which is not found here ({error})")
        if not callable(found) or f"{found.__module__}.{found.__qualname__}" != what.dotted:
            return self._not(what.dotted, f"{what.dotted}, which is something else here")
        return found

    def may_import(self, module: str) -> bool:
        """Whether modules of that name may be imported."""
        if _within(module, self._given):
            return True
        return _within(module, _PACKAGES) and not _within(module, _NOT_FROM)

    def _not(self, name: str, why: str) -> NotImported:
        self.left_out.append(NotImported(name, why))
        return self.left_out[-1]

    def _record(self, record: Record) -> Any:
        dotted = record.kind.dotted
        if dotted.startswith(("gymnasium.spaces.", _OLD_GYM)):
            return self._space(record)
        if dotted.startswith(("pathlib.", "pathlib._local.")):
            return str(PurePosixPath(*map(str, record.args)))
        if dotted == "packaging.version.Version":
            return ".".join(map(str, _version(record.state)))
        if dotted.startswith("numpy.random."):
            return self._not(dotted, "a random generator")
        return self._rllib(record)

    def _rllib(self, record: Record) -> Any:
        """An object of one of RLlib's data classes, made as pickle would, except that no code of it runs."""
        kind = self.named(record.kind)
        if isinstance(kind, NotImported):
            return kind
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return self._member(kind, record)
        if not (isinstance(kind, type) and _is_data_class(kind)):
            return self._not(record.kind.dotted, f"an object of {record.kind.dotted}, which is not data")
        if issubclass(kind, dict):
            return self.real(record.items)
        made = object.__new__(kind)
        state = self.real(record.state or {})
        if not isinstance(state, dict):
            raise CorruptionError(f"an object of {record.kind.dotted} whose attributes are a {type(state).__name__}")
        made.__dict__.update(state)
        return made

    def _member(self, kind: type[enum.Enum], record: Record) -> Any:
        try:
            return kind(*record.args)
        except (ValueError, TypeError) as error:
            raise CorruptionError(f"an object of {record.kind.dotted} that is {record.args!r}: {error}") from error

    def _space(self, record: Record) -> Any:
        state = self.real(record.state or {})
        name = record.kind.name
        maker = _SPACES.get(name)
        if maker is None:
            return self._not(record.kind.dotted, f"a space of class {record.kind.dotted}")
        try:
            return maker(dict(state))
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise CorruptionError(
                f"a {name} space whose attributes do not fit ({type(error).__name__}: {error})"
            ) from error


def _within(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _version(state: Any) -> tuple[int, ...]:
    """Of packaging: a tuple of (epoch, release, …), or the attributes of an older one."""
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # slots
        state = state[1]
    if isinstance(state, Mapping):
        inner = state.get("_version", state.get("_release"))
        state = inner.args if isinstance(inner, Record) else (0, inner)
    release = state[1] if isinstance(state, tuple) and len(state) > 1 else None
    if not (isinstance(release, tuple) and all(isinstance(part, int) for part in release)):
        raise CorruptionError(f"a version that is {state!r}")
    return release


def _is_data_class(kind: type) -> bool:
    """Classes of RLlib that are their attributes and nothing more."""
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
    from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
    from ray.rllib.core.rl_module.rl_module import RLModuleConfig, RLModuleSpec
    from ray.rllib.env.env_context import EnvContext
    from ray.rllib.policy.policy import PolicySpec
    from ray.rllib.policy.view_requirement import ViewRequirement

    known = (
        AlgorithmConfig,
        DefaultModelConfig,
        EnvContext,
        MultiRLModuleSpec,
        PolicySpec,
        RLModuleConfig,
        RLModuleSpec,
        ViewRequirement,
    )
    return issubclass(kind, known)


def _shape(state: Mapping[str, Any]) -> Any:
    return state.get("_shape", state.get("shape"))


def _box(state: dict[str, Any]) -> gym.Space[Any]:
    return gym.spaces.Box(state["low"], state["high"], _shape(state), state["dtype"])


def _discrete(state: dict[str, Any]) -> gym.Space[Any]:
    start = state.get("start", 0)
    dtype = state.get("dtype") or np.dtype(np.int64)
    return gym.spaces.Discrete(int(state["n"]), start=int(start), dtype=dtype.type)


def _multi_discrete(state: dict[str, Any]) -> gym.Space[Any]:
    return gym.spaces.MultiDiscrete(state["nvec"], dtype=state["dtype"].type, start=state.get("start"))


def _text(state: dict[str, Any]) -> gym.Space[Any]:
    return gym.spaces.Text(state["max_length"], min_length=state["min_length"], charset=state["_char_str"])


def _dict_space(state: dict[str, Any]) -> gym.Space[Any]:
    return gym.spaces.Dict(OrderedDict(state["spaces"]))


def _tuple_space(state: dict[str, Any]) -> gym.Space[Any]:
    return gym.spaces.Tuple(state["spaces"])


def _multi_binary(state: dict[str, Any]) -> gym.Space[Any]:
    return gym.spaces.MultiBinary(state["n"])


_SPACES: dict[str, Callable[[dict[str, Any]], gym.Space[Any]]] = {
    "Box": _box,
    "Dict": _dict_space,
    "Discrete": _discrete,
    "MultiBinary": _multi_binary,
    "MultiDiscrete": _multi_discrete,
    "Text": _text,
    "Tuple": _tuple_space,
}
