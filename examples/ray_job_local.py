"""Three lines in a Ray job: save the state of any actors, restore it onto another number of them.

    python examples/ray_job_local.py [URL]

URL is a folder or any fsspec URL; a temporary folder is used where it is left out. Four actors save, three and then
six others restore. Arrays that all of them share (the weights) are stored once and go to everybody; what is an actor's
own (its generator, its counter) goes to the actor of the same rank; actors beyond the old number keep what they have.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from typing import Any

import numpy as np
import ray

from rl_ckpt import Checkpointer


class Walker:
    """Any actor: it inherits nothing and knows nothing of checkpoints, it only has get_state and set_state."""

    def __init__(self, rank: int) -> None:
        self.weights = np.zeros(1_000_000, dtype=np.float32)
        self.rng = np.random.default_rng(rank)
        self.walked = 0.0

    def set_weights(self, weights: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        """Take weights that every walker shares."""
        self.weights = weights.copy()

    def walk(self) -> None:
        """Change what is this walker's own."""
        self.walked += float(self.rng.standard_normal())

    def get_state(self) -> dict[str, Any]:
        """A nested dict of arrays and plain values."""
        return {"weights": self.weights, "rng": self.rng.bit_generator.state, "walked": self.walked}

    def set_state(self, state: dict[str, Any]) -> None:
        """The same back."""
        self.weights, self.walked = state["weights"], state["walked"]
        self.rng.bit_generator.state = state["rng"]

    def describe(self) -> str:
        """One line for people."""
        return f"weights sum to {self.weights.sum():.0f}, walked {self.walked:+.3f}"


def show(title: str, actors: list[Any]) -> None:
    """Print what each actor holds."""
    print(title)
    for rank, line in enumerate(ray.get([actor.describe.remote() for actor in actors])):
        print(f"  rank {rank}: {line}")


def main(url: str) -> None:
    """Save four actors, restore three, then six."""
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    walker: Any = ray.remote(Walker)
    workers = [walker.remote(rank) for rank in range(4)]
    weights = ray.put(np.ones(1_000_000, dtype=np.float32))
    ray.get([worker.set_weights.remote(weights) for worker in workers])
    ray.get([worker.walk.remote() for worker in workers])
    show("four actors:", workers)

    with Checkpointer(url) as ckpt:
        pending = ckpt.save(1, workers, metrics={"return": 21.0})  # back as soon as the state is staged
        info = pending.result()  # once it is committed
        print(f"saved step {info.step}: {info.bytes:,} bytes of four actors, {info.bytes_written:,} written")
        for worker in workers:
            ray.kill(worker)

        for count in (3, 6):
            workers = [walker.remote(100 + rank) for rank in range(count)]
            ckpt.restore(workers)  # newest checkpoint, any number of workers
            show(f"{count} other actors:", workers)
    ray.shutdown()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(folder)
