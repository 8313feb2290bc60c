"""The allow list: what a restricted reading of a pickle may make, and how. Everything else is described or refused.

Values are made by functions of this file out of checked arguments, never by what the pickle names. What is only data of
RLlib, gymnasium or the standard library comes as a `Record`; code that a pickle carries by value comes as `Code`.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from rl_ckpt.rllib.native.nodes import Code, Named, Record
from rl_ckpt.state.dtypes import ML_DTYPES

_DTYPE = re.compile(r"[<>=|]?([biufcSUVmM?]\d*(\[\w+\])?|bool|u?int\d+|float\d+|complex\d+)\Z", re.ASCII)
_RECORD_MODULES = ("gymnasium.spaces.", "gym.spaces.", "ray.rllib.")
_RECORDS = {
    "packaging.version.Version",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib._local.PosixPath",
    "numpy.random._pickle.__generator_ctor",
    "numpy.random._pickle.__bit_generator_ctor",
    "numpy.random._pickle.__randomstate_ctor",
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
}
_CODE_MODULES = ("ray.cloudpickle.cloudpickle", "cloudpickle.cloudpickle", "ray.cloudpickle", "cloudpickle")


class UnfinishedArray:
    """An array whose values follow in the pickle."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray[Any, Any] | None = None


class UnfinishedDtype:
    """A dtype whose byte order follows in the pickle."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype


def make(what: Named, args: tuple[Any, ...]) -> Any:
    """What a call of `what` gives, made, described as a `Record` or `Code`, or NotImplemented where it is not allowed.

    Raises:
        ValueError, TypeError: Arguments that no pickle of such a value has.
    """
    maker = _MAKERS.get(what.dotted)
    if maker is not None:
        return maker(*args)
    if what.module in _CODE_MODULES or what.dotted == "functools.partial":
        if what.name in ("_function_setstate", "_class_setstate") and args and isinstance(args[0], Code):
            args[0].parts.extend(args[1:])
            return args[0]
        return Code(what, list(args))
    return record(what, args)


def record(kind: Named, args: tuple[Any, ...]) -> Any:
    """An object of a class as data, or NotImplemented where that class is not allowed."""
    is_class = kind.name.rsplit(".", 1)[-1].lstrip("_")[:1].isupper()  # functions of these modules are not data
    if kind.dotted in _RECORDS or (is_class and f"{kind.module}.".startswith(_RECORD_MODULES)):
        return Record(kind, args)
    return NotImplemented


def finish(value: Any, state: Any) -> Any:
    """A value after the pickle's BUILD; NotImplemented where such a value takes no state.

    Raises:
        ValueError, TypeError: The state does not belong to such a value.
    """
    if isinstance(value, UnfinishedDtype):
        value.dtype = _ordered(value.dtype, state)
        return value
    if isinstance(value, UnfinishedArray):
        value.array = _array(state)
        return value
    if isinstance(value, Record):
        value.state = state
        return value
    if isinstance(value, Code):
        value.parts.append(state)
        return value
    return NotImplemented


def _dtype(kind: Any, align: Any = False, copy: Any = True) -> UnfinishedDtype:
    if isinstance(kind, Named) and kind.module == "ml_dtypes" and kind.name in ML_DTYPES:
        return UnfinishedDtype(np.dtype(getattr(ml_dtypes, kind.name)))
    if not isinstance(kind, str) or not _DTYPE.match(kind):
        raise ValueError(f"numpy.dtype({kind!r}) is no dtype of numbers or text")
    return UnfinishedDtype(np.dtype(kind))


def _ordered(dtype: np.dtype[Any], state: Any) -> np.dtype[Any]:
    _, order, subdtype, names = state[:4]
    if subdtype is not None or names is not None or dtype.hasobject:
        raise ValueError("a dtype of several fields or of Python objects")
    size, kind = state[5], dtype.kind
    if dtype.type in (np.str_, np.bytes_, np.void) and isinstance(size, int) and size > 0:
        dtype = np.dtype(f"{kind}{size // 4 if kind == 'U' else size}")
    if kind in "mM" and len(state) > 8:
        unit, count = state[8][1][:2]
        dtype = _dtype(f"{kind}8[{count}{unit.decode()}]").dtype
    return dtype.newbyteorder(order) if order in ("<", ">") else dtype


def _plain_dtype(value: Any) -> np.dtype[Any]:
    if not isinstance(value, np.dtype):
        raise TypeError(f"{type(value).__name__} where a dtype should be")
    return value


def _array(state: Any) -> np.ndarray[Any, Any]:
    _, shape, dtype, fortran, values = state
    if isinstance(values, list):
        raise ValueError("an array of Python objects")
    flat = np.frombuffer(values, _plain_dtype(dtype))
    return flat.reshape(shape, order="F" if fortran else "C").copy(order="F" if fortran else "C")


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> UnfinishedArray:
    if kind != Named("numpy", "ndarray"):
        raise ValueError(f"an array of class {getattr(kind, 'dotted', kind)!r}")
    return UnfinishedArray()


def _from_buffer(values: Any, dtype: Any, shape: Any, order: Any) -> UnfinishedArray:
    made = UnfinishedArray()
    made.array = _array((1, shape, dtype, order == "F", bytes(values)))
    return made


def _scalar(dtype: Any, value: Any) -> Any:
    kind = _plain_dtype(dtype)
    return np.frombuffer(value, kind, count=1)[0] if kind.itemsize else kind.type()


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise ValueError(f"encoding {encoding!r}")
    return text.encode(encoding)


def _getattr(owner: Any, name: Any) -> Any:
    """An attribute of a class, still by name only."""
    if isinstance(owner, Named) and isinstance(name, str) and name.isidentifier():
        return Named(owner.module, f"{owner.name}.{name}")
    return NotImplemented


def _reconstructor(kind: Any, base: Any, state: Any) -> Any:
    return record(kind, ()) if isinstance(kind, Named) else NotImplemented


def _new(kind: Any, *args: Any) -> Any:
    return record(kind, args) if isinstance(kind, Named) else NotImplemented


def _torch_device(*args: Any) -> Any:
    import torch

    if not args or not all(isinstance(arg, str | int) for arg in args):
        raise TypeError(f"torch.device{args!r}")
    return torch.device(*args)


def _torch_storage(data: Any) -> Any:
    import torch

    try:
        return torch.load(io.BytesIO(bytes(data)), weights_only=True, map_location="cpu")  # torch's restricted reading
    except pickle.UnpicklingError:
        return NotImplemented
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"no torch storage: {error}") from error


def _torch_tensor(
    storage: Any, offset: int, size: Any, stride: Any, requires_grad: bool, hooks: Any, metadata: Any = None
) -> Any:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # typed storages are deprecated, and what such pickles hold
        flat = torch.empty(0, dtype=storage.dtype).set_(storage.untyped())
    return torch.as_strided(flat, tuple(size), tuple(stride), int(offset)).clone()


def _empty(kind: Callable[..., Any]) -> Callable[..., Any]:
    """A container whose items follow: what else it is made with (a default factory) is left out."""

    def make_it(*args: Any) -> Any:
        return kind(*[arg for arg in args if not isinstance(arg, Named | Code | Record)])

    return make_it


def _ints(kind: Callable[..., Any]) -> Callable[..., Any]:
    def make_it(*args: Any) -> Any:
        if not all(arg is None or isinstance(arg, int | float) for arg in args):
            raise TypeError(f"{kind.__name__}{args!r}")
        return kind(*args)

    return make_it


_MAKERS: dict[str, Callable[..., Any]] = {
    **{f"{module}.set": lambda items=(): set(items) for module in ("builtins", "__builtin__")},
    **{f"{module}.frozenset": lambda items=(): frozenset(items) for module in ("builtins", "__builtin__")},
    **{f"{module}.bytes": lambda data=b"": bytes(memoryview(data)) for module in ("builtins", "__builtin__")},
    **{f"{module}.bytearray": lambda data=b"": bytearray(memoryview(data)) for module in ("builtins", "__builtin__")},
    **{f"{module}.complex": _ints(complex) for module in ("builtins", "__builtin__")},
    **{f"{module}.slice": _ints(slice) for module in ("builtins", "__builtin__")},
    **{f"{module}.getattr": _getattr for module in ("builtins", "__builtin__")},
    "builtins.range": _ints(range),
    "__builtin__.xrange": _ints(range),
    "collections.OrderedDict": _empty(OrderedDict),
    "collections.defaultdict": _empty(dict),
    "collections.Counter": _empty(dict),
    "collections.deque": _empty(deque),
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "copy_reg._reconstructor": _reconstructor,
    "copyreg.__newobj__": _new,
    "numpy.dtype": _dtype,
    "torch.device": _torch_device,
    "torch.storage._load_from_bytes": _torch_storage,
    "torch._utils._rebuild_tensor_v2": _torch_tensor,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
}
