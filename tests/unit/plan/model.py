"""A pure model of a whole save and restore: many ranks' states to files in memory and back, beside the numpy truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from rl_ckpt.format.digest import digest
from rl_ckpt.format.manifest import ArrayRef, Chunk, Manifest
from rl_ckpt.format.shard_file import Column, compose
from rl_ckpt.plan.deal import SavePlan, Stored, Written, deal, entries, settle, stored_chunks
from rl_ckpt.plan.inventory import take_inventory
from rl_ckpt.plan.match import Match, View, match_all, match_state, view
from rl_ckpt.plan.merge import Merged, merge
from rl_ckpt.plan.stage import stage
from rl_ckpt.state import leaves
from rl_ckpt.state.arrays import Host, copy_in, from_host
from rl_ckpt.state.boxes import Box
from rl_ckpt.state.dtypes import dtype_from_name
from rl_ckpt.state.tree import FlatTree, LocalArray, Plain, Tie, flatten, unflatten


@st.composite
def tilings(draw: st.DrawFn, shape: Sequence[int], most: int) -> list[Box]:
    """Boxes that tile an array, by cutting one of them in two again and again."""
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, most - 1)) if shape else 0):
        wide = [(b, axis) for b in boxes for axis, n in enumerate(b.shape) if n > 1]
        if not wide:
            break
        box, axis = draw(st.sampled_from(wide))
        at = draw(st.integers(1, box.shape[axis] - 1))
        boxes.remove(box)
        low = tuple(at if i == axis else n for i, n in enumerate(box.shape))
        high = tuple(n - at if i == axis else n for i, n in enumerate(box.shape))
        boxes += [Box(box.offset, low), Box(tuple(o + at * (i == axis) for i, o in enumerate(box.offset)), high)]
    return boxes


@dataclass
class Saved:
    """A checkpoint in memory."""

    manifest: Manifest
    files: dict[str, bytes]
    plan: SavePlan

    def chunk(self, chunk: Chunk) -> bytes:
        data = self.files[self.manifest.files[chunk.file].name][chunk.offset : chunk.offset + chunk.bytes]
        assert digest(data).hex() == chunk.digest
        return data


def flatten_all(states: Sequence[Any]) -> list[FlatTree]:
    return [flatten(state) for state in states]


def merge_all(flats: Sequence[FlatTree], chunk_bytes: int) -> Merged:
    return merge([take_inventory(f, chunk_bytes, len(flats)) for f in flats], chunk_bytes)


def save(
    states: Sequence[Any],
    servers: Sequence[str],
    chunk_bytes: int = 64,
    base: Saved | None = None,
    file_bytes: int = 1 << 20,
    streams: int = 2,
) -> Saved:
    """Saves the ranks' states as the runtime would, with bytearrays for staging memory and a dict for the store."""
    flats = flatten_all(states)
    stored: Stored = stored_chunks(base.manifest) if base else {}
    plan = deal(merge_all(flats, chunk_bytes), servers, streams, file_bytes)
    memory = {server: bytearray(size) for server, size in plan.staged_bytes.items()}
    digests: dict[tuple[str, int], bytes] = {}
    for rank, items in plan.stage.items():
        if items:
            found = stage(flats[rank], items, memoryview(memory[servers[rank]]))
            digests.update({(servers[rank], i.offset): d for i, d in zip(items, found, strict=True)})
    plan = settle(plan, f"{1 if base else 0}-x", digests, stored)
    files = dict(base.files) if base else {}
    written: dict[str, list[Written]] = {}
    for server, plans in plan.files.items():
        staged = memoryview(memory[server])
        for file in plans:
            columns = [
                Column(c.name, c.path, c.dtype, c.box, staged[c.offset : c.offset + c.bytes]) for c in file.columns
            ]
            composed = compose(columns)
            files[file.name] = b"".join(composed.segments)
            assert len(files[file.name]) == composed.size_bytes
            written.setdefault(server, []).append(Written(composed.size_bytes, tuple(composed.offsets)))
    named, arrays = entries(plan, written, digests)
    manifest = manifest_of(plan.merged, named, arrays)
    return Saved(manifest, files, plan)


def manifest_of(merged: Merged, files: Any, arrays: Any) -> Manifest:
    return Manifest(
        run="r",
        id="0-x",
        step=0,
        world_size=merged.world_size,
        time=0.0,
        writer="test",
        parent=None,
        metrics={},
        tag=None,
        files=files,
        arrays=arrays,
        nodes=merged.nodes,
    )


def read_box(saved: Saved, index: int, box: Box) -> Host:
    """One box of a saved array, from its chunks."""
    entry = saved.manifest.arrays[index]
    out = np.zeros(box.shape, dtype_from_name(entry.spec.dtype))
    copied = 0
    for chunk in entry.chunks:
        values = np.frombuffer(saved.chunk(chunk), out.dtype).reshape(chunk.box.shape)
        copied += copy_in(out, box, values, chunk.box)
    assert copied == out.nbytes  # every element comes from exactly one chunk
    return out


def load(saved: Saved, rank: int) -> Any:
    """The tree of a rank that has no state yet."""
    match = match_all(view(saved.manifest, rank), None, None)
    return unflatten(match.grown, _values(saved, match, {}))


def restore(saved: Saved, rank: int, template: Any, **choices: Any) -> tuple[Any, Match]:
    """The tree of a rank that has a state, after a restore into it."""
    flat = flatten(template)
    seen: View = view(saved.manifest, rank)
    match = match_state(seen, flat.nodes, saved.manifest, **choices)
    values = _values(saved, match, flat.nodes)
    for path, node in flat.nodes.items():
        if path not in values and path not in match.grown and isinstance(node, Plain | LocalArray | Tie):
            values[path] = leaves.decode(node.value) if isinstance(node, Plain) else flat.arrays.get(path)
    return unflatten({**flat.nodes, **match.grown}, values), match


def _values(saved: Saved, match: Match, nodes: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, source in match.fills.items():
        if isinstance(source, ArrayRef):
            spec = saved.manifest.arrays[source.index].spec
            have = nodes.get(path)
            box = have.box if isinstance(have, LocalArray) else Box.whole(spec.shape)
            out[path] = from_host(read_box(saved, source.index, box), spec.kind)
        else:
            out[path] = leaves.decode(source.value)
    return out
