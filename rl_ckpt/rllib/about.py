"""About: what a checkpoint of RLlib's things says of itself, and whether this release reads it.

Owns: the version of the tree in which algorithms and policies are stored (`FORMAT`), which is apart from the version of
the files (docs/format.md). Does not do: the rest of that tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ray

from rl_ckpt._version import __version__
from rl_ckpt.errors import InvalidInputError

FORMAT = 1
"""Raised when an older release could not read the tree rightly; this one reads all up to it."""


def about_tree(kind: str, policies: Iterable[str], **more: Any) -> dict[str, Any]:
    """The part `about/` of a checkpoint.

    Args:
        kind: "algorithm" or "policy".
        policies: The ids of its policies.
        more: Further plain data.
    """
    return {
        "format": FORMAT,
        "kind": kind,
        "ray": ray.__version__,
        "rl_ckpt": __version__,
        "policies": list(policies),
        **more,
    }


def check_about(tree: Mapping[str, Any], url: str) -> dict[str, Any]:
    """The part `about/` of a loaded tree.

    Raises:
        InvalidInputError: It is no checkpoint of RLlib's things, or a newer release wrote it.
    """
    about = tree.get("about")
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise InvalidInputError(
            f"{url} holds no checkpoint of an Algorithm or a policy (there is no part `about`): it was saved with "
            "Checkpointer, and Checkpointer.load_state reads it"
        )
    if about["format"] > FORMAT:
        raise InvalidInputError(
            f"{url} was saved by rl_ckpt {about.get('rl_ckpt')} in format {about['format']} of rl_ckpt.rllib; this "
            f"release ({__version__}) reads formats up to {FORMAT}. Upgrade rl_ckpt"
        )
    return about
