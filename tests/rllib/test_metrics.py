"""Metrics loggers come back: windows, counts, arrays, and names that RLlib's own state takes apart."""

from __future__ import annotations

from collections import deque
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from ray.rllib.utils.metrics.metrics_logger import DEFAULT_STATS_CLS_LOOKUP, MetricsLogger
from ray.rllib.utils.metrics.stats.mean import MeanStats

from rl_ckpt import InvalidInputError
from rl_ckpt.rllib.metrics import metrics_problems, metrics_tree, set_metrics
from rl_ckpt.state.tree import flatten


class MyMean(MeanStats):
    stats_cls_identifier = "my_mean"


def logged() -> MetricsLogger:
    logger = MetricsLogger(root=False)
    for i in range(5):
        logger.log_value("loss", np.float64(i / 3), window=3)
        logger.log_value(("policies", "a--b", "steps"), i, reduce="lifetime_sum")
        logger.log_value("ema", float(i), ema_coeff=0.1)
        logger.log_value("seen", {"obs": np.arange(3) + i, ("x", 1): torch.ones(2)}, reduce="item_series", window=2)
        logger.log_value("tensor", torch.tensor(i / 7), window=4)
    logger.log_value("nothing", float("nan"), window=None)
    return logger


def again(logger: MetricsLogger) -> MetricsLogger:
    other = MetricsLogger(root=False)
    other.log_value("old", 1.0)
    set_metrics(other, metrics_tree(logger))
    return other


def test_statistics_come_back_with_their_names_and_windows() -> None:
    before, after = logged(), again(logged())
    assert list(after.stats) == ["loss", "policies", "ema", "seen", "tensor", "nothing"]
    assert list(after.stats["policies"]) == ["a--b"]
    assert isinstance(after.stats["loss"].values, deque)
    assert after.stats["loss"].values.maxlen == 3
    assert [type(value) for value in after.stats["loss"].values] == [
        type(value) for value in before.stats["loss"].values
    ]
    assert isinstance(after.stats["seen"].items, deque)
    for logger in (before, after):  # and they go on alike
        logger.log_value("loss", 9.0, window=3)
        logger.log_value("seen", {"obs": np.zeros(3)}, reduce="item_series", window=2)
        logger.log_value("ema", 4.0, ema_coeff=0.1)
    assert after.peek("loss") == before.peek("loss")
    assert after.peek("ema") == before.peek("ema")
    assert after.peek("tensor") == pytest.approx(before.peek("tensor"))  # RLlib's own state makes numbers of tensors
    assert np.isnan(after.peek("nothing"))
    first, second = after.peek("seen")
    assert (first["obs"] == np.arange(3) + 4).all()
    assert (first[("x", 1)] == 1).all()
    assert len(second["obs"]) == 3


def test_a_leaf_for_all_numbers() -> None:
    logger = MetricsLogger(root=False)
    for i in range(200):
        logger.log_value(("policies", f"p{i}", "loss"), float(i), window=10)
    assert len(flatten(metrics_tree(logger)).nodes) == 3


@pytest.mark.parametrize(
    "value",
    [
        *(1, 2**70, 1.5, "text", None, True, (1, (2.0,)), {"$": 1}, {3: 4}),
        *(np.float32(0.1), np.int64(2**40), np.bool_(True), ml_dtypes.bfloat16(1.5), np.array(2.5), np.complex64(1j)),
        *(torch.tensor(0.1), torch.tensor(2**40), torch.tensor(1.5, dtype=torch.bfloat16), torch.ones(2, 3)),
    ],
    ids=str,
)
def test_items_of_every_type(value: Any) -> None:
    logger = MetricsLogger(root=False)
    logger.log_value("item", 0, reduce="item")
    logger.stats["item"]._item = value
    found = again(logger).stats["item"]._item
    expected = logger.stats["item"]._item
    assert type(found) is type(expected)
    assert getattr(found, "dtype", None) == getattr(expected, "dtype", None)
    if isinstance(expected, torch.Tensor | np.ndarray):
        assert found.shape == expected.shape
        assert (found == expected).all()
    else:
        assert found == expected


def test_what_is_no_data_is_named() -> None:
    logger = MetricsLogger(root=False)
    logger.log_value(("a", "b"), object(), reduce="item")
    with pytest.raises(InvalidInputError, match=r"the metric 'a/b' holds a builtins.object"):
        metrics_tree(logger)


def test_a_class_of_statistics_that_is_not_known() -> None:
    known: dict[str, Any] = {**DEFAULT_STATS_CLS_LOOKUP}
    logger = MetricsLogger(root=False, stats_cls_lookup=known | {"my_mean": MyMean})
    logger.log_value("mine", 1.0, reduce="my_mean")
    tree, plain = metrics_tree(logger), MetricsLogger(root=False)
    assert metrics_problems(logger, tree) == []
    assert "['my_mean']" in metrics_problems(plain, tree)[0]
    with pytest.raises(InvalidInputError, match="custom_stats_cls_lookup"):
        set_metrics(plain, tree)
    assert plain.stats == {}
