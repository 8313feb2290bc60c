"""One of two learners that train together in processes of their own (test_learner_threads.py)."""

from __future__ import annotations

import json
import sys
import time

import torch
from ray.rllib.core.learner.training_data import TrainingData

from rl_ckpt import CheckpointError
from rl_ckpt.rllib.learner_threads import held
from rl_ckpt.rllib.modules import weights_digest
from tests.rllib.learner_cases import IMPALA, Case, build, episodes


def main(rank: int, group: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=2)
    case = Case("impala-2", lambda: IMPALA.config().learners(num_learners=2))
    learner = build(case)
    learner._learner_index = rank
    holds = []
    for turn in range(8):
        for n in range(3):
            data = TrainingData(episodes=episodes(learner, case, 100 * rank + 10 * turn + n))
            learner.update(training_data=data, timesteps={})
            time.sleep(0.01 * ((turn + rank) % 2))  # now the one is ahead, now the other
        with held(learner, f"turn-{turn}"):
            (digest,) = weights_digest(learner.module).values()
            holds.append((learner._weights_seq_no, digest))
    learner._learner_thread_in_queue.join()
    (digest,) = weights_digest(learner.module).values()
    out = {"holds": holds, "end": (learner._weights_seq_no, digest)}
    for name, token in (("untold", ""), ("alone", f"mine-{rank}")):
        try:
            with held(learner, token, timeout_s=0.2):
                out[name] = ""
        except CheckpointError as error:
            out[name] = type(error).__name__
    print(json.dumps(out))
    torch.distributed.destroy_process_group()
    learner.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
