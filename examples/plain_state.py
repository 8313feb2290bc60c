"""Save and load the state of a plain script: no Ray, no actors, no cluster.

    python examples/plain_state.py [URL]

URL is a folder or any fsspec URL (`s3://bucket/run`, `memory://run`); a temporary folder is used where it is left out.
A little gradient descent saves itself every 100 steps in the background, "crashes", and goes on from what was stored.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import numpy as np

from rl_ckpt import Checkpointer


def begin() -> dict[str, Any]:
    """State of a fresh start: arrays, plain values, a generator's state, all in one nested dict."""
    rng = np.random.default_rng(0)
    return {"weights": rng.standard_normal(1_000), "step": 0, "losses": [], "rng": rng.bit_generator.state}


def train(state: dict[str, Any], until: int, ckpt: Checkpointer) -> dict[str, Any]:
    """Move the weights to zero with noise; save every 100 steps without waiting for the store."""
    rng = np.random.default_rng()
    rng.bit_generator.state = state["rng"]
    while state["step"] < until:
        weights = state["weights"] - 0.01 * state["weights"] + 1e-3 * rng.standard_normal(1_000)
        loss = float((weights**2).mean())
        state = {
            "weights": weights,
            "step": state["step"] + 1,
            "losses": [*state["losses"][-9:], loss],
            "rng": rng.bit_generator.state,
        }
        if state["step"] % 100 == 0:
            ckpt.save_state(state["step"], state, metrics={"loss": loss})
    return state


def main(url: str) -> None:
    """Train to step 250, forget everything, go on from step 200, and compare with a run that was never interrupted."""
    with Checkpointer(url) as ckpt:
        train(begin(), 250, ckpt)  # and here the process dies: steps 201 to 250 are lost

    with Checkpointer(url) as ckpt:
        for info in ckpt.checkpoints():
            print(f"step {info.step}: {info.bytes:,} bytes, loss {info.metrics['loss']:.5f}")
        state = ckpt.load_state()
        print(f"going on from step {state['step']}")
        resumed = train(state, 290, ckpt)
        info = ckpt.save_state(290, resumed, tag="final").result()  # waits until it is committed
        print(f"step {info.step} is durable: {info.url}")

    with tempfile.TemporaryDirectory() as other, Checkpointer(other) as ckpt:
        uninterrupted = train(begin(), 290, ckpt)
    same = np.array_equal(resumed["weights"], uninterrupted["weights"])
    print(f"the same as a run that was never interrupted, bit for bit: {same}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(folder)
