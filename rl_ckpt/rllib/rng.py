"""Random generators of a process: Python's `random`, numpy's global one, torch's on the CPU and on its GPUs.

Owns: their states as a tree and back. Promises: what is drawn after `set_rng` is, bit for bit, what was drawn after
`rng_tree`. These generators belong to the process, not to an RLlib object: where a learner, an environment runner and
the driver live in one process, they share them. Generators of environments and spaces: env_state.py.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def rng_tree() -> dict[str, Any]:
    """States of this process's generators.

    Returns:
        "python": uint32 words and the kept Gaussian; "numpy": uint32 words, position and the kept Gaussian; "torch":
        uint8 bytes; "cuda": uint8 bytes for each GPU, only where this process uses GPUs.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, kept = np.random.get_state(legacy=True)
    tree: dict[str, Any] = {
        "python": {"version": version, "words": np.array(words, np.uint32), "gauss": gauss},
        "numpy": {"kind": name, "words": keys, "position": position, "has_gauss": has_gauss, "gauss": kept},
        "torch": torch.get_rng_state().numpy(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        tree["cuda"] = [state.numpy() for state in torch.cuda.get_rng_state_all()]
    return tree


def set_rng(tree: dict[str, Any]) -> None:
    """Sets this process's generators to what `rng_tree` gave; GPUs that are not here any more are passed over."""
    python, legacy = tree["python"], tree["numpy"]
    random.setstate((python["version"], tuple(int(word) for word in python["words"]), python["gauss"]))
    np.random.set_state(
        (legacy["kind"], legacy["words"], legacy["position"], legacy["has_gauss"], legacy["gauss"]),
    )
    torch.set_rng_state(torch.from_numpy(np.array(tree["torch"])))
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, state in enumerate(tree.get("cuda", ())[:devices]):
        torch.cuda.set_rng_state(torch.from_numpy(np.array(state)), device)
