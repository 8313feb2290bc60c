"""Writes the golden checkpoints of `tests/data/rllib`: `PYTHONPATH=. python tests/data/make_rllib.py [names]`.

| Name | What | How it was made |
|---|---|---|
| native-2.1 | PPO on CartPole with a mean-std filter | written by Ray 2.60 |
| native-2.1-two | PPO with two policies, a lambda as mapping function | written by Ray 2.60 |
| native-2.0 | native-2.1 in the layout of Ray 2.32 to 2.39 | by hand, see `as_2_0` |
| native-1.1 | PPO of the old API stack on CartPole | written by Ray 2.60 |
| native-1.0 | native-1.1 in the layout of Ray 2.1 to 2.3 | by hand, see `as_1_0` |
| ours-1 | an Algorithm (PPO on CartPole) in format 1 of rl_ckpt.rllib | written by rl_ckpt 0.1.0 |
| ours-1-policy | one policy in that format | written by rl_ckpt 0.1.0 |

Releases of Ray that write 2.0 and 1.0 do not run on the Pythons of today, hence by hand, from their sources.
They are made once a version and stay in git; `tests/rllib/native/test_golden.py` reads them with every release.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import ray
import ray.cloudpickle as cloudpickle
from packaging.version import Version
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.rl_module.rl_module import RLModuleConfig
from ray.rllib.utils.filter import NoFilter

from tests.rllib.native.golden import FOLDER, old_ppo, small_ppo, two_policies


def _native(name: str, config: AlgorithmConfig) -> None:
    algo = config.build_algo()
    algo.train()
    folder = FOLDER / name
    folder.mkdir(parents=True)
    algo.save_checkpoint(str(folder))
    algo.stop()
    for path in folder.rglob("*.json"):  # Ray writes the absolute path of the folder it was given
        about = json.loads(path.read_text())
        about["state_file"] = Path(about["state_file"]).name
        path.write_text(json.dumps(about))


def _old() -> None:
    _native("native-1.1", old_ppo())
    path = FOLDER / "native-1.1" / "policies" / "default_policy" / "policy_state.pkl"
    state = _load(path)
    name, connectors = state["connector_configs"]["agent"]
    # RLlib has a pickle in the pickle there, of functions, with the paths of their files: another one in its place.
    kept = [(one, pickle.dumps({}) if isinstance(params, bytes) else params) for one, params in connectors]
    state["connector_configs"]["agent"] = (name, kept)
    _dump(path, state)


def _load(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def _dump(path: Path, value: Any) -> None:
    path.write_bytes(cloudpickle.dumps(value))


def as_2_0(source: Path, target: Path) -> None:
    """The layout of version 2.0: the config as an object, RLModuleConfigs, other names of files, no msgpack.

    `module_state.pt` is a pickle as well. The config has a setting that no longer exists.
    """
    shutil.copytree(source, target)
    for path in [*target.rglob("metadata.json"), target / "rllib_checkpoint.json"]:
        about = json.loads(path.read_text())
        stem = about["state_file"]
        about |= {"checkpoint_version": "2.0", "ray_version": "2.35.0", "ray_commit": "", "state_file": f"{stem}.pkl"}
        path.write_text(json.dumps(about))
    args = _load(target / "class_and_ctor_args.pkl")
    settings = args["ctor_args_and_kwargs"][0][0]
    config = settings["class"]()
    vars(config).update({name: value for name, value in settings.items() if name != "class"})
    vars(config)["_enable_new_api_stack"] = True
    _dump(target / "class_and_ctor_args.pkl", {**args, "ctor_args_and_kwargs": ((config,), {})})
    modules = target / "learner_group" / "learner" / "rl_module"
    for folder in (path for path in modules.iterdir() if path.is_dir()):
        args = _load(folder / "class_and_ctor_args.pkl")
        said = dict(args["ctor_args_and_kwargs"][1])
        made = RLModuleConfig(
            observation_space=said["observation_space"],
            action_space=said["action_space"],
            model_config_dict=said["model_config"],
            catalog_class=said["catalog_class"],
        )
        _dump(folder / "class_and_ctor_args.pkl", {**args, "ctor_args_and_kwargs": ((), {"config": made})})
        (folder / "module_state.pkl").rename(folder / "module_state.pt")
    (modules / "module_state.pkl").rename(modules / "state.pkl")


def as_1_0(source: Path, target: Path) -> None:
    """The layout of version 1.0: no `format` in the JSON files, filters in the worker's state."""
    shutil.copytree(source, target)
    for path in target.rglob("rllib_checkpoint.json"):
        about = json.loads(path.read_text())
        about |= {"checkpoint_version": "1.0", "ray_version": "2.2.0", "ray_commit": ""}
        del about["format"]
        path.write_text(json.dumps(about))
    for path in target.rglob("*_state.pkl"):
        state = _load(path) | {"checkpoint_version": Version("1.0")}
        if "worker" in state:
            state["worker"]["filters"] = {"default_policy": NoFilter()}
        _dump(path, state)


def _ours() -> None:
    from rl_ckpt.rllib import save

    algo = small_ppo().build_algo()
    algo.train()
    save(algo, str(FOLDER / "ours-1"), metrics={"iteration": algo.iteration})
    algo.stop()


def _ours_policy() -> None:
    from rl_ckpt.rllib.policy import save_policy

    algo = small_ppo().build_algo()
    save_policy(str(FOLDER / "ours-1-policy"), algo.learner_group._learner.module["default_policy"], step=3)
    algo.stop()


_MAKERS = {
    "native-2.1": lambda: _native("native-2.1", small_ppo()),
    "native-2.1-two": lambda: _native("native-2.1-two", two_policies()),
    "native-2.0": lambda: as_2_0(FOLDER / "native-2.1", FOLDER / "native-2.0"),
    "native-1.1": _old,
    "native-1.0": lambda: as_1_0(FOLDER / "native-1.1", FOLDER / "native-1.0"),
    "ours-1": _ours,
    "ours-1-policy": _ours_policy,
}


def main(names: list[str]) -> None:
    """Makes the checkpoints that are named anew; all of them where none is."""
    ray.init("local", include_dashboard=False, num_cpus=4, object_store_memory=100 << 20, logging_level="ERROR")
    for name in names or list(_MAKERS):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        _MAKERS[name]()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
