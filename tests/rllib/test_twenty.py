"""CartPole by PPO, trained to a return over 300: every restore samples there in its first iteration.

Twenty of twenty in the soak tests, five of five in the others.

By RLlib's own checkpoints it sampled 21.6 (4 of 4), as the first broadcast of the weights is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rl_ckpt.rllib import AlgorithmCheckpointer
from tests.rllib.small import digests_of, ppo_config

GOOD = 300.0


def count_return(*, episode: Any, metrics_logger: Any, **_more: Any) -> None:
    """Keeps the return of every episode that ended in this iteration; RLlib's own mean goes over earlier ones too."""
    metrics_logger.log_value("returns_now", episode.get_return(), reduce="item_series")


def cartpole() -> Any:
    config = ppo_config(
        train_batch_size_per_learner=1000, minibatch_size=125, num_epochs=6, lr=1e-3, gamma=0.99, entropy_coeff=0.0
    )
    config.rl_module(model_config={"fcnet_hiddens": [32, 32], "vf_share_layers": False})
    config.env_runners(num_env_runners=2).callbacks(on_episode_end=count_return)
    return config


def mean_now(algo: Any) -> float:
    """Of the episodes that ended in one more iteration."""
    found = algo.train()["env_runners"]["returns_now"]
    return sum(found) / len(found)


def ruin(learner: Any) -> None:
    for optimizer in learner._named_optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = 1.0


@pytest.fixture(scope="module")
def trained(ray_small: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    """One that has learned it, saved; trained once for all tests."""
    algo, url = cartpole().build_algo(), str(tmp_path_factory.mktemp("cartpole"))
    best = 0.0
    while best < 450:
        best = mean_now(algo)
        assert algo.iteration < 150, "it did not learn"
    with AlgorithmCheckpointer(url) as ckpt:
        ckpt.save(algo).result()
    yield algo, url
    algo.stop()


@pytest.mark.parametrize(
    ("loads", "restores"), [pytest.param(1, 4, id="5 of 5"), pytest.param(3, 17, marks=pytest.mark.soak, id="20 of 20")]
)
def test_every_restore_samples_where_it_was_saved(trained: tuple[Any, str], loads: int, restores: int) -> None:
    algo, url = trained
    good, damaged = [], []
    with AlgorithmCheckpointer(url) as ckpt:
        for _ in range(loads):
            loaded = ckpt.load()
            good.append(mean_now(loaded))
            loaded.stop()
        for _ in range(restores):
            algo.learner_group.foreach_learner(ruin)
            algo.train()
            damaged.append(digests_of(algo)["learner 0"])
            report = ckpt.restore(algo)
            assert damaged[-1] != dict(report.digests)
            good.append(mean_now(algo))
    assert len(good) == loads + restores
    assert [value for value in good if value <= GOOD] == []
