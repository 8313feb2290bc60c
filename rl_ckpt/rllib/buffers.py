"""Replay buffers of DQN and SAC (RLlib's new API stack) as state trees, and back.

Owns: everything that a buffer's next `add`, `sample` and `update_priorities` depend on: episodes, the order of index
entries, priorities, free leaves, counters, its random generator and its metrics. Promises: the restored buffer gives
the very batches that the saved one would have given; a save writes only what was added (see `buffer_blocks`); nothing
of a buffer is changed unless all of it can be. Does not store: what the constructor takes (capacity, batch sizes,
alpha).

The tree, all of it `replay_buffer/…` of a checkpoint:

    class, format, capacity        which class, version of this layout, steps
    counters/                      RLlib's counts, by the names of its attributes; those by module as pairs
    rng/, metrics/                 the generator's state; the metrics logger's
    spaces, schemas                tables of texts that blocks refer to
    blocks/<first episode>/        columns of whole episodes
    indices                        segments of index entries, in the order in which RLlib samples
    priorities/                    leaves, free leaves, and the rest (prioritised buffers)
    modules/<place>/               of each module: its id, index entries, priorities (multi-agent buffers)
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer
from ray.rllib.utils.replay_buffers.multi_agent_episode_buffer import MultiAgentEpisodeReplayBuffer
from ray.rllib.utils.replay_buffers.multi_agent_prioritized_episode_buffer import (
    MultiAgentPrioritizedEpisodeReplayBuffer,
)
from ray.rllib.utils.replay_buffers.prioritized_episode_buffer import PrioritizedEpisodeReplayBuffer

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.rllib.buffer_blocks import (
    Layout,
    Schemas,
    block_steps,
    columns_of,
    cut,
    index_numbers,
    indices_from,
    indices_tree,
)
from rl_ckpt.rllib.buffer_priorities import (
    free_from,
    free_tree,
    leaves_from,
    leaves_tree,
    set_leaves,
)
from rl_ckpt.rllib.buffer_records import MappingFn, SpaceTable, episode_of, record_of
from rl_ckpt.rllib.columns import decode, encode
from rl_ckpt.rllib.metrics import metrics_tree, set_metrics

Tree = dict[str, Any]

FORMAT = 1
_WHERE = "the replay buffer"
_COUNTERS = ("_num_episodes_evicted", "_num_timesteps", "_num_timesteps_added", "sampled_timesteps")
_AGENT_COUNTERS = ("_num_agent_timesteps", "_num_agent_timesteps_added")
_MODULE_COUNTERS = (
    "_num_module_timesteps",
    "_num_module_timesteps_added",
    "_num_module_episodes",
    "_num_module_episodes_evicted",
    "sampled_timesteps_per_module",
)
_CLASSES: dict[str, type[EpisodeReplayBuffer]] = {
    kind.__name__: kind
    for kind in (
        EpisodeReplayBuffer,
        PrioritizedEpisodeReplayBuffer,
        MultiAgentEpisodeReplayBuffer,
        MultiAgentPrioritizedEpisodeReplayBuffer,
    )
}
_layouts: weakref.WeakKeyDictionary[EpisodeReplayBuffer, Layout] = weakref.WeakKeyDictionary()
"""Where blocks of a live buffer end. Losing it costs bytes at the next save, nothing else."""


@dataclass(frozen=True, slots=True)
class _Priorities:
    """What one pair of segment trees has; a multi-agent buffer has one for its steps and one for each module."""

    sums: Any
    mins: Any
    free: Any
    max_priority: Any
    max_idx: int
    last_sampled: list[int]


def buffer_tree(buffer: Any) -> Tree:
    """A replay buffer as a state tree.

    Args:
        buffer: One of RLlib's four episode replay buffers, or a subclass that keeps nothing more.

    Returns:
        The tree; arrays that did not change since the last save are the same bytes.

    Raises:
        InvalidInputError: It is another buffer, or holds what is neither array nor plain data.
    """
    name = _class_name(buffer)
    multi, prioritised = _traits(_CLASSES[name])
    layout = _layouts.setdefault(buffer, Layout([]))
    spaces, schemas = SpaceTable(), Schemas()
    tree: Tree = {
        "class": name,
        "format": FORMAT,
        "capacity": buffer.capacity,
        "counters": _counters(buffer, multi),
        "rng": {"class": type(buffer.rng.bit_generator).__name__, "state": buffer.rng.bit_generator.state},
        "metrics": metrics_tree(buffer.metrics),
        "blocks": _blocks(buffer, layout, spaces, schemas),
        "indices": indices_tree(buffer._indices, buffer.capacity, agents=False),
    }
    tree |= {"spaces": spaces.tree(), "schemas": schemas.tree()}
    if prioritised:
        tree["priorities"] = _priorities_tree(_own_priorities(buffer), index_numbers(buffer._indices, agents=False))
    if multi:
        tree["modules"] = [_module_tree(buffer, module, prioritised) for module in _modules(buffer)]
    return tree


def left_out_tree() -> Tree:
    """In place of a buffer that is not to be stored; a buffer that is "restored" from it stays as it is."""
    return {"class": "", "format": FORMAT}


def buffer_modules(tree: Tree) -> list[str]:
    """Ids of the modules that a saved buffer of many agents has steps of; of another, none."""
    return [module["id"] for module in tree.get("modules", ())]


def buffer_problems(buffer: Any, tree: Tree) -> list[str]:
    """Why a saved buffer does not fit into this one; nothing is changed.

    Args:
        buffer: The one to fill.
        tree: What `buffer_tree` gave.

    Returns:
        A sentence for each; none: it fits.
    """
    if not tree["class"]:
        return []
    try:
        name = _class_name(buffer)
    except InvalidInputError as error:
        return [str(error)]
    if tree["format"] > FORMAT:
        return [f"the replay buffer is stored in format {tree['format']}, and this release reads up to {FORMAT}"]
    problems = []
    if tree["class"] != name:
        problems.append(f"the replay buffer is a {name}, and the checkpoint has a {tree['class']}")
    elif _traits(_CLASSES[name])[1] and buffer.capacity < tree["capacity"]:
        problems.append(
            f"the replay buffer has capacity {buffer.capacity} and the saved one {tree['capacity']}: priorities don't "
            "fit into a smaller one"
        )
    return problems


@dataclass(frozen=True, slots=True)
class _Part:
    """Index entries, and the leaves of their priorities (empty without); of all steps, or of a module's."""

    indices: list[tuple[Any, ...]]
    leaves: list[Any]


def set_buffer(buffer: Any, tree: Tree, mapping_fn: MappingFn | None = None) -> None:
    """Fills a buffer with a saved one's state; what it held is gone.

    Args:
        buffer: Of the same class, of any capacity (priorities need at least the saved one).
        tree: What `buffer_tree` gave; its arrays are the buffer's from now on.
        mapping_fn: Of multi-agent buffers: the algorithm's `policy_mapping_fn`.

    Raises:
        InvalidInputError: It does not fit (`buffer_problems`); the buffer is as it was.
        CorruptionError: The tree is no buffer's; the buffer is as it was.
    """
    problems = buffer_problems(buffer, tree)
    if problems:
        raise InvalidInputError("; ".join(problems))
    if not tree["class"]:
        return
    multi, prioritised = _traits(_CLASSES[tree["class"]])
    spaces = SpaceTable(tree["spaces"])
    episodes = [
        episode_of(record, spaces, mapping_fn)
        for block in tree["blocks"].values()
        for record in decode(columns_of(block, tree["schemas"], _WHERE), _WHERE)
    ]
    own = _part(tree)
    modules = [_part(module) for module in tree.get("modules", ())]
    rng = _generator(tree["rng"])
    # Everything is read; from here on the buffer is changed.
    counters = tree["counters"]
    for name in (*_COUNTERS, *(_AGENT_COUNTERS if multi else ())):
        setattr(buffer, name, counters[name])
    first = buffer._num_episodes_evicted
    buffer.episodes = deque(episodes)
    buffer.episode_id_to_index = {episode.id_: first + place for place, episode in enumerate(episodes)}
    buffer._indices = own.indices
    buffer.rng = rng
    set_metrics(buffer.metrics, tree["metrics"])
    if prioritised:
        _set_own_priorities(buffer, tree["priorities"], own)
    if multi:
        _set_modules(buffer, tree, modules, prioritised)
    _layouts[buffer] = Layout(_ends(tree["blocks"]))


def _part(saved: Tree) -> _Part:
    leaves = leaves_from(saved["priorities"]["leaves"]) if "priorities" in saved else []
    return _Part(indices_from(saved["indices"]), leaves)


def _class_name(buffer: Any) -> str:
    """Which of RLlib's four it is.

    Raises:
        InvalidInputError: None of them, or a subclass that keeps more.
    """
    kind = type(buffer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    advice = (
        "leave it out: AlgorithmCheckpointer(..., replay_buffer=False); a loaded Algorithm begins with an empty one"
    )
    for base in kind.__mro__:
        if _CLASSES.get(base.__name__) is not base:
            continue
        more = sorted(set(vars(buffer)) - _attributes(base))
        if more:
            text = f"keeps {', '.join(more)} beside what a {base.__name__} has"
            raise InvalidInputError(f"the replay buffer {name} {text}, which can't be stored; {advice}")
        return base.__name__
    known = ", ".join(_CLASSES)
    raise InvalidInputError(f"the replay buffer {name} can't be stored: it is none of {known}; {advice}")


@functools.cache
def _attributes(kind: type[EpisodeReplayBuffer]) -> frozenset[str]:
    """What RLlib's class itself keeps; the last is made by a sample, and used where there are priorities."""
    return frozenset(vars(kind(capacity=1))) | {"_last_sampled_indices"}


def _traits(kind: type[EpisodeReplayBuffer]) -> tuple[bool, bool]:
    """Whether it is for many agents, and whether it has priorities."""
    return issubclass(kind, MultiAgentEpisodeReplayBuffer), issubclass(kind, PrioritizedEpisodeReplayBuffer)


def _counters(buffer: Any, multi: bool) -> Tree:
    counters: Tree = {name: getattr(buffer, name) for name in _COUNTERS}
    if multi:
        counters |= {name: getattr(buffer, name) for name in _AGENT_COUNTERS}
        counters |= {name: [list(item) for item in getattr(buffer, name).items()] for name in _MODULE_COUNTERS}
    return counters


def _blocks(buffer: Any, layout: Layout, spaces: SpaceTable, schemas: Schemas) -> Tree:
    """Episodes in blocks, by the number of their first one."""
    episodes, first = list(buffer.episodes), buffer._num_episodes_evicted
    expected = {episode.id_: first + place for place, episode in enumerate(episodes)}
    if buffer.episode_id_to_index != expected:
        raise InvalidInputError(f"{_WHERE}'s index of episodes does not name the episodes that it holds")
    steps = [len(episode) for episode in episodes]
    step_bytes = _step_bytes(episodes, steps, spaces)
    bounds = cut(layout, first, steps, block_steps(buffer.capacity, step_bytes))
    blocks = {}
    for start, end in bounds:
        records = [record_of(episode, spaces) for episode in episodes[start - first : end - first]]
        blocks[str(start)] = schemas.part(encode(records, _WHERE))
    return blocks


def _step_bytes(episodes: Sequence[Any], steps: Sequence[int], spaces: SpaceTable) -> float:
    """How large a step is, in bytes, by one episode's."""
    place = next((place for place, n in enumerate(steps) if n), None)
    if place is None:
        return 1.0
    return encode([record_of(episodes[place], spaces)], _WHERE).nbytes / steps[place]


def _ends(blocks: Tree) -> list[int]:
    """Where the full blocks of a saved buffer end: the last one goes on being filled."""
    return [int(start) for start in list(blocks)[1:]]


def _modules(buffer: Any) -> list[str]:
    """Module ids, in the order in which RLlib samples them; asking by id would make what is not there."""
    return list(buffer._module_to_indices)


def _module_tree(buffer: Any, module: str, prioritised: bool) -> Tree:
    indices = buffer._module_to_indices[module]
    tree: Tree = {"id": module, "indices": indices_tree(indices, buffer.capacity, agents=True)}
    if prioritised:
        tree["priorities"] = _priorities_tree(_module_priorities(buffer, module), index_numbers(indices, agents=True))
    return tree


def _own_priorities(buffer: Any) -> _Priorities:
    return _Priorities(
        buffer._sum_segment,
        buffer._min_segment,
        buffer._free_nodes,
        buffer._max_priority,
        buffer._max_idx,
        buffer._last_sampled_indices,
    )


def _module_priorities(buffer: Any, module: str) -> _Priorities:
    return _Priorities(
        buffer._module_to_sum_segment[module],
        buffer._module_to_min_segment[module],
        buffer._module_to_free_nodes[module],
        buffer._module_to_max_priority[module],
        buffer._module_to_max_idx[module],
        buffer._module_to_last_sampled_indices.get(module, []),
    )


def _priorities_tree(of: _Priorities, numbers: np.ndarray[Any, np.dtype[Any]]) -> Tree:
    """Leaves by number, and which are free. What maps leaves to index entries follows from the entries."""
    return {
        "capacity": of.sums.capacity,
        "leaves": leaves_tree(of.sums, numbers[:, -1]),
        "free": free_tree(of.free),
        "max_priority": of.max_priority,
        "max_idx": of.max_idx,
        "last_sampled": np.array(of.last_sampled, np.int64),
    }


def _set_priorities(of: _Priorities, saved: Tree, part: _Part, agents: bool) -> deque[int]:
    """Fills the two trees; gives the queue of free leaves."""
    set_leaves(of.sums, of.mins, part.leaves, index_numbers(part.indices, agents)[:, -1])
    return free_from(saved["free"], saved["capacity"], of.sums.capacity)


def _set_own_priorities(buffer: Any, saved: Tree, part: _Part) -> None:
    buffer._free_nodes = _set_priorities(_own_priorities(buffer), saved, part, agents=False)
    buffer._max_priority = saved["max_priority"]
    buffer._max_idx = saved["max_idx"]
    buffer._last_sampled_indices = saved["last_sampled"].tolist()
    buffer._tree_idx_to_sample_idx = {entry[-1]: place for place, entry in enumerate(part.indices)}
    if isinstance(buffer, MultiAgentPrioritizedEpisodeReplayBuffer):
        buffer._sample_idx_to_tree_idx = {place: entry[-1] for place, entry in enumerate(part.indices)}


def _set_modules(buffer: Any, tree: Tree, parts: list[_Part], prioritised: bool) -> None:
    """What a multi-agent buffer keeps by module. Its dicts stay: they make what is missing, for its own capacity."""
    for name in _MODULE_COUNTERS:
        counter = getattr(buffer, name)
        counter.clear()
        counter.update((module, count) for module, count in tree["counters"][name])
    for name in [name for name in vars(buffer) if name.startswith("_module_to_")]:
        getattr(buffer, name).clear()
    for module, part in zip(tree["modules"], parts, strict=True):
        buffer._module_to_indices[module["id"]] = part.indices
        if prioritised:
            _set_module_priorities(buffer, module["id"], module["priorities"], part)


def _set_module_priorities(buffer: Any, module: str, saved: Tree, part: _Part) -> None:
    free = _set_priorities(_module_priorities(buffer, module), saved, part, agents=True)
    buffer._module_to_free_nodes[module] = free
    buffer._module_to_max_priority[module] = saved["max_priority"]
    buffer._module_to_max_idx[module] = saved["max_idx"]
    buffer._module_to_last_sampled_indices[module] = saved["last_sampled"].tolist()
    buffer._module_to_tree_idx_to_sample_idx[module] = {entry[-1]: place for place, entry in enumerate(part.indices)}


def _generator(saved: Tree) -> np.random.Generator:
    """The buffer's random generator.

    Raises:
        CorruptionError: numpy has none of this name.
    """
    kind = getattr(np.random, saved["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, np.random.BitGenerator)):
        raise CorruptionError(f"{_WHERE} was saved with a random generator {saved['class']!r}, which numpy has not")
    bits = kind()
    bits.state = saved["state"]
    return np.random.Generator(bits)
