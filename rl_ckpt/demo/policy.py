"""The mathematics of the demo: small tanh networks, PPO's losses with their gradients, advantages, Adam.

Owns pure functions over numpy arrays and the names of a network's arrays; keeps no state and draws no numbers but from
the generator it is handed. The gradients are written by hand and checked against numerical ones by the tests.
It knows nothing of environments, actors or checkpoints.

Source: PPO, Schulman et al. 2017 (clipped surrogate); GAE, Schulman et al. 2016; Adam, Kingma and Ba 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Network = dict[str, Floats]
"""Arrays of one network, by name: `w0, b0, w1, b1, …`, layer i maps by `x @ w_i + b_i`."""


def init_network(rng: np.random.Generator, sizes: tuple[int, ...], output_scale: float) -> Network:
    """Orthogonal float32 weights and zero biases.

    Args:
        rng: Where the numbers come from.
        sizes: Widths from input to output, e.g. `(4, 64, 64, 2)`.
        output_scale: Gain of the last layer; hidden layers have sqrt(2).

    Returns:
        A network with `len(sizes) - 1` layers.
    """
    net: Network = {}
    last = len(sizes) - 2
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        wide = rng.standard_normal((max(fan_in, fan_out), min(fan_in, fan_out)))
        q, r = np.linalg.qr(wide)
        q = q * np.sign(np.diag(r))
        gain = output_scale if i == last else np.sqrt(2.0)
        net[f"w{i}"] = np.ascontiguousarray(gain * (q if fan_in >= fan_out else q.T), dtype=np.float32)
        net[f"b{i}"] = np.zeros(fan_out, dtype=np.float32)
    return net


def forward(net: Network, x: Floats) -> list[Floats]:
    """Every layer's output for a batch.

    Args:
        net: The network, with tanh between the layers and none after the last.
        x: Inputs, `(batch, fan_in)`.

    Returns:
        The input, each hidden activation and the output `(batch, fan_out)`, in that order.
    """
    outputs: list[Floats] = [x]
    depth = len(net) // 2
    for i in range(depth):
        z = outputs[-1] @ net[f"w{i}"] + net[f"b{i}"]
        outputs.append(z if i == depth - 1 else np.tanh(z))
    return outputs


def backward(net: Network, outputs: list[Floats], output_grad: Floats) -> Network:
    """Gradients of a loss with respect to every array of the network.

    Args:
        net: The network that gave `outputs`.
        outputs: What `forward` returned.
        output_grad: Gradient of the loss with respect to the last output, `(batch, fan_out)`.

    Returns:
        Arrays of the same names and shapes as `net`.
    """
    grads: Network = {}
    grad = output_grad
    for i in reversed(range(len(net) // 2)):
        grads[f"w{i}"] = outputs[i].T @ grad
        grads[f"b{i}"] = grad.sum(axis=0)
        if i > 0:
            grad = (grad @ net[f"w{i}"].T) * (1.0 - outputs[i] ** 2)
    return {name: grads[name] for name in net}


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities along the last axis, without overflow."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_probs


def draw_actions(rng: np.random.Generator, log_probs: Floats) -> Ints:
    """One action per row, drawn from the distribution that `log_probs` (batch, actions) holds (Gumbel-max)."""
    actions: Ints = np.argmax(log_probs + rng.gumbel(size=log_probs.shape), axis=-1)
    return actions


@dataclass(frozen=True, slots=True)
class PolicyBatch:
    """What the policy loss is taken over; n samples."""

    observations: Floats
    """(n, observation), filtered as they were when the actions were drawn."""
    actions: Ints
    """(n,)"""
    log_probs: Floats
    """(n,) of those actions under the policy that drew them."""
    advantages: Floats
    """(n,), commonly normalised."""


def policy_loss(net: Network, batch: PolicyBatch, clip: float, entropy_coef: float) -> tuple[float, Network]:
    """PPO's clipped loss minus an entropy bonus, with its gradients.

    Args:
        net: Policy network, its outputs are logits.
        batch: Samples.
        clip: How far the probability ratio may move from 1 before it earns nothing more.
        entropy_coef: Weight of the entropy bonus.

    Returns:
        The mean loss over the batch, and its gradients by name.
    """
    outputs = forward(net, batch.observations)
    log_probs = log_softmax(outputs[-1])
    n = len(batch.actions)
    rows = np.arange(n)
    probs = np.exp(log_probs)
    ratio = np.exp(log_probs[rows, batch.actions] - batch.log_probs)
    unclipped = ratio * batch.advantages
    clipped = np.clip(ratio, 1.0 - clip, 1.0 + clip) * batch.advantages
    entropy = -(probs * log_probs).sum(axis=-1)
    loss = -float(np.minimum(unclipped, clipped).mean()) - entropy_coef * float(entropy.mean())

    # Where the clipped branch is the smaller one, the surrogate is constant in the ratio: no gradient.
    surrogate_grad = np.where(unclipped <= clipped, unclipped, 0.0)
    chosen = np.zeros_like(probs)
    chosen[rows, batch.actions] = 1.0
    logits_grad = -surrogate_grad[:, None] * (chosen - probs)
    logits_grad += entropy_coef * probs * (log_probs + entropy[:, None])
    return loss, backward(net, outputs, (logits_grad / n).astype(probs.dtype))


def value_loss(net: Network, observations: Floats, targets: Floats) -> tuple[float, Network]:
    """Half the mean squared error of the value network, with its gradients.

    Args:
        net: Value network of one output.
        observations: (n, observation), filtered.
        targets: (n,) returns to predict.

    Returns:
        The loss, and its gradients by name.
    """
    outputs = forward(net, observations)
    error = outputs[-1][:, 0] - targets
    loss = 0.5 * float((error**2).mean())
    return loss, backward(net, outputs, (error / len(error))[:, None].astype(outputs[-1].dtype))


def advantages(
    rewards: Floats,
    values: Floats,
    next_values: Floats,
    terminated: NDArray[np.bool_],
    ended: NDArray[np.bool_],
    gamma: float,
    lam: float,
) -> Floats:
    """Generalised advantage estimates.

    Args:
        rewards: (steps, envs).
        values: (steps, envs), of the observation acted upon.
        next_values: (steps, envs), of the observation that followed, before any reset.
        terminated: (steps, envs), the episode ended by itself: nothing is earned after it.
        ended: (steps, envs), the episode ended, by itself or by the time limit: no credit flows across.
        gamma: Discount per step.
        lam: Decay of the credit per step.

    Returns:
        (steps, envs).
    """
    deltas = rewards + gamma * next_values * ~terminated - values
    result = np.zeros_like(deltas)
    running = np.zeros(deltas.shape[1], dtype=deltas.dtype)
    for t in reversed(range(len(deltas))):
        running = deltas[t] + gamma * lam * running * ~ended[t]
        result[t] = running
    return result


def adam_step(net: Network, grads: Network, m: Network, v: Network, t: int, rate: float) -> None:
    """One step of Adam, in place.

    Args:
        net: Arrays to change.
        grads: Gradients of the same names.
        m: First moments, changed in place.
        v: Second moments, changed in place.
        t: Number of this step, from 1.
        rate: Learning rate.
    """
    beta1, beta2, epsilon = 0.9, 0.999, 1e-5
    scale = rate * np.sqrt(1.0 - beta2**t) / (1.0 - beta1**t)
    for name, grad in grads.items():
        m[name] += (1.0 - beta1) * (grad - m[name])
        v[name] += (1.0 - beta2) * (grad * grad - v[name])
        net[name] -= (scale * m[name] / (np.sqrt(v[name]) + epsilon)).astype(net[name].dtype)
