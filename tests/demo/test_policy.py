"""The demo's mathematics against numerical gradients and against definitions written out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rl_ckpt.demo.policy import (
    Floats,
    Network,
    PolicyBatch,
    adam_step,
    advantages,
    draw_actions,
    forward,
    init_network,
    log_softmax,
    policy_loss,
    value_loss,
)


def float64_network(rng: np.random.Generator, outputs: int) -> Network:
    net = init_network(rng, (4, 5, 6, outputs), output_scale=1.0)
    return {name: (a + 0.1 * rng.standard_normal(a.shape)).astype(np.float64) for name, a in net.items()}


def numerical_gradients(loss: Callable[[], float], net: Network, epsilon: float = 1e-6) -> Network:
    grads = {name: np.zeros_like(a) for name, a in net.items()}
    for name, array in net.items():
        for index in np.ndindex(array.shape):
            kept = array[index]
            array[index] = kept + epsilon
            above = loss()
            array[index] = kept - epsilon
            below = loss()
            array[index] = kept
            grads[name][index] = (above - below) / (2 * epsilon)
    return grads


def assert_same_gradients(found: Network, expected: Network) -> None:
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("seed", range(5))
def test_policy_gradients_are_the_numerical_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    net = float64_network(rng, 3)
    observations = rng.standard_normal((32, 4))
    actions = rng.integers(0, 3, 32)
    now = log_softmax(forward(net, observations)[-1])[np.arange(32), actions]
    # Far enough from the present policy that samples lie on both sides of the clip, in both directions.
    batch = PolicyBatch(observations, actions, now + rng.uniform(-0.6, 0.6, 32), rng.standard_normal(32))
    ratio = np.exp(now - batch.log_probs)
    assert (ratio > 1.2).any()
    assert (ratio < 0.8).any()

    _, grads = policy_loss(net, batch, clip=0.2, entropy_coef=0.05)

    assert_same_gradients(grads, numerical_gradients(lambda: policy_loss(net, batch, 0.2, 0.05)[0], net))


@pytest.mark.parametrize("seed", range(3))
def test_value_gradients_are_the_numerical_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    net = float64_network(rng, 1)
    observations, targets = rng.standard_normal((16, 4)), rng.standard_normal(16)

    _, grads = value_loss(net, observations, targets)

    assert_same_gradients(grads, numerical_gradients(lambda: value_loss(net, observations, targets)[0], net))


def test_advantages_are_discounted_sums_of_temporal_differences() -> None:
    rng = np.random.default_rng(0)
    steps, envs, gamma, lam = 12, 3, 0.9, 0.8
    rewards, values, following = (rng.standard_normal((steps, envs)) for _ in range(3))
    terminated = rng.random((steps, envs)) < 0.2
    ended = terminated | (rng.random((steps, envs)) < 0.2)

    found = advantages(rewards, values, following, terminated, ended, gamma, lam)

    for env in range(envs):
        for start in range(steps):
            expected, weight = 0.0, 1.0
            for t in range(start, steps):
                after = 0.0 if terminated[t, env] else following[t, env]
                expected += weight * (rewards[t, env] + gamma * after - values[t, env])
                weight *= gamma * lam
                if ended[t, env]:
                    break
            assert found[start, env] == pytest.approx(expected)


def test_an_episode_that_is_cut_off_still_earns_what_would_have_followed() -> None:
    one, no, yes = np.ones((1, 1)), np.array([[False]]), np.array([[True]])
    cut_off = advantages(one, 0 * one, 5 * one, terminated=no, ended=yes, gamma=0.5, lam=1.0)
    terminated = advantages(one, 0 * one, 5 * one, terminated=yes, ended=yes, gamma=0.5, lam=1.0)
    assert (cut_off.item(), terminated.item()) == (3.5, 1.0)


def test_actions_are_drawn_as_often_as_the_policy_says() -> None:
    probs = np.array([0.1, 0.6, 0.3])
    log_probs: Floats = np.tile(np.log(probs), (20_000, 1))
    counts = np.bincount(draw_actions(np.random.default_rng(1), log_probs), minlength=3)
    np.testing.assert_allclose(counts / 20_000, probs, atol=0.015)


def test_log_softmax_survives_large_logits() -> None:
    found = log_softmax(np.array([[1000.0, 0.0], [-1000.0, -1000.0]]))
    np.testing.assert_allclose(found, [[0.0, -1000.0], [np.log(0.5), np.log(0.5)]])


def test_first_adam_step_moves_every_weight_by_the_rate_against_its_gradient() -> None:
    net: Network = {"w0": np.zeros(3)}
    grads: Network = {"w0": np.array([3.0, -0.5, 40.0])}
    adam_step(net, grads, {"w0": np.zeros(3)}, {"w0": np.zeros(3)}, t=1, rate=0.1)
    np.testing.assert_allclose(net["w0"], [-0.1, 0.1, -0.1], rtol=1e-2)
