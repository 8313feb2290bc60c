"""What is exported: a policy of a checkpoint, or whatever a `select` chooses, found without reading its values.

Owns: the names that arrays get in the file, the refusal of what is no array, the list of policies that there are, and
passing over a damaged checkpoint for the one before (as every load does). Imports neither torch nor RLlib.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.export.report import PREFIX, VERSION
from rl_ckpt.format.digest import digest, hasher
from rl_ckpt.format.manifest import ArrayRef, Manifest
from rl_ckpt.options import check_step
from rl_ckpt.plan.match import Match, View, match_all, view
from rl_ckpt.state import leaves
from rl_ckpt.state.arrays import LONG_PLAIN, PICKLE, flat_bytes
from rl_ckpt.state.leaves import kind_tag
from rl_ckpt.state.paths import join, unescape
from rl_ckpt.state.tree import Plain, unflatten
from rl_ckpt.store.repair import load_repaired
from rl_ckpt.store.run import Run

POLICIES = "policies"
MODULE = "module"
ABOUT = "about"
_NAMED = 20
_ABOUT_BYTES = 64 << 10

_T = TypeVar("_T")
Host = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Source:
    """Arrays of one checkpoint, by the name that they get in the file."""

    run: Run
    manifest: Manifest
    policy: str | None
    arrays: dict[str, ArrayRef | Plain]
    """In the checkpoint's order. `Plain`: a 0-dim or empty array, whose value stands in the manifest."""
    plain: dict[str, Any]
    """Other leaves that were chosen, as the manifest's JSON; they go into metadata."""
    about: dict[str, Any]
    """How to build the policy's module, with small arrays as lists; empty where the checkpoint does not say."""

    def dtype_and_shape(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Of an array: the dtype's name, and the global shape in elements."""
        node = self.arrays[name]
        if isinstance(node, ArrayRef):
            spec = self.manifest.arrays[node.index].spec
            return spec.dtype, spec.shape
        assert isinstance(node.value, dict)
        return str(node.value["dtype"]), tuple(node.value["shape"])

    def match(self, names: Sequence[str]) -> Match:
        """Some of the arrays, for a read by name."""
        return Match(fills={name: self.arrays[name] for name in names})

    def known_digest(self, name: str) -> str | None:
        """xxh3-128 of an array's bytes, where it is known without reading them: that of its only chunk."""
        node = self.arrays[name]
        if not isinstance(node, ArrayRef):
            return None
        chunks = self.manifest.arrays[node.index].chunks
        return chunks[0].digest if len(chunks) == 1 else None

    def inline(self, name: str) -> Host | None:
        """The values of an array that stand in the manifest; None for one whose values are in shard files."""
        node = self.arrays[name]
        if isinstance(node, ArrayRef):
            return None
        found: Host = leaves.decode(node.value, name, as_numpy=True)
        return found

    def metadata(self, weights_digest: str, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """What the file says about itself."""
        out = {
            "version": VERSION,
            "step": str(self.manifest.step),
            "checkpoint": self.manifest.id,
            "run": self.manifest.run,
            "weights_digest": weights_digest,
        }
        if self.policy is not None:
            out["policy"] = self.policy
        if self.about:
            out["about"] = json.dumps(self.about)
        if self.plain:
            out["plain"] = json.dumps(self.plain)
        return {PREFIX + name: text for name, text in (out | dict(more or {})).items()}


def weights_digest(tensors: Mapping[str, tuple[str, Sequence[int], str]]) -> str:
    """One digest for all arrays, whatever the order or the file that they stand in.

    Args:
        tensors: By name: dtype's name, shape, and the xxh3-128 of the array's bytes in C order, 32 hex digits.

    Returns:
        xxh3-128 of the lines "name NUL dtype NUL shape, joined by x NUL digest LF", sorted by name, 32 hex digits.
    """
    total = hasher()
    for name in sorted(tensors):
        dtype, shape, one = tensors[name]
        total.update(f"{name}\0{dtype}\0{'x'.join(map(str, shape))}\0{one}\n".encode("utf-8", "surrogatepass"))
    return total.hexdigest()


def with_source(
    url: str,
    step: int | None,
    storage_options: Mapping[str, Any] | None,
    find: Callable[[Run, Manifest], Source],
    use: Callable[[Source, tuple[str, ...]], _T],
) -> _T:
    """Does something with what is to be exported; with the next older checkpoint's where one is damaged.

    Args:
        url: Of the run.
        step: Which checkpoint; None: the newest good one.
        storage_options: For fsspec.
        find: Makes the source.
        use: Takes it, and notices about checkpoints that were passed over. Raises CorruptionError before it leaves
            anything behind.

    Raises:
        CheckpointError: As `Checkpointer.load_state`.
    """
    run = Run.open(url, storage_options)
    commits, newer = run.candidates(None if step is None else check_step(step))
    damaged = list(newer.values())
    for commit in commits:
        notices = (f"fell back to checkpoint {commit.id}, since {'; '.join(damaged)}",) if damaged else ()
        try:
            return use(find(run, run.manifest(commit)), notices)
        except CorruptionError as error:
            damaged.append(f"checkpoint {commit.id}: {error}")
    raise CorruptionError(f"no good checkpoint in {run.store.url}: {'; '.join(damaged)}")


def policy_source(run: Run, manifest: Manifest, policy: str) -> Source:
    """The parameters and buffers of one policy, by their names in the module's state dict.

    Raises:
        InvalidInputError: There is no such policy (lists those that there are), or it has leaves that are no arrays.
        CorruptionError: What describes it is damaged.
    """
    seen = view(manifest, 0)
    known = _policies(seen)
    if policy not in known:
        listed = ", ".join(map(repr, known[:_NAMED])) + (f" … and {len(known) - _NAMED} more" if known[_NAMED:] else "")
        has = f"it has {listed}" if known else "it holds no policies; for parts of any other state give `select`"
        raise InvalidInputError(f"checkpoint {manifest.id} of {run.store.url} has no policy {policy!r}: {has}")
    module = join(join(POLICIES, policy), MODULE) + "/"
    chosen = {_name(path[len(module) :]): node for path, node in seen.leaves.items() if path.startswith(module)}
    described = join(join(POLICIES, policy), ABOUT) + "/"
    about = Match(
        fills={path[len(described) :]: node for path, node in seen.leaves.items() if path.startswith(described)},
        grown={path[len(described) :]: c for path, c in seen.containers.items() if f"{path}/".startswith(described)},
    )
    where = f"policy {policy!r} of checkpoint {manifest.id}"
    return _source(run, manifest, where, chosen, policy, _about(run, manifest, about))


def selected_source(run: Run, manifest: Manifest, select: str | Sequence[str], rank: int) -> Source:
    """What globs choose of any checkpoint, by path.

    Raises:
        InvalidInputError: They choose nothing, or leaves that are no arrays.
    """
    chosen = match_all(view(manifest, rank), select, None).fills
    return _source(run, manifest, f"select={select!r} of checkpoint {manifest.id}", chosen, None, {})


def _name(path: str) -> str:
    """A module's key; what is nested deeper (no module of RLlib's is) keeps its path."""
    return path if "/" in path else str(unescape(path))


def _policies(seen: View) -> list[str]:
    node = seen.containers.get(POLICIES)
    return [str(key) for key in node.keys] if node is not None else []


def _source(
    run: Run,
    manifest: Manifest,
    where: str,
    chosen: Mapping[str, Plain | ArrayRef],
    policy: str | None,
    about: dict[str, Any],
) -> Source:
    found: dict[str, ArrayRef | Plain] = {}
    plain: dict[str, Any] = {}
    refused: list[str] = []
    for name, node in chosen.items():
        kind = kind_tag(node.value) if isinstance(node, Plain) else manifest.arrays[node.index].spec.kind
        if kind == PICKLE or (kind in LONG_PLAIN and isinstance(node, ArrayRef)):
            refused.append(f"{name} ({'pickled' if kind == PICKLE else 'long text or bytes'})")
        elif isinstance(node, Plain) and kind != "array":
            plain[name] = node.value
        else:
            found[name] = node
    if refused:
        raise InvalidInputError(f"{where} has leaves that are no arrays: {', '.join(refused[:_NAMED])}; leave them out")
    if not found:
        raise InvalidInputError(f"{where} has no arrays to export")
    return Source(run, manifest, policy, found, plain, about)


def _about(run: Run, manifest: Manifest, described: Match) -> dict[str, Any]:
    """A policy's description as JSON; says so where it is too long for a file's metadata."""
    values, _ = load_repaired(run, manifest, described, False, True)
    found = _jsonable(unflatten(described.grown, values))
    assert isinstance(found, dict)
    if len(json.dumps(found)) > _ABOUT_BYTES:
        return {"left_out": "it is longer than 64 KiB"}
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufU":
        return _jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity, which spaces are full of
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def source_digest(source: Source) -> tuple[str, list[str]]:
    """`weights_digest` of a source, with as little reading as possible.

    Returns:
        The digest, and texts about damage that was read around.

    Raises:
        CorruptionError, StorageError: As `Checkpointer.load_state`.
    """
    found: dict[str, tuple[str, tuple[int, ...], str]] = {}
    notices: list[str] = []
    for name in source.arrays:
        known = source.known_digest(name)
        if known is None:
            values, repaired = load_repaired(source.run, source.manifest, source.match([name]), False, True)
            notices += repaired
            known = digest(flat_bytes(values[name])).hex()
        found[name] = (*source.dtype_and_shape(name), known)
    return weights_digest(found), notices


def batches(source: Source, size_bytes: int) -> Iterator[list[str]]:
    """Names of arrays that are read together: one, or several small ones of at most so many bytes."""
    batch: list[str] = []
    filled = 0
    for name, node in source.arrays.items():
        chunks = source.manifest.arrays[node.index].chunks if isinstance(node, ArrayRef) else ()
        one = sum(chunk.bytes for chunk in chunks)
        if batch and filled + one > size_bytes:
            yield batch
            batch, filled = [], 0
        batch.append(name)
        filled += one
    if batch:
        yield batch
