"""RLModules as trees: every tensor of a module by its name, in its own dtype.

Owns: what of a module is kept, whether a saved module fits one that is there, setting it, and a digest by which copies
of a module in different processes compare. Promises: values go from tensor to tensor. RLlib's own way leads through
numpy and a conversion that turns float64 into float32, int64 into int32 and 0-dim tensors into floats, and that stops
at bfloat16.

What it does not do: build modules, or say which policies there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.digest import hasher
from rl_ckpt.state.arrays import flat_bytes, kind_of, spec_of, to_host

# Where RLlib's own classes define it, `get_state` gives what `state_dict` holds, and nothing more.
_PLAIN_GET_STATE = (TorchRLModule.get_state, RLModule.get_state)


def module_tree(module: RLModule) -> dict[str, Any]:
    """The tensors of a module: exactly what `state_dict()` of the module itself (without its DDP wrapper) names.

    Args:
        module: An RLModule, wrapped or not; target networks are part of it.

    Returns:
        Tensors by name, not copied, detached, of any dtype and device; tied ones are one memory under several names. A
        torch module's `get_extra_state` stands among them. Empty for a module that is no torch module.
    """
    inner = module.unwrapped()
    return dict(inner.state_dict()) if isinstance(inner, torch.nn.Module) else {}


def module_extra(module: RLModule) -> dict[str, Any]:
    """What a module's own `get_state` gives beside its tensors; empty where its class defines none.

    Raises:
        InvalidInputError: That method failed.
    """
    inner = module.unwrapped()
    if type(inner).get_state in _PLAIN_GET_STATE:
        return {}
    try:
        state = inner.get_state()
    except (TypeError, ValueError, RuntimeError) as error:  # RLlib's numpy conversion, with a dtype that numpy lacks
        raise InvalidInputError(
            f"{type(inner).__qualname__}.get_state() failed: {error}; give only what is no tensor of the module there, "
            "or use `get_extra_state` and `set_extra_state` of torch.nn.Module instead"
        ) from error
    names = module_tree(inner)
    return {key: value for key, value in state.items() if key not in names}


def module_problems(module: RLModule, tree: Mapping[str, Any]) -> list[str]:
    """What of a saved module does not fit; nothing is changed.

    A module that is built for inference alone may leave out what it says it does not need (the value function, target
    networks); anything else must be there by name, with the same shape and dtype.

    Args:
        module: The module that is to be set, wrapped or not.
        tree: As `module_tree` gave it.

    Returns:
        One sentence for each tensor that does not fit; empty where all do.
    """
    here = module_tree(module)
    skip = _left_out(module)
    missing = [name for name in here if name not in tree]
    unexpected = [name for name in tree if name not in here and not _under(name, skip)]
    problems = []
    if missing:
        problems.append(f"not in the checkpoint: {_names(missing)}")
    if unexpected:
        problems.append(f"in the checkpoint but not in the module here: {_names(unexpected)}")
    if missing and unexpected:
        problems[-1] += " (layers with other names, or another architecture)"
    for name, wanted in here.items():
        if name in tree:
            problems += [f"{name}: {text}" for text in _unlike(tree[name], wanted)]
    return problems


def set_module(module: RLModule, tree: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> None:
    """Copies a saved module's values into the tensors of one that is there.

    Args:
        module: Wrapped or not; its parameters stay the objects that they are, so that optimizers still know them.
        tree: As `module_tree` gave it; not kept.
        extra: As `module_extra` gave it.

    Raises:
        InvalidInputError: It does not fit (all problems in one message); nothing was changed.
    """
    problems = module_problems(module, tree)
    if problems:
        raise InvalidInputError(f"the module does not fit (nothing was changed): {'; '.join(problems)}")
    inner = module.unwrapped()
    if extra:
        # Before the tensors: the base class's part of `set_state` converts their dtypes, and is overwritten below.
        inner.set_state({**tree, **extra})
    if isinstance(inner, torch.nn.Module):
        here = module_tree(inner)
        inner.load_state_dict({name: tree[name] for name in here}, strict=True)


def weights_digest(module: RLModule) -> dict[str, str]:
    """Digests by which a learner's module and an env runner's copy of it compare.

    Args:
        module: A MultiRLModule, or a single one (which counts as RLlib's default policy).

    Returns:
        xxh3-128 by policy id, as 32 hex digits: over names, dtypes, shapes and values of everything that inference
        needs. Equal for a learner's module and for a copy without value function and target networks.
    """
    return {policy: tensors_digest(inference_tensors(inner)) for policy, inner in policies_of(module).items()}


def inference_tensors(module: RLModule) -> dict[str, Any]:
    """What of `module_tree` acting needs: neither value function nor target networks, where the class says so.

    Args:
        module: A single one, wrapped or not.

    Returns:
        Tensors by name, in host memory: not copied where they are there already.
    """
    inner = module.unwrapped()
    skip = _inference_leaves_out(inner)
    return {
        name: value.cpu() if isinstance(value, torch.Tensor) else value
        for name, value in module_tree(inner).items()
        if not _under(name, skip)
    }


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """Digest over names, dtypes, shapes and values, whatever the order: xxh3-128, as 32 hex digits.

    Args:
        tensors: By name.
    """
    digest = hasher()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(repr(name).encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(flat_bytes(to_host(value.detach(), "torch")))
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def policies_of(module: RLModule) -> dict[str, RLModule]:
    """The single modules by policy id, without their DDP wrappers."""
    inner = module.unwrapped()
    if isinstance(inner, MultiRLModule):
        return {policy: single.unwrapped() for policy, single in inner._rl_modules.items()}
    return {DEFAULT_MODULE_ID: inner}


def _left_out(module: RLModule) -> list[str]:
    """Attributes that a saved module may have and this one need not."""
    inner = module.unwrapped()
    return _inference_leaves_out(inner) if inner.inference_only else []


def _inference_leaves_out(inner: RLModule) -> list[str]:
    return list(inner.get_non_inference_attributes()) if isinstance(inner, InferenceOnlyAPI) else []


def _under(name: str, attributes: list[str]) -> bool:
    return any(name == attribute or name.startswith(f"{attribute}.") for attribute in attributes)


def _unlike(saved: Any, here: Any) -> Iterator[str]:
    """How a saved tensor differs from the one here in all but its values."""
    if not isinstance(here, torch.Tensor) or not isinstance(saved, torch.Tensor):
        if isinstance(here, torch.Tensor) or isinstance(saved, torch.Tensor):
            yield f"a {type(saved).__name__} was saved, a {type(here).__name__} is here"
        return
    if saved.shape != here.shape:
        yield f"shape {tuple(saved.shape)} was saved, {tuple(here.shape)} is here"
    if saved.dtype != here.dtype:
        yield f"dtype {_dtype(saved)} was saved, {_dtype(here)} is here (it would be converted silently)"


def _dtype(tensor: torch.Tensor) -> str:
    kind = kind_of(tensor.detach())
    return spec_of(tensor, kind).dtype if kind else str(tensor.dtype)


def _names(names: list[str], most: int = 12) -> str:
    listed = ", ".join(repr(name) for name in names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
