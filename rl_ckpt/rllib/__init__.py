"""rl_ckpt.rllib: checkpoints of RLlib algorithms (new API stack of Ray 2.60).

    from rl_ckpt.rllib import AlgorithmCheckpointer, load

    ckpt = AlgorithmCheckpointer("s3://bucket/run-7", keep=[LatestN(3)])
    ckpt.save(algo)                          # back as soon as the state is staged
    ckpt.restore(algo)                       # in place, onto any number of learners and env runners
    algo = load("s3://bucket/run-7")         # in a new process, from nothing but the url

Owns: what of an Algorithm is saved, and how it is put back. Promises: an Algorithm that does not fit a checkpoint is
not changed; after a restore every copy of the weights is the restored one before the first sample is drawn; nothing is
pickled. Does not: store or move anything itself; that is the floors below.
"""

from __future__ import annotations

try:
    import ray.rllib as _rllib  # noqa: F401
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(f"rl_ckpt.rllib needs RLlib and torch ({error}): pip install 'rl-ckpt[rllib]'") from error

from rl_ckpt.rllib.checkpointer import AlgorithmCheckpointer, load, restore, save
from rl_ckpt.rllib.policy import load_policy, save_policy
from rl_ckpt.rllib.report import AlgorithmRestore

__all__ = ["AlgorithmCheckpointer", "AlgorithmRestore", "load", "load_policy", "restore", "save", "save_policy"]
