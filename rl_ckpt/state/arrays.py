"""Array adapters: numpy, torch and jax arrays as host bytes and back.

Owns: recognising an array, its spec, a host view of its values (zero-copy on the CPU), and making or filling an array
of the same kind. Promises: bits are kept, for every dtype that has a name (state/dtypes.py). torch and jax are used
only where the process has imported them already, or where a checkpoint holds their arrays.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import msgspec
import numpy as np

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.state import cuda
from rl_ckpt.state.boxes import Box, overlap, slices
from rl_ckpt.state.dtypes import ML_DTYPES, dtype_from_name, dtype_name

Host = np.ndarray[Any, np.dtype[Any]]

# Kinds of leaf whose values are kept as array bytes. "bytes", "str" and "pickle" are long plain leaves.
NUMPY, TORCH, PARAMETER, FROZEN_PARAMETER, DTENSOR, JAX = (
    "numpy", "torch", "torch.Parameter", "torch.Parameter.frozen", "torch.DTensor", "jax",
)  # fmt: skip
BYTES, STR, PICKLE = "bytes", "str", "pickle"
LONG_PLAIN = (BYTES, STR, PICKLE)
_TORCH_KINDS = frozenset((TORCH, PARAMETER, FROZEN_PARAMETER, DTENSOR))
KINDS = frozenset((NUMPY, JAX, *_TORCH_KINDS, *LONG_PLAIN))


class ArraySpec(msgspec.Struct, frozen=True, gc=False):
    """What an array is: the kind of its library, the dtype's name and the shape in elements."""

    kind: str
    dtype: str
    shape: tuple[int, ...]


class UnsupportedLeafError(Exception):
    """Inside the state floor only: why a leaf can't be stored. The tree adds the path."""


def _loaded(name: str) -> ModuleType | None:
    return sys.modules.get(name)


def kind_of(leaf: object) -> str | None:
    """The kind of an array, or None where `leaf` is none.

    Raises:
        UnsupportedLeafError: An array that can't be stored; the message says why.
    """
    if isinstance(leaf, np.ndarray):
        if type(leaf) not in (np.ndarray, np.memmap):
            raise UnsupportedLeafError(f"a {type(leaf).__name__} is not a plain array; give `np.asarray(...)` of it")
        return NUMPY
    torch = _loaded("torch")
    if torch is not None and isinstance(leaf, torch.Tensor):
        return _torch_kind(leaf, torch)
    jax = _loaded("jax")
    if jax is not None and isinstance(leaf, jax.Array):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise UnsupportedLeafError("a jax array of an extended dtype; give `jax.random.key_data(key)` instead")
        if not leaf.is_fully_addressable:
            raise UnsupportedLeafError(
                "a jax array that spans processes; give its local part as `rl_ckpt.Sharded(part, global_shape, offset)`"
            )
        return JAX
    return None


def _torch_kind(tensor: Any, torch: Any) -> str:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise UnsupportedLeafError(f"a torch tensor of layout {tensor.layout}; give a dense one (`tensor.to_dense()`)")
    if tensor.is_meta:
        raise UnsupportedLeafError("a torch tensor on the meta device has no values")
    cls = type(tensor)
    if cls is torch.Tensor:
        return TORCH
    if cls is torch.nn.Parameter:
        return PARAMETER if tensor.requires_grad else FROZEN_PARAMETER
    if cls.__name__ == "DTensor" and cls.__module__.startswith("torch.distributed"):
        return DTENSOR
    raise UnsupportedLeafError(f"a {cls.__name__} is not a plain tensor; give `tensor.as_subclass(torch.Tensor)`")


def spec_of(leaf: Any, kind: str) -> ArraySpec:
    """Spec of an array of a known kind, without touching its values.

    Raises:
        UnsupportedLeafError: Its dtype has no name on storage.
    """
    name = _torch_dtype_name(leaf.dtype) if kind in _TORCH_KINDS else dtype_name(np.dtype(leaf.dtype))
    if name is None:
        raise UnsupportedLeafError(
            f"dtype {leaf.dtype} has no fixed-width values; give an array of a numeric, string or structured dtype"
        )
    return _spec(kind, name, tuple(leaf.shape))


@functools.lru_cache(4096)
def _spec(kind: str, name: str, shape: tuple[int, ...]) -> ArraySpec:
    return ArraySpec(kind, name, tuple(int(n) for n in shape))


@functools.cache
def _torch_dtype_name(dtype: Any) -> str | None:
    name = str(dtype).removeprefix("torch.")
    try:
        return dtype_name(dtype_from_name(name))
    except TypeError:
        return None


def to_host(leaf: Any, kind: str) -> Host:
    """The values as a numpy array of the dtype that the spec names; a view of them wherever they are in host memory."""
    whole = Box.whole(tuple(int(n) for n in leaf.shape))
    return host_part(leaf, kind, whole, whole)


def host_part(leaf: Any, kind: str, box: Box, have: Box) -> Host:
    """The values of one box as a numpy array; a view wherever they are in host memory.

    Args:
        leaf: An array that holds the box `have` (for a DTensor: its local part does).
        kind: Its kind.
        box: The part wanted, within `have`. Of a device tensor only this part is copied to the host.
        have: Where `leaf` lies in the global array.
    """
    index = None if box == have else slices(box, have)
    if kind in _TORCH_KINDS:
        tensor = (leaf.to_local() if kind == DTENSOR else leaf).detach()
        if index is not None:
            tensor = tensor[index]
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg()
        return _numpy_of(tensor if tensor.device.type == "cpu" else cuda.to_host(tensor))
    host: Host = np.asarray(leaf)
    return host if index is None else host[index]


def _numpy_of(tensor: Any) -> Host:
    """View of a CPU tensor. torch gives numpy no bfloat16 or float8, so those pass as integers of their width."""
    dtype = _numpy_dtype(tensor.dtype)
    if dtype is None:
        host: Host = tensor.numpy()
        return host
    torch = sys.modules["torch"]
    integers: Any = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return np.asarray(tensor.view(integers).numpy()).view(dtype)


@functools.cache
def _numpy_dtype(dtype: Any) -> np.dtype[Any] | None:
    """The numpy dtype of a torch one that `Tensor.numpy` does not take; None for those that it does."""
    found = dtype_from_name(str(dtype).removeprefix("torch."))
    return found if found.name in ML_DTYPES else None


def flat_bytes(host: Host) -> memoryview:
    """All values as flat bytes in C order: a view where the array is contiguous, else of a copy."""
    if host.dtype.names and not host.flags.c_contiguous:
        # numpy copies a structured array field by field, and what lies between the fields would be another byte each
        # time, with another digest.
        host = host.view(np.dtype((np.void, host.dtype.itemsize)))
    contiguous = np.ascontiguousarray(host)
    return contiguous.reshape(-1).view(np.uint8).data.cast("B")


def from_host(host: Host, kind: str) -> Any:
    """An array of `kind` with the values of `host`, which it may keep: `host` must be the caller's own memory.

    Raises:
        InvalidInputError: The library of that kind is not installed, or would change the dtype.
    """
    if kind == NUMPY:
        return host
    if kind in _TORCH_KINDS:
        torch: Any = _library("torch")
        tensor = _tensor_over(host, torch)
        if kind in (PARAMETER, FROZEN_PARAMETER):
            return torch.nn.Parameter(tensor, requires_grad=kind == PARAMETER)
        return tensor
    if kind == JAX:
        return _jax_array(host)
    data = flat_bytes(host).tobytes()
    return data.decode("utf-8", "surrogatepass") if kind == STR else data


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InvalidInputError(
            f"the checkpoint holds {name} arrays and {name} can't be imported here ({error}); install `{name}`, or "
            "load them as numpy arrays with `as_numpy=True`"
        ) from error


def _tensor_over(host: Host, torch: Any) -> Any:
    if host.dtype.name not in ("bool", *ML_DTYPES):
        return torch.from_numpy(host)
    width = {1: np.uint8, 2: np.int16, 4: np.int32}[host.dtype.itemsize]
    return torch.from_numpy(host.view(width)).view(getattr(torch, host.dtype.name))


def _jax_array(host: Host) -> Any:
    jnp: Any = _library("jax.numpy")
    array = jnp.array(host, copy=True)
    if np.dtype(array.dtype) != host.dtype:
        raise InvalidInputError(
            f"jax would turn a saved {host.dtype.name} array into {array.dtype}; set "
            "`jax_enable_x64`, or load with `as_numpy=True`"
        )
    return array


def copy_in(target: Host, have: Box, values: Host, box: Box) -> int:
    """Copies the part of `values` (which hold `box`) that `target` (which holds `have`) wants.

    Returns:
        Bytes copied; 0 where the boxes are disjoint.
    """
    if box == have:
        target[...] = values
        return target.nbytes
    common = overlap(box, have)
    if common is None:
        return 0
    target[slices(common, have)] = values[slices(common, box)]
    return common.size * target.dtype.itemsize


def in_place(leaf: Any, kind: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Host | None:
    """A host view through which `leaf` can be filled in place; None where it can't (read-only, jax, other device).

    Args:
        leaf: The array that a worker has.
        kind: Its kind.
        dtype: Of what the checkpoint holds; `leaf` must have it too.
        shape: Of the part that goes there; `leaf` must have it too.
    """
    if kind == JAX or kind not in (*_TORCH_KINDS, NUMPY):
        return None
    if kind in _TORCH_KINDS:
        tensor = leaf.to_local() if kind == DTENSOR else leaf
        if tensor.device.type != "cpu" or tensor.is_conj() or tensor.is_neg():
            return None
        host = _numpy_of(tensor.detach())
    else:
        host = leaf
    fits = host.flags.writeable and host.dtype == dtype and host.shape == shape
    return host if fits and not _overlaps_itself(host) else None


def filled(leaf: Any, kind: str) -> Any:
    """Says that an array was filled through the view that `in_place` gave, and gives it back.

    torch is told, so that a backward pass over values that are gone is an error and not silently wrong.
    """
    if kind in _TORCH_KINDS and not leaf.is_inference():
        torch: Any = sys.modules["torch"]
        torch.autograd.graph.increment_version(leaf.to_local() if kind == DTENSOR else leaf)
    return leaf


def _overlaps_itself(host: Host) -> bool:
    """Whether elements share memory (an expanded tensor): filling such an array in place would be wrong."""
    if host.flags.c_contiguous:
        return False
    return any(stride == 0 and n > 1 for stride, n in zip(host.strides, host.shape, strict=True))


def fill(leaf: Any, kind: str, host: Host) -> Any:
    """Puts new values into an array that `in_place` could not view, or makes one like it.

    Returns:
        The array to hand back to the worker: `leaf` itself where it could be filled, else a new one of its kind.
    """
    if kind in _TORCH_KINDS:
        torch: Any = sys.modules["torch"]
        tensor = leaf.to_local() if kind == DTENSOR else leaf
        if kind == DTENSOR or tensor.device.type != "cpu":
            with torch.no_grad():
                tensor.copy_(_tensor_over(host, torch))
            return leaf
    return from_host(host, kind)


def memory_key(leaf: Any, kind: str) -> tuple[object, ...]:
    """Equal for two arrays that are the same memory seen the same way (tied weights)."""
    if kind == NUMPY:
        return (NUMPY, leaf.__array_interface__["data"][0], leaf.shape, leaf.strides, leaf.dtype)
    if kind in (TORCH, PARAMETER, FROZEN_PARAMETER) and leaf.numel():
        seen_as = (str(leaf.dtype), tuple(leaf.shape), leaf.stride(), leaf.is_conj(), leaf.is_neg())
        return (kind, str(leaf.device), leaf.data_ptr(), *seen_as)
    return (kind, id(leaf))


def dtensor_box(tensor: Any) -> tuple[Box, tuple[int, ...]]:
    """Where the local part of a torch DTensor lies, and the global shape.

    Raises:
        UnsupportedLeafError: A placement other than shards in order and replicas (partial sums, strided shards).
    """
    names = {type(p).__name__ for p in tensor.placements}
    if not names <= {"Shard", "Replicate"}:
        raise UnsupportedLeafError(
            f"a DTensor with placements {tensor.placements}; redistribute it to Shard and Replicate before the save"
        )
    shape = tuple(int(n) for n in tensor.shape)
    local, offset = _dtensor_offsets()(tensor.shape, tensor.device_mesh, tensor.placements)
    return Box(tuple(int(n) for n in offset), tuple(int(n) for n in local)), shape


@functools.cache
def _dtensor_offsets() -> Callable[..., tuple[tuple[int, ...], tuple[int, ...]]]:
    utils: Any = importlib.import_module("torch.distributed.tensor._utils")
    found: Callable[..., tuple[tuple[int, ...], tuple[int, ...]]] = utils.compute_local_shape_and_global_offset
    return found
