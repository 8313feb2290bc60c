"""Native directories that are not what they should be: the error names the file, nothing runs, nothing is written."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import types

import numpy as np
import pytest
import ray.cloudpickle as cloudpickle
from ray.rllib.policy.policy import Policy

from rl_ckpt.errors import CheckpointNotFoundError, CorruptionError, InvalidInputError, UntrustedDataError
from rl_ckpt.rllib.native import import_native, load_old_policy
from tests.rllib.native.golden import FOLDER

MODULE = "learner_group/learner/rl_module/default_policy"
RAN: list[object] = []


@pytest.fixture
def native(tmp_path):
    shutil.copytree(FOLDER / "native-2.1", tmp_path / "native")
    return tmp_path / "native"


@pytest.fixture
def refused(tmp_path, native):
    """Imports, and sees that nothing was written."""

    def run(error, match, source=native, **options):
        with pytest.raises(error, match=match) as caught:
            import_native(str(source), str(tmp_path / "run"), **({"allow_pickle": True} | options))
        assert not (tmp_path / "run").exists()
        return caught.value

    return run


@pytest.fixture
def bad(monkeypatch):
    """Leaves a trace where its `payload` runs."""
    module = types.ModuleType("rl_ckpt_bad_import")

    def payload(*args):
        RAN.append(args)
        return {}

    payload.__module__ = module.__name__
    payload.__qualname__ = "payload"
    module.payload = payload  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    RAN.clear()
    return payload


class Calls:
    def __init__(self, function, *args):
        self.how = (function, args)

    def __reduce__(self):
        return self.how


def change(path, update):
    value = pickle.loads(path.read_bytes())
    path.write_bytes(cloudpickle.dumps(update(value)))


def test_without_the_flag(refused):
    refused(UntrustedDataError, r"made of pickles.*allow_pickle=True", allow_pickle=False)
    refused(UntrustedDataError, "allow_pickle=True", allow_pickle="restricted")


@pytest.mark.parametrize(
    "file",
    [
        "algorithm_state.pkl",
        "class_and_ctor_args.pkl",
        "learner_group/learner/state.pkl",
        f"{MODULE}/module_state.pkl",
        f"{MODULE}/class_and_ctor_args.pkl",
        "env_runner/state.pkl",
        "env_runner/env_to_module_connector/MeanStdFilter/state.pkl",
    ],
)
class TestEachFile:
    def test_code_in_it_is_refused_and_does_not_run(self, file, native, refused, bad):
        path = native / file
        value = pickle.loads(path.read_bytes()) | {"more": [Calls(bad, 1)]}
        path.write_bytes(cloudpickle.dumps(value))
        refused(UntrustedDataError, rf"{file}: the pickle wants to call rl_ckpt_bad_import\.payload")
        assert RAN == []
        pickle.loads(path.read_bytes())
        assert RAN  # as Ray would have loaded it

    def test_truncated(self, file, native, refused):
        path = native / file
        path.write_bytes(path.read_bytes()[:-3])
        refused(CorruptionError, rf"native/{file}: no pickle that can be read")

    def test_truncated_with_full_trust(self, file, native, refused):
        path = native / file
        path.write_bytes(path.read_bytes()[:-3])
        refused(CorruptionError, rf"native/{file}: can't be unpickled", trust="full")

    def test_empty(self, file, native, refused):
        (native / file).write_bytes(b"")
        refused(CorruptionError, rf"native/{file}: empty")

    def test_something_else(self, file, native, refused):
        (native / file).write_bytes(pickle.dumps([1]))
        refused(CorruptionError, rf"native/{file}: a list, where a dict should be")


@pytest.mark.parametrize(
    "file",
    [
        "algorithm_state.pkl",
        "class_and_ctor_args.pkl",
        "learner_group/learner/state.pkl",
        f"{MODULE}/class_and_ctor_args.pkl",
        "env_runner/state.pkl",
    ],
)
def test_missing(file, native, refused):
    (native / file).unlink()
    refused(CorruptionError, rf"native/{file}: missing; the checkpoint is not complete")


def test_missing_weights(native, refused):
    (native / MODULE / "module_state.pkl").unlink()
    refused(CorruptionError, rf"{MODULE}/module_state\.pkl: missing")


def test_no_learner(native, refused):
    shutil.rmtree(native / "learner_group")
    refused(CorruptionError, r"learner_group/learner/rl_module: no modules; the checkpoint is not complete")


def renamed(weights):
    return {key.replace("encoder", "body"): value for key, value in weights.items()}


@pytest.mark.parametrize(
    ("update", "said"),
    [
        (renamed, r"missing \['encoder\..*unexpected \['body\."),
        (
            lambda w: {**w, "pi.net.mlp.0.bias": np.zeros(3, np.float32)},
            r"pi\.net\.mlp\.0\.bias has shape \(3,\).*\(2,\)",
        ),
        (lambda w: {**w, "pi.net.mlp.0.bias": "no"}, r"pi\.net\.mlp\.0\.bias is a str, where a tensor should be"),
        (lambda w: dict(list(w.items())[1:]), r"missing \['encoder"),
    ],
)
def test_weights_that_do_not_fit(update, said, native, refused):
    change(native / MODULE / "module_state.pkl", update)
    refused(CorruptionError, rf"module_state\.pkl: .*{said}")


def test_weights_of_a_dtype_that_would_be_converted(native, refused):
    change(
        native / MODULE / "module_state.pkl", lambda w: {key: value.astype(np.float64) / 3 for key, value in w.items()}
    )
    refused(InvalidInputError, r"is torch\.float64 in the file, and torch\.float32 in the module: values would change")


def optimizers(update):
    def change_state(state):
        saved = state["optimizer"]["default_policy_default_optimizer"]["state"]
        return update(state, saved) or state

    return change_state


def drop_positions(_state, saved):
    saved["param_groups"][0]["params"] = saved["param_groups"][0]["params"][:-1]


def other_shape(_state, saved):
    saved["state"][0]["exp_avg"] = np.zeros((2, 2), np.float32)


@pytest.mark.parametrize(
    ("update", "said"),
    [
        (lambda state, _: {**state, "optimizer": {}}, r"optimizers \[\] are in it, and \['default_policy_default_opt"),
        (lambda state, _: {k: v for k, v in state.items() if k != "optimizer"}, "holds no optimizers"),
        (drop_positions, r"optimizer 'default_policy_default_optimizer' has \[7\] parameters in its groups.*are \[8\]"),
        (other_shape, r"parameter 0: exp_avg has shape \(2, 2\), and its parameter has \(4, 4\)"),
    ],
)
def test_optimizers_that_do_not_fit(update, said, native, refused):
    change(native / "learner_group/learner/state.pkl", optimizers(update))
    refused(CorruptionError, rf"learner_group/learner/state\.pkl: .*{said}")


def test_a_class_that_is_none_of_rllibs_is_not_called(native, refused, bad):
    path = native / MODULE / "class_and_ctor_args.pkl"
    change(path, lambda args: {**args, "class": bad})
    refused(InvalidInputError, r"default_policy: the module's class is rl_ckpt_bad_import\.payload, which a restricted")
    refused(CorruptionError, r"payload.*which is no RLModule", allow_imports=["rl_ckpt_bad_import"])
    refused(CorruptionError, r"payload.*which is no RLModule", trust="full")
    assert RAN == []


def test_rllibs_examples_are_not_imported(native, refused):
    from ray.rllib.examples.rl_modules.classes.modelv2_to_rlm import ModelV2ToRLModule

    change(native / MODULE / "class_and_ctor_args.pkl", lambda args: {**args, "class": ModelV2ToRLModule})
    refused(InvalidInputError, r"modelv2_to_rlm\.ModelV2ToRLModule, which a restricted reading does not import")


def test_a_class_by_value(native, refused):
    class Mine:
        pass

    Mine.__module__ = "__main__"
    change(native / "class_and_ctor_args.pkl", lambda args: {**args, "class": Mine})
    refused(InvalidInputError, r"the Algorithm's class is .*Mine: code inside of the pickle")


def test_a_config_that_is_none(native, refused):
    change(native / "class_and_ctor_args.pkl", lambda args: {**args, "ctor_args_and_kwargs": (({"lr": 1},), {})})
    refused(CorruptionError, r"class_and_ctor_args\.pkl: holds a dict, where a config should be")


def test_damaged_json(native, refused):
    (native / "rllib_checkpoint.json").write_text('{"checkpoint_version": ')
    refused(CorruptionError, r"rllib_checkpoint\.json: no JSON")


@pytest.mark.parametrize("version", ["3.0", "2.2", "1.2", "0.1", "1.1"])
def test_another_version(version, native, refused):
    about = json.loads((native / "rllib_checkpoint.json").read_text())
    (native / "rllib_checkpoint.json").write_text(json.dumps(about | {"checkpoint_version": version}))
    refused(InvalidInputError, rf"checkpoint version '{version}'.*imports 1\.0, 1\.1, 2\.0, 2\.1")


def test_not_a_native_checkpoint(tmp_path, refused):
    refused(CheckpointNotFoundError, "no such directory", source=tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    refused(InvalidInputError, r"is no native RLlib checkpoint.*notes\.txt", source=tmp_path / "other")
    refused(InvalidInputError, r"is a run of rl_ckpt.*rl_ckpt\.rllib\.load", source=FOLDER / "ours-1")
    refused(InvalidInputError, "is a part of an Algorithm's checkpoint", source=FOLDER / "native-2.1/learner_group")
    refused(InvalidInputError, "is a part of an Algorithm's", source=FOLDER / "native-2.1/learner_group/learner")
    (tmp_path / "other" / "checkpoint-12").write_bytes(b"x")
    refused(InvalidInputError, r"Ray 2\.0 or older", source=tmp_path / "other")


def test_bad_arguments(native, refused):
    refused(InvalidInputError, r"trust='none' must be 'restricted' or 'full'", trust="none")
    refused(InvalidInputError, r"allow_imports='tests' must be a list", allow_imports="tests")
    refused(InvalidInputError, r"step=-1", step=-1)


def test_msgpack(native, refused):
    (native / "algorithm_state.pkl").rename(native / "algorithm_state.msgpack")
    refused(InvalidInputError, r"algorithm_state\.msgpack: checkpoints in msgpack are not imported")


def test_damaged_old_policy(tmp_path, refused):
    source = tmp_path / "old"
    shutil.copytree(FOLDER / "native-1.1", source)
    change(source / "policies/default_policy/policy_state.pkl", lambda state: {**state, "weights": {"w": [1.0]}})
    refused(InvalidInputError, r"policy_state\.pkl: .*only torch Policies", source=source)
    change(source / "policies/default_policy/policy_state.pkl", lambda state: {"weights": {}})
    refused(CorruptionError, r"policy_state\.pkl: not the state of a torch Policy", source=source)


def test_random_damage_is_an_error_or_an_import(tmp_path, native, bad):
    rng = np.random.default_rng(1)
    files = sorted(path for path in native.rglob("*") if path.is_file())
    for turn in range(8):
        path = files[rng.integers(len(files))]
        good = path.read_bytes()
        data = bytearray(good)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        target = tmp_path / f"run-{turn}"
        try:
            import_native(str(native), str(target), allow_pickle=True)
        except (CorruptionError, InvalidInputError, UntrustedDataError):
            assert not target.exists()
        path.write_bytes(good)
    assert RAN == []


def test_pickles_that_rllib_would_load_with_a_policy_are_left_out(tmp_path, bad):
    """The old stack's connectors keep pickled text inside of the pickled state."""
    source = tmp_path / "old"
    shutil.copytree(FOLDER / "native-1.1", source)

    def hide(state):
        name, connectors = state["connector_configs"]["agent"]
        hostile = pickle.dumps(Calls(bad, 1))
        hidden = [(one, hostile if one == "StateBufferConnector" else params) for one, params in connectors]
        return {**state, "connector_configs": {"agent": (name, hidden)}}

    change(source / "policies/default_policy/policy_state.pkl", hide)
    import_native(str(source), str(tmp_path / "run"), allow_pickle=True)
    load_old_policy(str(tmp_path / "run"))
    assert RAN == []
    Policy.from_checkpoint(str(source / "policies/default_policy"))
    assert RAN  # as Ray loads it
