"""What of a checkpoint's connector states is given to RLlib, which unpickles some of it."""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import gymnasium as gym
import numpy as np
from ray.rllib.connectors.connector_pipeline_v2 import ConnectorPipelineV2
from ray.rllib.connectors.env_to_module.mean_std_filter import MeanStdFilter

from rl_ckpt.rllib.connectors import connectors_problems, connectors_tree, set_connectors
from tests.unit.trees import assert_same

RAN: list[int] = []


class _Calls:
    def __reduce__(self) -> Any:
        return (RAN.append, (1,))


def pipeline() -> ConnectorPipelineV2:
    space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
    return ConnectorPipelineV2(space, gym.spaces.Discrete(2), connectors=[MeanStdFilter()])


def hidden(array: np.ndarray[Any, Any]) -> str:
    """As RLlib writes the arrays of filters; it reads them with `allow_pickle=True`."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return base64.b64encode(zlib.compress(file.getvalue())).decode()


def test_a_filters_statistics_come_back() -> None:
    saved = connectors_tree(pipeline())
    other = pipeline()
    assert connectors_problems(other, saved, "runner") == []
    set_connectors(other, saved)
    assert_same(connectors_tree(other), saved)


def test_a_state_that_rllib_would_unpickle_is_refused() -> None:
    bad = hidden(np.array([_Calls()], object))
    crafted = {"MeanStdFilter": {"plain": [1, {"mean_array": bad}]}}
    (problem,) = connectors_problems(pipeline(), crafted, "runner")
    assert "MeanStdFilter in the checkpoint holds a pickle" in problem
    assert RAN == []
    assert connectors_problems(pipeline(), {"MeanStdFilter": {"plain": [hidden(np.ones(3))]}}, "runner") == []
