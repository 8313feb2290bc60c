"""Save when it is due: every so many steps, at the best result, on a signal, before a preemption, by what saves cost.

    python examples/periodic_saves.py [FOLDER]

A little hill climb without Ray asks a SavePolicy after every step. It gets SIGUSR1 (save now) on the way and SIGTERM
(save and go) at the end, is started again, and goes on with what its policy had learned.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from typing import Any

import numpy as np

from rl_ckpt import (
    Auto,
    Best,
    Checkpointer,
    EverySteps,
    LatestN,
    OnPreemption,
    OnSignal,
    SavePolicy,
    SignalWatch,
)


def climb(url: str, signals: dict[int, signal.Signals], last: int) -> int:
    """Trains until `last` or until it is told to go; gives the step at which it stopped.

    Args:
        url: Where the checkpoints go.
        signals: By step: what somebody sends to this process.
        last: Step at which it is done.
    """
    with Checkpointer(url, keep=[LatestN(5)]) as ckpt, SignalWatch() as asked, ckpt.preemption() as watch:
        auto = Auto(min_s=0.05, max_s=1.0)
        policy = SavePolicy(EverySteps(100), Best("height"), auto, OnSignal(asked.count), OnPreemption(watch.notice))
        state: dict[str, Any] = {"step": 0, "place": np.full(1000, 9.0), "rng": 0}
        if ckpt.latest() is not None:
            state = ckpt.load_state()
            policy.set_state(state["policy"])
            policy.restored(state["step"])
            policy.lost()
            print(
                f"going on from step {state['step']}; the best so far was {max(state['policy']['best'].values()):.3f}"
            )
        while state["step"] < last:
            step = state["step"] = state["step"] + 1
            noise = np.random.default_rng(step).standard_normal(1000)
            state["place"] = 0.98 * state["place"] + 0.5 * noise
            height = -float(np.abs(state["place"]).mean())
            if step in signals:
                os.kill(os.getpid(), signals[step])  # from outside, in earnest
            due = policy.due(step, {"height": height if step % 20 == 0 else float("nan")})
            if due is None:
                continue
            state["policy"] = policy.get_state()
            pending = ckpt.save_state(step, state, metrics={"height": height})
            print(f"step {step:4d}: saved: {due.text}")
            if due.urgent:
                policy.saved(pending.result())
            else:
                policy.began(due, pending)
            if due.leave:
                print("told to go")
                break
        assert policy.chosen is not None
        print(f"Auto: {policy.chosen.text}")
        return int(state["step"])


def main(url: str) -> None:
    """Runs twice: a job that is told to go, and the one that is started in its place."""
    stopped = climb(url, {130: signal.SIGUSR1, 250: signal.SIGTERM}, 1000)
    assert stopped == 250
    assert climb(url, {}, 320) == 320
    with Checkpointer(url) as ckpt:
        steps = [info.step for info in ckpt.checkpoints()]
        print(f"kept: {steps}")
        assert steps[-1] >= 300


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(folder)
