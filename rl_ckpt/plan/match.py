"""Match: a checkpoint's leaves against what one worker has.

Owns: which saved leaves are a rank's, which of them go where in the worker's tree, and the list of all that does not
fit. Pure: moves no values. `None`, and an empty container, in a worker's state stand for "whatever the checkpoint has"
(a fresh optimizer has no moments yet).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.format.manifest import ArrayRef, Manifest, SavedNode, Variant
from rl_ckpt.state.arrays import LONG_PLAIN
from rl_ckpt.state.leaves import Json, kind_tag
from rl_ckpt.state.paths import Selector, above, join, parents, renamed, split
from rl_ckpt.state.tree import Container, LocalArray, Node, Plain, Tie

_TOPS_NAMED = 20
_KEYED = frozenset(("dict", "OrderedDict"))


@dataclass(slots=True)
class View:
    """A checkpoint as one rank sees it, by saved path."""

    leaves: dict[str, Plain | ArrayRef] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)
    """Leaves that this rank (or every rank) had; the others are on offer to a rank that wants them."""
    containers: dict[str, Container] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)
    """Leaves that belong to other ranks only."""


def view(manifest: Manifest, rank: int) -> View:
    """What rank `rank` of a new job gets: what everybody had, shards, and what the same rank had."""
    out = View()
    chosen: dict[str, SavedNode] = {}
    for path, variants in manifest.nodes.items():
        if len(variants) == 1 and variants[0].ranks is None and variants[0].shared:  # so it is with nearly all
            chosen[path] = variants[0].node
            out.required.add(path)
            continue
        mine = next((v for v in variants if _had(v, rank, manifest.world_size)), None)
        offered = mine or next((v for v in variants if v.shared), None)
        containers = [v.node for v in variants if isinstance(v.node, Container)]
        if len(containers) == len(variants):
            joined = _joined(containers, None if offered is None else offered.node)
            if offered is not None or joined.keys:  # an empty one that another rank has is that rank's own
                chosen[path] = joined
        elif offered is None:
            out.elsewhere.add(path)
        else:
            chosen[path] = offered.node
        if mine is not None:
            out.required.add(path)
    for path, node in chosen.items():
        if isinstance(node, ArrayRef):
            out.leaves[path] = node
            continue
        if isinstance(node, Container):
            out.containers[path] = node
            continue
        target = chosen.get(node.path) if isinstance(node, Tie) else node
        if isinstance(target, Plain | ArrayRef):
            out.leaves[path] = target
    return out


def _joined(containers: Sequence[Container], first: SavedNode | None) -> Container:
    """A dict with the keys of all ranks, those of `first` before the others: below it, any rank may offer something."""
    own = first if isinstance(first, Container) else containers[0]
    if own is first and not own.keys:
        return own
    keys = dict.fromkeys(key for node in (own, *containers) if node.type == own.type for key in node.keys)
    return Container(own.type, tuple(keys)) if own.type in _KEYED else own


def _had(variant: Variant, rank: int, world_size: int) -> bool:
    if variant.ranks is None:
        return variant.shared or rank < world_size
    return rank in variant.ranks


class Problems(msgspec.Struct):
    """What does not fit, by path."""

    missing: list[str] = []
    """In the worker's state, not in the checkpoint."""
    unexpected: list[str] = []
    """In the checkpoint, not in the worker's state."""
    mismatched: dict[str, str] = {}
    """Dtype or shape differ; the text says how."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def lines(self) -> list[str]:
        """One line a problem, for a message."""
        return [
            *(f"missing in the checkpoint: {path}" for path in self.missing),
            *(f"unexpected in the checkpoint: {path}" for path in self.unexpected),
            *(f"mismatched: {path}: {why}" for path, why in self.mismatched.items()),
        ]


@dataclass(slots=True)
class Match:
    """Where the saved leaves go in a worker's tree."""

    fills: dict[str, Plain | ArrayRef] = field(default_factory=dict)
    """By path in the worker's tree (or in the tree to be made)."""
    grown: dict[str, Container] = field(default_factory=dict)
    """Containers to be made where the worker's are empty."""
    kept: list[str] = field(default_factory=list)
    """Leaves of the worker that are left as they are."""
    ignored: list[str] = field(default_factory=list)
    """Leaves of the checkpoint that go nowhere (only where what doesn't fit is no error)."""
    problems: Problems = field(default_factory=Problems)


def match_all(seen: View, select: str | Sequence[str] | None, rename: Mapping[str, str] | None) -> Match:
    """Everything that is chosen, for a reader that has no state yet.

    Raises:
        InvalidInputError: `select` chooses nothing, or `rename` names a path that is not there.
    """
    chosen = _chosen(seen, select, rename or {})
    out = Match(fills={new: seen.leaves[path] for path, new in chosen.items()})
    containers, wanted = _renamed_containers(seen, rename or {}), Selector(select)
    needed = above(out.fills) | {renamed(path, rename or {}) for path in seen.containers if wanted(path)}
    out.grown = {path: node for path, node in containers.items() if path in needed}
    return out


def match_state(
    seen: View,
    nodes: Mapping[str, Node],
    manifest: Manifest,
    select: str | Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    strict: bool = True,
) -> Match:
    """Matches a checkpoint with the state that a worker has.

    Args:
        seen: The checkpoint as the worker's rank sees it.
        nodes: The worker's state, from `state.tree.flatten`.
        manifest: For dtypes and shapes.
        select: Globs of saved paths; the rest of the worker's state is left alone.
        rename: Saved path or prefix → the worker's.
        strict: Whether the caller will treat what doesn't fit as an error; if not, it is kept or ignored.

    Raises:
        InvalidInputError: `select` chooses nothing, or `rename` names a path that is not there.
    """
    out, rename = Match(), rename or {}
    containers = _renamed_containers(seen, rename)
    for path, target in _chosen(seen, select, rename).items():
        saved = seen.leaves[path]
        node = nodes.get(target)
        if node is not None:
            why = _mismatch(saved, node, nodes, manifest)
            if why:
                out.problems.mismatched[target] = why
            else:
                out.fills[target] = saved
        elif _placeholder(target, nodes) is not None:
            out.fills[target] = saved
            top = _placeholder(target, nodes)
            out.grown.update({p: containers[p] for p in parents(target) if p in containers and _within(p, top)})
        elif path in seen.required:
            out.problems.unexpected.append(target)
    wanted = Selector(select)
    _grow_empty(out, [renamed(path, rename) for path in seen.containers if wanted(path)], containers, nodes)
    _unfilled(out, nodes, wanted, {renamed(path, rename) for path in seen.elsewhere})
    for path in _tied_apart(nodes, out):
        out.problems.mismatched[path] = "tied to another leaf here, but saved apart from it"
        del out.fills[path]
    if not strict:
        out.ignored = out.problems.unexpected
        out.problems = Problems()
    return out


def _chosen(seen: View, select: str | Sequence[str] | None, rename: Mapping[str, str]) -> dict[str, str]:
    """Saved path → the worker's, of all that `select` chooses."""
    unknown = [path for path in rename if path not in seen.leaves and path not in seen.containers]
    wanted = Selector(select)
    chosen = {path: renamed(path, rename) for path in seen.leaves if wanted(path)}
    if unknown:
        raise InvalidInputError(f"rename: the checkpoint has no {unknown}; at the top it has: {_tops(seen)}")
    if select is not None and not chosen:
        raise InvalidInputError(f"select={select!r} chooses nothing; at the top the checkpoint has: {_tops(seen)}")
    twice = sorted({new for new in chosen.values() if list(chosen.values()).count(new) > 1}) if rename else []
    if twice:
        raise InvalidInputError(f"rename gives several saved leaves the same path: {twice}")
    return chosen


def _tops(seen: View) -> str:
    """The names at the top of a checkpoint, for a message; the first of them where they are many."""
    tops = sorted({path.split("/")[0] for path in [*seen.leaves, *seen.containers] if path})
    more = f" … and {len(tops) - _TOPS_NAMED} more" if len(tops) > _TOPS_NAMED else ""
    return (", ".join(tops[:_TOPS_NAMED]) or "nothing") + more


def _renamed_containers(seen: View, rename: Mapping[str, str]) -> dict[str, Container]:
    if not rename:
        return dict(seen.containers)
    out: dict[str, Container] = {}
    for path in [*seen.leaves, *seen.containers]:  # renaming may move a leaf to containers that were never saved
        keys = split(renamed(path, rename))
        at = ""
        for key in keys:
            known = out.get(at) or Container("dict")
            out[at] = known if key in known.keys else Container(known.type, (*known.keys, key))
            at = join(at, key)
        if path in seen.containers:
            out[at] = Container(seen.containers[path].type, out[at].keys if at in out else ())
    return out


def _mismatch(saved: Plain | ArrayRef, node: Node, nodes: Mapping[str, Node], manifest: Manifest) -> str | None:
    """Why a saved leaf can't go where `node` is; None where it can."""
    here = nodes[node.path] if isinstance(node, Tie) else node
    if isinstance(here, Container):
        return f"a leaf in the checkpoint, a {here.type} here"
    if isinstance(saved, ArrayRef) and isinstance(here, LocalArray) and here.spec == manifest.arrays[saved.index].spec:
        return None
    found, have = _shape(saved, manifest), _here(here)
    if found == have or _is_none(saved) or _is_none(here):
        return None
    return f"{found} in the checkpoint, {have} here"


def _shape(saved: Plain | ArrayRef, manifest: Manifest) -> str:
    if isinstance(saved, Plain):
        return _plain_shape(saved.value)
    spec = manifest.arrays[saved.index].spec
    return "plain data" if spec.kind in LONG_PLAIN else f"{spec.dtype} array of shape {spec.shape}"


def _here(node: Node) -> str:
    if isinstance(node, LocalArray):
        plain = node.spec.kind in LONG_PLAIN
        return "plain data" if plain else f"{node.spec.dtype} array of shape {node.spec.shape}"
    assert isinstance(node, Plain)
    return _plain_shape(node.value)


def _plain_shape(value: Json) -> str:
    if isinstance(value, dict) and kind_tag(value) == "array":
        shape = value["shape"]
        assert isinstance(shape, list)
        return f"{value['dtype']} array of shape {tuple(shape)}"
    return "plain data"


def _is_none(node: Node | ArrayRef) -> bool:
    return isinstance(node, Plain) and node.value is None


def _placeholder(path: str, nodes: Mapping[str, Node]) -> str | None:
    """The empty container or None above `path` that stands for whatever the checkpoint has there."""
    known = [p for p in parents(path) if p in nodes]
    if not known:
        return None
    node = nodes[known[-1]]
    empty = isinstance(node, Container) and not node.keys
    return known[-1] if empty or _is_none(node) else None


def _grow_empty(
    out: Match, chosen: Sequence[str], containers: Mapping[str, Container], nodes: Mapping[str, Node]
) -> None:
    """Brings empty containers of the checkpoint where the worker has a placeholder: no leaf of theirs would."""
    for target in chosen:
        if target in containers and not containers[target].keys:
            top = target if target in nodes and _is_none(nodes[target]) else _placeholder(target, nodes)
            if top == target or (top is not None and target not in nodes):
                out.grown.update(
                    {p: containers[p] for p in [*parents(target), target] if p in containers and _within(p, top)}
                )


def _within(path: str, top: str | None) -> bool:
    return top is not None and (path == top or not top or path.startswith(top + "/"))


def _unfilled(out: Match, nodes: Mapping[str, Node], wanted: Selector, elsewhere: set[str]) -> None:
    """Sorts the worker's leaves that get nothing into those to be kept and those that are missing."""
    for path, node in nodes.items():
        if isinstance(node, Container) or path in out.fills or path in out.grown:
            continue
        out.kept.append(path)
        if wanted(path) and path not in elsewhere and path not in out.problems.mismatched:
            out.problems.missing.append(path)


def _tied_apart(nodes: Mapping[str, Node], out: Match) -> list[str]:
    return [
        path
        for path, node in nodes.items()
        if isinstance(node, Tie)
        and path in out.fills
        and node.path in out.fills
        and out.fills[path] != out.fills[node.path]
    ]
