"""A policy as a function of named tensors: what an RLModule takes and gives, without RLlib's batches.

Owns: the names, dtypes and shapes of inputs and outputs, the torch module that exporters see (positional tensors in,
a tuple of tensors out, around `forward_inference`), and random inputs. Does not know: files, checkpoints.

Observations are those that the module gets: after the env-to-module connectors, of its own `observation_space`. A Dict
or Tuple space becomes one input a leaf. A stateful module also takes and gives its state, one time step a call: the
exporters of torch 2.13 fix the number of steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.export.report import TensorInfo

if TYPE_CHECKING:
    import torch

OBS, STATE_IN, STATE_OUT, ACTION_DIST_INPUTS, ACTIONS = "obs", "state_in", "state_out", "action_dist_inputs", "actions"
BATCH = "batch"
_FAR = 10.0  # random observations of an unbounded space lie between -10 and 10
_FROM_MODULES = (
    RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError, ImportError,
)  # fmt: skip
"""What a user's forward pass, and exporters that trace it, raise."""

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class _Leaf:
    """One input: where it stands in the batch, and how to make a random one."""

    path: Path
    info: TensorInfo
    sample: Callable[[np.random.Generator, int], np.ndarray[Any, np.dtype[Any]]]


@dataclass(frozen=True, slots=True)
class Model:
    """A policy, ready to be traced."""

    wrapped: torch.nn.Module
    """Takes the inputs by position; returns the outputs as a tuple."""
    leaves: tuple[_Leaf, ...]
    outputs: tuple[TensorInfo, ...]
    action_dist: str | None
    metadata: dict[str, str]

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """In the order in which they are taken."""
        return tuple(leaf.info for leaf in self.leaves)

    def random_inputs(self, batch: int, seed: int) -> tuple[torch.Tensor, ...]:
        """Inputs of a batch size, the same for the same seed."""
        rng = np.random.default_rng(seed)
        return tuple(_tensor(leaf.sample(rng, batch), leaf.info.dtype) for leaf in self.leaves)

    def run(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the policy itself gives.

        Raises:
            InvalidInputError: Its forward pass failed.
        """
        import torch

        try:
            with torch.no_grad():
                found: tuple[torch.Tensor, ...] = self.wrapped(*inputs)
        except _FROM_MODULES as error:
            raise InvalidInputError(
                f"the module's forward_inference fails on a batch of {list(_described(self.inputs))}: {told(error)}"
            ) from error
        return found


def model_of(module: Any) -> Model:
    """Makes a model of an RLModule.

    Raises:
        InvalidInputError: It can't be exported; says why.
    """
    import torch

    if not issubclass(type(module), torch.nn.Module):
        raise InvalidInputError(f"a {type(module).__name__} is no torch module; only those can be exported as models")
    state = module.get_initial_state() if module.is_stateful() else {}
    steps: tuple[int, ...] = (1,) if state else ()
    leaves = [
        *_observations(module.observation_space, (OBS,), steps),
        *(_state_leaf((STATE_IN, *path), value) for path, value in _flat(state)),
    ]
    module.eval()
    names: list[str] = []
    draft = Model(_wrap(module, leaves, names), tuple(leaves), (), None, {})
    two, three = (draft.run(draft.random_inputs(n, n)) for n in (2, 3))
    _check_names(module, [leaf.info.name for leaf in leaves], names)
    outputs = tuple(_output(*each) for each in zip(names, two, three, strict=True))
    dist = _action_dist(module)
    return replace(draft, outputs=outputs, action_dist=dist, metadata=_metadata(module, state, dist))


def told(error: BaseException) -> str:
    """The first lines of an exception, for a message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:4])[:800].rstrip('.')}"


def traced(make: Callable[[], Any], what: str) -> Any:
    """Calls an exporter, which runs the user's forward pass.

    Raises:
        InvalidInputError: It failed; says why, and what to do.
    """
    try:
        return make()
    except _FROM_MODULES as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # exporters wrap what the module itself led to
            cause = cause.__cause__
        raise InvalidInputError(
            f"{what} can't trace this module's forward_inference: {told(cause)}. Its computation must not depend on "
            "the values of tensors (`if x.sum() > 0`, `.item()`, numpy) nor on the batch size; torch.where and "
            "torch.cond do. format='state_dict' and 'safetensors' work for every module"
        ) from error


def _wrap(module: Any, leaves: Sequence[_Leaf], names: list[str]) -> torch.nn.Module:
    """The torch module; `names` gets the names of its outputs when it is called."""
    import torch

    class Policy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            batch: dict[Any, Any] = {}
            for leaf, value in zip(leaves, inputs, strict=True):
                at = batch
                for key in leaf.path[:-1]:
                    at = at.setdefault(key, {})
                at[leaf.path[-1]] = value
            batch[OBS] = _as_space(module.observation_space, batch[OBS])
            found = [(path, v) for path, v in _flat(self.module.forward_inference(batch)) if torch.is_tensor(v)]
            names[:] = [_named(path) for path, _ in found]
            return tuple(value for _, value in found)

    return Policy().eval()


def _as_space(space: Any, value: Any) -> Any:
    """Observations in the containers of their space: a Tuple's as a tuple."""
    import gymnasium as gym

    if isinstance(space, gym.spaces.Dict):
        return {key: _as_space(sub, value[key]) for key, sub in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(_as_space(sub, value[i]) for i, sub in enumerate(space.spaces))
    return value


def _observations(space: Any, path: Path, steps: tuple[int, ...]) -> list[_Leaf]:
    import gymnasium as gym

    if isinstance(space, gym.spaces.Dict):
        return [leaf for key, sub in space.spaces.items() for leaf in _observations(sub, (*path, key), steps)]
    if isinstance(space, gym.spaces.Tuple):
        return [leaf for i, sub in enumerate(space.spaces) for leaf in _observations(sub, (*path, i), steps)]
    shape: tuple[int, ...] = tuple(space.shape or ())
    if isinstance(space, gym.spaces.Box):
        low, high = _bounds(space)
    elif isinstance(space, gym.spaces.Discrete):
        low, high = np.asarray(space.start), np.asarray(int(space.start) + int(space.n) - 1)
    elif isinstance(space, gym.spaces.MultiDiscrete):
        low, high = np.asarray(space.start), np.add(space.start, space.nvec) - 1
    elif isinstance(space, gym.spaces.MultiBinary):
        low, high = np.zeros(shape, np.int8), np.ones(shape, np.int8)
    else:
        raise InvalidInputError(
            f"{_named(path)}: a {type(space).__name__} space has no tensors of one shape; Box, Discrete, "
            "MultiDiscrete, MultiBinary, Dict and Tuple can be exported"
        )
    dtype = np.dtype(space.dtype)
    if dtype.kind == "f" and dtype.itemsize > 2:
        dtype = np.dtype(np.float32)  # as RLlib hands every float to a module, but float16

    def sample(rng: np.random.Generator, batch: int) -> np.ndarray[Any, np.dtype[Any]]:
        size = (batch, *steps, *shape)
        if dtype.kind == "f":
            return rng.uniform(low, high, size).astype(dtype)
        return rng.integers(low.astype(np.int64), high.astype(np.int64), size, endpoint=True).astype(dtype)

    return [_Leaf(path, TensorInfo(_named(path), dtype.name, (BATCH, *steps, *shape)), sample)]


def _bounds(space: Any) -> tuple[Any, Any]:
    """Finite bounds of a Box that random values are drawn from."""
    low, high = (np.asarray(bound, np.float64) for bound in (space.low, space.high))
    least, most = np.clip(low, -_FAR, None), np.clip(high, None, _FAR)
    if np.dtype(space.dtype).kind == "f":
        # Bounds of up to a thousand are meant (angles, images); beyond, they stand for none.
        near = (np.abs(low) <= 1e3) & (np.abs(high) <= 1e3)
        return np.where(near, low, np.minimum(least, high)), np.where(near, high, np.maximum(most, low))
    return np.clip(low, -(2**31), 2**31), np.clip(high, -(2**31), 2**31)


def _state_leaf(path: Path, value: Any) -> _Leaf:
    """A state input; its initial values, with noise where they are floats."""
    import torch

    initial = torch.as_tensor(value)
    dtype = str(initial.dtype).removeprefix("torch.")
    shape = tuple(initial.shape)
    host = initial.detach().to(torch.float64 if initial.is_floating_point() else initial.dtype).numpy()

    def sample(rng: np.random.Generator, batch: int) -> np.ndarray[Any, np.dtype[Any]]:
        noise = rng.uniform(-1, 1, (batch, *shape)) if host.dtype.kind == "f" else np.zeros((batch, *shape), host.dtype)
        return np.asarray(host + noise)

    return _Leaf(path, TensorInfo(_named(path), dtype, (BATCH, *shape)), sample)


def _tensor(values: np.ndarray[Any, np.dtype[Any]], dtype: str) -> torch.Tensor:
    import torch

    found: torch.Tensor = torch.as_tensor(values).to(getattr(torch, dtype))
    return found


def _flat(tree: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    """Leaves of nested containers, dicts in the order of their keys."""
    if isinstance(tree, Mapping):
        return [item for key in sorted(tree, key=str) for item in _flat(tree[key], (*path, key))]
    if isinstance(tree, list | tuple):
        return [item for i, value in enumerate(tree) for item in _flat(value, (*path, i))]
    return [(path, tree)]


def _named(path: Path) -> str:
    return ".".join(map(str, path))


def _described(tensors: Sequence[TensorInfo]) -> list[str]:
    return [f"{one.name}: {one.dtype}{list(one.shape)}" for one in tensors]


def _check_names(module: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    every = [*inputs, *outputs]
    twice = sorted({name for name in every if every.count(name) > 1})
    if twice:
        raise InvalidInputError(f"several inputs or outputs of the module would be called {twice}; use other keys")
    if ACTION_DIST_INPUTS not in outputs and ACTIONS not in outputs:
        raise InvalidInputError(
            f"{type(module).__name__}.forward_inference gives neither {ACTION_DIST_INPUTS!r} nor {ACTIONS!r} as a "
            f"tensor (it gives {list(outputs)}); an exported model has to say what to do"
        )


def _output(name: str, two: torch.Tensor, three: torch.Tensor) -> TensorInfo:
    """An output, from what batches of two and of three gave."""
    if (
        two.dim() != three.dim()
        or [*two.shape[1:]] != [*three.shape[1:]]
        or (*two.shape[:1], *three.shape[:1]) != (2, 3)
    ):
        raise InvalidInputError(
            f"output {name!r} has shape {tuple(two.shape)} for a batch of 2 and {tuple(three.shape)} for one of 3; "
            "only models whose first axis is the batch can be exported"
        )
    return TensorInfo(name, str(two.dtype).removeprefix("torch."), (BATCH, *two.shape[1:]))


def _action_dist(module: Any) -> str | None:
    """Class of the distribution that the outputs are for; of a class that RLlib made at run time, the one below."""
    try:
        found = module.get_inference_action_dist_cls()
    except (NotImplementedError, AttributeError, KeyError, ValueError):  # a module that samples by itself has none
        return None
    for cls in getattr(found, "__mro__", ()):
        if "<locals>" not in cls.__qualname__:
            return f"{cls.__module__}:{cls.__qualname__}"
    return None


def _metadata(module: Any, state: Any, dist: str | None) -> dict[str, str]:
    out = {
        "module_class": f"{type(module).__module__}:{type(module).__qualname__}",
        "observation_space": repr(module.observation_space),
        "action_space": repr(module.action_space),
    }
    if dist is not None:
        out["action_dist"] = dist
    if state:
        values = {_named((STATE_IN, *path)): _floats(value) for path, value in _flat(state)}
        out["initial_state"] = json.dumps({name: v.tolist() if v.any() else 0 for name, v in values.items()})
    return out


def _floats(value: Any) -> Any:
    """Values as a numpy array, whatever the tensor's dtype."""
    import torch

    tensor = torch.as_tensor(value).detach()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()
