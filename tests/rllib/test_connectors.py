"""States of connectors: what is not put into a filter."""

from __future__ import annotations

import base64
import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.connectors.env_to_module import EnvToModulePipeline, MeanStdFilter

from rl_ckpt.rllib.connectors import connectors_problems, connectors_tree, set_connectors


class Payload:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.folder), 0o777, True)


def as_rllib_writes(array: np.ndarray[Any, Any]) -> str:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return base64.b64encode(zlib.compress(file.getvalue())).decode()


def with_mean(tree: Any, mean: object) -> Any:
    if isinstance(tree, dict):
        return {key: mean if key == "mean_array" else with_mean(item, mean) for key, item in tree.items()}
    return [with_mean(item, mean) for item in tree] if isinstance(tree, list) else tree


@pytest.mark.parametrize("form", [str, str.encode, lambda text: np.frombuffer(text.encode(), np.uint8)])
def test_a_pickle_in_a_filters_state_is_refused(form: Callable[[str], Any], tmp_path: Path) -> None:
    spaces: Any = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(2)
    pipeline = EnvToModulePipeline(*spaces, connectors=[MeanStdFilter()])
    tree = connectors_tree(pipeline)
    assert connectors_problems(pipeline, tree, "here") == []
    harmless = with_mean(tree, as_rllib_writes(np.ones(3)))
    assert connectors_problems(pipeline, harmless, "here") == []

    evil = with_mean(tree, form(as_rllib_writes(np.array([Payload(tmp_path / "ran")], object))))
    (problem,) = connectors_problems(pipeline, evil, "here")
    assert "the state of the connector MeanStdFilter has a pickle in it" in problem
    assert not (tmp_path / "ran").exists()
    if form is str:  # what it would have done
        with pytest.raises(zlib.error):  # of what stands beside it
            set_connectors(pipeline, evil)
        assert (tmp_path / "ran").exists()
