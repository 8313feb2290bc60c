"""State of connector pipelines: filters' statistics and whatever else a connector keeps.

Owns: the state of every connector of a pipeline as a tree and back. Promises: connectors of the same class each keep
their own (RLlib's `get_state` keeps the last one's for all); a filter's statistics are arrays with their own dtypes,
not text; a saved connector that is missing in a pipeline is named, never passed over. Does not know: what a connector
does.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ray.rllib.connectors.connector_pipeline_v2 import ConnectorPipelineV2
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.utils.filter import RunningStat
from ray.rllib.utils.serialization import _deserialize_ndarray, _serialize_ndarray

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.rllib.data import UnsavableError, from_data, to_data
from rl_ckpt.rllib.embedded import hides_pickle

_STATISTICS = frozenset(RunningStat().to_state())
_ARRAYS = frozenset(name for name in _STATISTICS if name.endswith("_array"))


def connectors_tree(pipeline: ConnectorPipelineV2 | None) -> dict[str, Any]:
    """The state of every connector that has one, by name.

    Args:
        pipeline: None gives nothing.

    Returns:
        By class name; the second of a class is "<name>#2"; one in a pipeline in the pipeline is "<pipeline>/<name>".

    Raises:
        InvalidInputError: A connector's state holds something that can't be saved.
    """
    tree = {}
    for name, connector in _named(pipeline):
        state = connector.get_state()
        if not state:
            continue
        try:
            tree[name] = state_tree(state, f"the state of the connector {name}")
        except UnsavableError as error:
            raise InvalidInputError(
                f"{error}; let get_state() of {type(connector).__name__} return numbers, strings, arrays and "
                "containers of them"
            ) from None
    return tree


def state_tree(state: Any, at: str) -> Any:
    """What a connector's `get_state` gave, as data.

    Raises:
        UnsavableError: Something in it can't be saved.
    """
    return to_data(_arrays(state), at)


def state_from(tree: Any) -> Any:
    """The reverse of `state_tree`, as a connector's `set_state` takes it."""
    return _texts(from_data(tree))


def connectors_problems(pipeline: ConnectorPipelineV2 | None, tree: dict[str, Any], where: str) -> list[str]:
    """Saved connectors that are not in a pipeline, and states that RLlib would unpickle; changes nothing."""
    here = [name for name, _ in _named(pipeline)]
    hiding = [
        f"{where}: the state of the connector {name} has a pickle in it, which RLlib would load"
        for name, state in tree.items()
        if _hides_pickle(from_data(state))
    ]
    return hiding + [
        f"{where}: the checkpoint has the state of a connector {name}, and there is none here (there are: "
        f"{', '.join(here) or 'none'})"
        for name in tree
        if name not in here
    ]


def set_connectors(pipeline: ConnectorPipelineV2 | None, tree: dict[str, Any]) -> None:
    """Sets every connector that has a saved state; `connectors_problems` must have found none."""
    for name, connector in _named(pipeline):
        if name in tree:
            connector.set_state(state_from(tree[name]))


def _named(pipeline: ConnectorPipelineV2 | None, above: str = "") -> Iterator[tuple[str, ConnectorV2]]:
    seen: Counter[str] = Counter()
    for connector in [] if pipeline is None else pipeline.connectors:
        name = type(connector).__name__
        seen[name] += 1
        full = above + (name if seen[name] == 1 else f"{name}#{seen[name]}")
        if isinstance(connector, ConnectorPipelineV2):
            yield from _named(connector, f"{full}/")
        else:
            yield full, connector


def _is_statistics(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and set(value) == _STATISTICS and all(isinstance(value[n], kind) for n in _ARRAYS)


def _arrays(value: Any) -> Any:
    """A state with the text that RLlib makes of a filter's arrays made arrays again."""
    if _is_statistics(value, str):
        return {name: _deserialize_ndarray(item) if name in _ARRAYS else item for name, item in value.items()}
    return _mapped(value, _arrays)


def _texts(value: Any) -> Any:
    """The reverse of `_arrays`."""
    if _is_statistics(value, np.ndarray):
        return {name: _serialize_ndarray(item) if name in _ARRAYS else item for name, item in value.items()}
    return _mapped(value, _texts)


def _hides_pickle(value: Any) -> bool:
    """Whether a filter that got this for a state, or a part of it for its statistics, would unpickle something."""
    if isinstance(value, Mapping):
        return any(map(_hides_pickle, value.values()))
    if isinstance(value, list | tuple | set | frozenset | deque):
        return any(map(_hides_pickle, value))
    return hides_pickle(value.tobytes() if isinstance(value, np.ndarray) else value)


def _mapped(value: Any, change: Any) -> Any:
    if type(value) is dict:
        return {key: change(item) for key, item in value.items()}
    return [change(item) for item in value] if type(value) is list else value
