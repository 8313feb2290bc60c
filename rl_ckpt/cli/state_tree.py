"""A checkpoint's state, as a tree to look at: what stands where, of which shape and dtype, how large.

No values of arrays are read: everything stands in the manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rl_ckpt.cli.output import Node
from rl_ckpt.cli.text import count, short, size
from rl_ckpt.errors import InvalidInputError, UntrustedDataError
from rl_ckpt.format.manifest import ArrayRef, Manifest, SavedNode, Variant
from rl_ckpt.state import leaves
from rl_ckpt.state.arrays import LONG_PLAIN, NUMPY
from rl_ckpt.state.paths import Selector, parents
from rl_ckpt.state.tree import Container, Plain, Tie


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf, or one of several that ranks have at the same path."""

    path: str
    kind: str
    """Of an array: its library; "tie"; or "plain"."""
    ranks: tuple[int, ...] | None
    """Which have it; None: all."""
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    """Extents in elements; of a sharded array, of the whole."""
    bytes: int = 0
    """Of an array."""
    chunks: int = 0
    value: str | None = None
    """Plain data, as Python writes it; of a tie, the other path."""

    @property
    def about(self) -> str:
        """One line for people."""
        if self.dtype is None:
            text = f"→ {self.value}" if self.kind == "tie" else short(self.value)
        elif self.kind in LONG_PLAIN:
            text = f"{self.kind}, {size(self.bytes)}"
        else:
            kind = "" if self.kind == NUMPY else f"  {self.kind}"
            text = f"{self.dtype} [{', '.join(map(str, self.shape or ()))}]  {size(self.bytes)}{kind}"
        return text


def leaves_of(manifest: Manifest, select: Sequence[str] | None = None) -> list[Leaf]:
    """All leaves in the checkpoint's order.

    Args:
        manifest: Of the checkpoint.
        select: Globs of paths; None: all.

    Raises:
        InvalidInputError: `select` chooses nothing.
    """
    wanted = Selector(select or None)
    found = [
        _leaf(manifest, path, variant, variant.node)
        for path, variants in manifest.nodes.items()
        for variant in variants
        if wanted(path) and not (isinstance(variant.node, Container) and (variant.node.keys or not path))
    ]
    if select and not found:
        raise InvalidInputError(f"--select {' '.join(select)}: checkpoint {manifest.id} has no such path")
    return found


def _leaf(manifest: Manifest, path: str, variant: Variant, node: SavedNode) -> Leaf:
    if isinstance(node, ArrayRef):
        entry = manifest.arrays[node.index]
        spec = entry.spec
        held = sum(chunk.bytes for chunk in entry.chunks)
        return Leaf(path, spec.kind, variant.ranks, spec.dtype, spec.shape, held, len(entry.chunks))
    if isinstance(node, Tie):
        return Leaf(path, "tie", variant.ranks, value=node.path)
    return Leaf(path, "plain", variant.ranks, value=_value(node))


def _value(node: Plain | Container) -> str:
    if isinstance(node, Container):
        return f"empty {node.type}"
    try:
        return short(repr(leaves.decode(node.value, as_numpy=True)))
    except UntrustedDataError:
        return "pickled"


def tree_of(found: Sequence[Leaf], name: str, depth: int | None) -> Node:
    """Leaves as a tree.

    Args:
        found: In order.
        name: Of the root.
        depth: Levels below the root that are shown; what is deeper is summed up. None: all.
    """
    root = Node(name)
    nodes = {"": root}
    sums: dict[str, list[int]] = {}  # by path of a container: arrays and bytes below it
    for leaf in found:
        above = parents(leaf.path)
        for path in above:
            total = sums.setdefault(path, [0, 0])
            total[0] += leaf.dtype is not None
            total[1] += leaf.bytes
        level = len(above)
        if depth is not None and level > depth:
            _container(nodes, above[depth])
            continue
        line = nodes.get(leaf.path)
        if line is None:
            line = nodes[leaf.path] = Node(leaf.path.rpartition("/")[2])
            _container(nodes, above[-1]).children.append(line)
        if leaf.ranks is None:
            line.about = leaf.about
        else:
            line.children.append(Node(f"({_ranks(leaf.ranks)})", leaf.about))
    for path, (arrays, held) in sums.items():
        if path in nodes:
            nodes[path].about = f"{count(arrays, 'array')}, {size(held)}" if arrays else ""
    return root


def _container(nodes: dict[str, Node], path: str) -> Node:
    for each in [*parents(path)[1:], path] if path else []:
        if each not in nodes:
            nodes[each] = Node(each.rpartition("/")[2])
            nodes[each.rpartition("/")[0]].children.append(nodes[each])
    return nodes[path]


def _ranks(ranks: Sequence[int]) -> str:
    """Ranks for people: runs of them as first–last."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    text = ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}–{p[-1]}" for p in parts)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
