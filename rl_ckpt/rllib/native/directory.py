"""A native RLlib checkpoint directory, wherever it lies: its files by name, and which version of the layout it is.

Owns reading: nothing is written, and every error names the file. What a pickle may do is settled by `trust`: with
"restricted" nothing that it names is imported or called (`unpickle.py`), with "full" it is loaded as Ray would load it.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rl_ckpt.errors import CheckpointNotFoundError, CorruptionError, InvalidInputError, UntrustedDataError
from rl_ckpt.rllib.native.unpickle import restricted_loads
from rl_ckpt.store.base import ObjectMissingError
from rl_ckpt.store.urls import open_store

Trust = Literal["restricted", "full"]
Layout = Literal["algorithm", "rl module", "old algorithm", "old policy"]

KNOWN_VERSIONS = ("1.0", "1.1", "2.0", "2.1")
"""Of RLlib's layouts. 1.2 was that of a stack half old and half new, which no Ray of today runs."""
_MODULES = "learner_group/learner/rl_module"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a directory is."""

    layout: Layout
    version: str
    """Of RLlib's layout, as "2.1"; as the directory says."""
    ray: str
    """Version of Ray that wrote it; empty where it does not say."""


class NativeDirectory:
    """The files of one native checkpoint.

    Attributes:
        url: Where it is, normalised.
        trust: What its pickles may do.
    """

    def __init__(self, source: str, trust: Trust, storage_options: Mapping[str, Any] | None = None) -> None:
        """Lists the files.

        Raises:
            CheckpointNotFoundError: There is nothing at that place.
            InvalidInputError: The url or `trust` is not usable.
            StorageError: The store failed.
        """
        if trust not in ("restricted", "full"):
            raise InvalidInputError(f"trust={trust!r} must be 'restricted' or 'full'")
        self.trust = trust
        self._store = open_store(source, storage_options)
        self.url = self._store.url
        self._names = {item.name for item in self._store.list()}
        if not self._names:
            raise CheckpointNotFoundError(f"{self.url}: no such directory, or it is empty")

    def has(self, name: str) -> bool:
        """Whether there is a file of that name, relative to the directory."""
        return name in self._names

    def folders(self, parent: str) -> list[str]:
        """Names of the folders directly inside one, sorted."""
        inside = (name[len(parent) + 1 :] for name in self._names if name.startswith(f"{parent}/"))
        return sorted({rest.split("/")[0] for rest in inside if "/" in rest})

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            CorruptionError: It is missing or empty.
            StorageError: The store failed.
        """
        try:
            data = self._store.get(name)
        except ObjectMissingError:
            raise CorruptionError(
                f"{self._store.object_url(name)}: missing; the checkpoint is not complete (was it copied whole?)"
            ) from None
        if not data:
            raise CorruptionError(f"{self._store.object_url(name)}: empty; the checkpoint was not written to its end")
        return data

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object of the directory.

        Raises:
            CorruptionError: It is missing, or no JSON object.
        """
        data = self.read(name)
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CorruptionError(f"{self._store.object_url(name)}: no JSON: {error}") from error
        if not isinstance(found, dict):
            raise CorruptionError(f"{self._store.object_url(name)}: a JSON {type(found).__name__}, not an object")
        return found

    def pickled(self, name: str) -> Any:
        """The value of a pickle: as `restricted_loads` gives it, or with full trust as it was.

        Raises:
            UntrustedDataError: Its pickle wants what is not allowed.
            CorruptionError: It is missing, damaged or truncated.
        """
        data, url = self.read(name), self._store.object_url(name)
        if self.trust == "restricted":
            return restricted_loads(data, url)
        import ray.cloudpickle as cloudpickle

        try:
            return cloudpickle.loads(data)
        except (ImportError, AttributeError) as error:
            raise InvalidInputError(
                f"{url}: a class or function that it names is not importable here: {error}; put its package on the "
                "path, or import with trust='restricted', which leaves out what it does not need"
            ) from error
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError) as error:
            raise CorruptionError(f"{url}: can't be unpickled ({type(error).__name__}: {error})") from error

    def mapping(self, name: str) -> dict[str, Any]:
        """A pickle that holds a dict, as all state files do; raises as `pickled`."""
        found = self.pickled(name)
        if not isinstance(found, dict):
            raise CorruptionError(f"{self._store.object_url(name)}: a {type(found).__name__}, where a dict should be")
        return found

    def state(self, folder: str, *stems: str) -> dict[str, Any]:
        """The state file of a component, whichever of the names it has.

        Args:
            folder: Of the component; empty: the directory itself.
            stems: Possible names, `state` by default, without the ending.

        Raises:
            CorruptionError: None is there (the first is named), or it is damaged.
            InvalidInputError: It is msgpack, which is not read.
        """
        where = f"{folder}/" if folder else ""
        for stem in stems or ("state",):
            for ending in (".pkl", ".pt"):
                if self.has(where + stem + ending):
                    return self.mapping(where + stem + ending)
            for ending in (".msgpack", ".msgpck"):
                if self.has(where + stem + ending):
                    raise InvalidInputError(
                        f"{self._store.object_url(where + stem + ending)}: checkpoints in msgpack are not imported; "
                        "load it with Ray and save it without `_use_msgpack_checkpoints`"
                    )
        return self.mapping(where + (stems or ("state",))[0] + ".pkl")

    def kind(self) -> Kind:
        """What this directory is.

        Raises:
            InvalidInputError: No native checkpoint, or one of a version that is not known; says which are.
            CorruptionError: Its metadata is damaged.
        """
        about = next((name for name in ("rllib_checkpoint.json", "metadata.json") if self.has(name)), None)
        said = self.json(about) if about else {}
        version, ray = str(said.get("checkpoint_version", "")), str(said.get("ray_version", ""))
        layout = self._layout()
        if layout is None:
            raise InvalidInputError(f"{self.url} {self._not_one()}")
        if not version:
            version = "1.0" if layout.startswith("old") else "2.0"
        if version not in KNOWN_VERSIONS or layout.startswith("old") == (version >= "2"):
            raise InvalidInputError(
                f"{self.url}: RLlib's checkpoint version {version!r} ({layout}); this release imports "
                f"{', '.join(KNOWN_VERSIONS)}"
            )
        return Kind(layout, version, ray)

    def _layout(self) -> Layout | None:
        if self.folders("policies"):
            return "old algorithm"
        if self.has("policy_state.pkl") or self.has("policy_state.msgpck"):
            return "old policy"
        if self.folders(_MODULES) or any(name.startswith("learner_group/") for name in self._names):
            return "algorithm"
        if any(self.has(f"module_state{ending}") for ending in (".pkl", ".pt", ".msgpack")):
            return "rl module"
        if self.has("algorithm_state.pkl"):
            return "algorithm" if self.has("class_and_ctor_args.pkl") else "old algorithm"
        return None

    def _not_one(self) -> str:
        if self.has("run.json"):
            return "is a run of rl_ckpt, not a native directory: load it with rl_ckpt.rllib.load"
        if any(re.fullmatch(r"checkpoint-\d+", name) for name in self._names):
            return "is a checkpoint of Ray 2.0 or older (version 0.1, a single file), which is not imported"
        if self.folders("learner/rl_module") or self.folders("rl_module"):
            return "is a part of an Algorithm's checkpoint: give the whole directory, or one of its RLModules"
        some = ", ".join(sorted(self._names)[:5])
        return f"is no native RLlib checkpoint: none of its files is one of RLlib's (it has {some})"


def check_allowed(allow_pickle: bool, source: str) -> None:
    """Refuses to read a native checkpoint without the caller's word.

    Raises:
        UntrustedDataError: `allow_pickle` is not True.
    """
    if allow_pickle is not True:
        raise UntrustedDataError(
            f"{source}: native RLlib checkpoints are made of pickles, which may run code when they are read. Pass "
            "allow_pickle=True to import it; they are then read in a restricted way that runs none "
            "(trust='full' loads them as Ray does)"
        )
