"""Golden checkpoints of every version: what this release reads stays what was written. No Ray is started."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import ray
import torch
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from rl_ckpt import Checkpointer
from rl_ckpt.errors import InvalidInputError
from rl_ckpt.rllib.config import config_from
from rl_ckpt.rllib.metrics import set_metrics
from rl_ckpt.rllib.native import import_native, load_old_policy
from rl_ckpt.rllib.policy import load_policy
from tests.rllib.native.golden import FOLDER, filtered, small_ppo

LEARNER = "learner_group/learner"


@pytest.fixture(autouse=True)
def no_ray():
    yield
    assert not ray.is_initialized()


def imported(name, tmp_path, **options):
    report = import_native(str(FOLDER / name), str(tmp_path / "run"), allow_pickle=True, **options)
    return report, Checkpointer(str(tmp_path / "run")).load_state()


def unpickled(name, file):
    """What Ray reads there: the golden files are ours, and trusted."""
    return pickle.loads((FOLDER / name / file).read_bytes())


def check_policy(tree, name, policy, weights_file):
    weights = unpickled(name, f"{LEARNER}/rl_module/{policy}/{weights_file}")
    found = tree["policies"][policy]["module"]
    assert list(found) == list(weights)
    assert all(np.array_equal(found[key].numpy(), weights[key]) for key in weights)
    assert all(found[key].numpy().dtype == weights[key].dtype for key in weights)
    native = unpickled(name, f"{LEARNER}/state.pkl")["optimizer"][f"{policy}_default_optimizer"]["state"]
    optimizer = tree["policies"][policy]["optimizers"]["default_optimizer"]
    trained = [key for key in weights if not key.endswith("_const")]  # buffers are no parameters
    assert len(trained) == len(native["state"]) < len(weights)
    assert list(optimizer["state"]) == optimizer["param_groups"][0]["params"] == trained
    for at, key in enumerate(trained):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert np.array_equal(optimizer["state"][key][moment].numpy(), native["state"][at][moment])
        assert optimizer["state"][key]["step"] == native["state"][at]["step"] > 0


@pytest.mark.parametrize(("name", "file"), [("native-2.1", "module_state.pkl"), ("native-2.0", "module_state.pt")])
def test_new_stack(name, file, tmp_path):
    report, tree = imported(name, tmp_path)
    assert (report.kind, report.version, report.policies) == ("algorithm", name[-3:], ("default_policy",))
    assert report.checkpoint.step == 1
    check_policy(tree, name, "default_policy", file)
    assert tree["algorithm"]["iteration"] == unpickled(name, "algorithm_state.pkl")["training_iteration"] == 1
    stats = unpickled(name, "algorithm_state.pkl")["metrics_logger"]["stats"]
    logger = MetricsLogger(root=True)
    set_metrics(logger, tree["algorithm"]["metrics"])
    saved = logger.get_state()["stats"]
    assert saved.keys() == stats.keys()
    sampled = "env_runners--num_env_steps_sampled_lifetime"
    assert repr(saved[sampled]) == repr(stats[sampled])
    assert stats[sampled]["lifetime_sum"] > 0
    assert tree["learner"]["weights_seq_no"] == unpickled(name, f"{LEARNER}/state.pkl")["weights_seq_no"]
    (runner,) = tree["env_runners"].values()
    ((_, filter_),) = runner["connectors"]["env_to_module"]["MeanStdFilter"]["items"]
    native = unpickled(name, "env_runner/env_to_module_connector/MeanStdFilter/state.pkl")
    assert filter_["running_stats"][0]["num_pushes"] == native[None]["running_stats"][0]["num_pushes"] > 0
    assert isinstance(filter_["running_stats"][0]["mean_array"], np.ndarray)


@pytest.mark.parametrize("name", ["native-2.1", "native-2.0"])
def test_config(name, tmp_path):
    report, tree = imported(name, tmp_path)
    assert "tests.rllib.native.golden.filtered" in report.missing["env_to_module_connector"]
    assert ("_enable_new_api_stack" in str(report.notices)) == (name == "native-2.0")
    with pytest.raises(InvalidInputError, match=r"env_to_module_connector: .*allow_imports=\['tests'\]"):
        config_from(tree["config"])
    config = config_from(tree["config"], given={"env_to_module_connector": filtered})
    wanted = small_ppo()
    assert type(config) is type(wanted)
    for setting in ("env", "minibatch_size", "num_epochs", "train_batch_size_per_learner", "num_env_runners", "lr"):
        assert getattr(config, setting) == getattr(wanted, setting)
    assert config._model_config == wanted._model_config


def test_allowed_imports_are_kept_by_name(tmp_path):
    report, tree = imported("native-2.1", tmp_path, allow_imports=["tests"])
    assert report.missing == {}
    assert config_from(tree["config"])._env_to_module_connector is filtered


def test_given_config(tmp_path):
    report, tree = imported("native-2.1", tmp_path, config=small_ppo().training(lr=0.5))
    assert report.missing == {}
    assert config_from(tree["config"]).lr == 0.5


def test_full_trust(tmp_path):
    report, tree = imported("native-2.1", tmp_path, trust="full")
    assert report.missing == {}
    check_policy(tree, "native-2.1", "default_policy", "module_state.pkl")


def test_two_policies_with_code_in_the_config(tmp_path):
    report, tree = imported("native-2.1-two", tmp_path)
    assert report.policies == ("p0", "p1")
    for policy in report.policies:
        check_policy(tree, "native-2.1-two", policy, "module_state.pkl")
    assert "<lambda>: code inside of the pickle" in report.missing["policy_mapping_fn"]
    assert "tests.rllib.small.Pairs" in report.missing["env"]


def test_policies_of_an_import_load_alone(tmp_path):
    imported("native-2.1-two", tmp_path)
    module = load_policy(str(tmp_path / "run"), "p1")
    weights = unpickled("native-2.1-two", f"{LEARNER}/rl_module/p1/module_state.pkl")
    assert all(np.array_equal(tensor.numpy(), weights[key]) for key, tensor in module.state_dict().items())
    out = module.forward_inference({"obs": torch.zeros(5, 3)})
    assert out["action_dist_inputs"].shape == (5, 2)


def test_a_single_rl_module(tmp_path):
    folder = FOLDER / "native-2.1" / LEARNER / "rl_module" / "default_policy"
    report = import_native(str(folder), str(tmp_path / "run"), allow_pickle=True, policy_id="alone", step=7)
    assert (report.kind, report.policies, report.checkpoint.step) == ("policy", ("alone",), 7)
    module = load_policy(str(tmp_path / "run"), "alone")
    weights = pickle.loads((folder / "module_state.pkl").read_bytes())
    assert all(np.array_equal(tensor.numpy(), weights[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("name", ["native-1.1", "native-1.0"])
def test_old_stack(name, tmp_path):
    report, tree = imported(name, tmp_path)
    assert (report.kind, report.version) == ("old_stack", name[-3:])
    assert tree["algorithm"]["iteration"] == 1
    native = unpickled(name, "policies/default_policy/policy_state.pkl")
    policy = load_old_policy(str(tmp_path / "run"))
    state = policy.get_state()
    assert list(state["weights"]) == list(native["weights"])
    assert all(np.array_equal(state["weights"][key], native["weights"][key]) for key in native["weights"])
    (mine,), (theirs,) = state["_optimizer_variables"], native["_optimizer_variables"]
    assert mine["param_groups"] == theirs["param_groups"]
    for at, moments in theirs["state"].items():
        assert all(np.array_equal(mine["state"][at][key], value) for key, value in moments.items())
    assert state["current_kl_coeff"] == native["current_kl_coeff"]
    assert state["global_timestep"] == native["global_timestep"] > 0
    filters = dict(native["connector_configs"]["agent"][1])["MeanStdObservationFilterAgentConnector"]["running_stats"]
    restored = dict(state["connector_configs"]["agent"][1])["MeanStdObservationFilterAgentConnector"]["running_stats"]
    assert restored == filters
    assert policy.compute_single_action(np.zeros(4, np.float32), explore=False)[0] in (0, 1)


def test_an_old_policy_alone(tmp_path):
    folder = FOLDER / "native-1.1" / "policies" / "default_policy"
    report = import_native(str(folder), str(tmp_path / "run"), allow_pickle=True, policy_id="mine")
    assert (report.kind, report.policies) == ("old_stack", ("mine",))
    assert load_old_policy(str(tmp_path / "run"), "mine").get_state()["global_timestep"] > 0
    with pytest.raises(InvalidInputError, match=r"no policy 'other'; its policies are \['mine'\]"):
        load_old_policy(str(tmp_path / "run"), "other")
    with pytest.raises(InvalidInputError, match="load_old_policy"):
        load_policy(str(tmp_path / "run"), "mine")


def test_our_policy():
    module = load_policy(str(FOLDER / "ours-1-policy"))
    assert module.forward_inference({"obs": torch.zeros(1, 4)})["action_dist_inputs"].shape == (1, 2)
    assert sum(parameter.numel() for parameter in module.parameters()) > 0


def test_our_algorithms_policy():
    module = load_policy(str(FOLDER / "ours-1"))
    saved = Checkpointer(str(FOLDER / "ours-1")).load_state(select="policies/default_policy/module")
    weights = saved["policies"]["default_policy"]["module"]
    assert all(torch.equal(tensor, weights[key]) for key, tensor in module.state_dict().items())


def test_a_newer_format_is_refused(tmp_path):
    tree = Checkpointer(str(FOLDER / "ours-1-policy")).load_state()
    tree["about"]["format"] = 2
    tree["about"]["rl_ckpt"] = "9.0"
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save_state(1, tree).result()
    with pytest.raises(InvalidInputError, match=r"rl_ckpt 9\.0 in format 2 .*reads formats up to 1\. Upgrade"):
        load_policy(str(tmp_path / "run"))
    with pytest.raises(InvalidInputError, match=r"in format 2"):
        load_old_policy(str(tmp_path / "run"))


def test_a_copy_on_another_file_system(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(FOLDER / "native-2.1") + "/", "/golden-native/", recursive=True)
    try:
        report = import_native("memory://golden-native", str(tmp_path / "run"), allow_pickle=True)
        assert report.policies == ("default_policy",)
    finally:
        memory.rm("/golden-native", recursive=True)
    tree = Checkpointer(str(tmp_path / "run")).load_state()
    check_policy(tree, "native-2.1", "default_policy", "module_state.pkl")


def test_the_source_is_not_changed(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(FOLDER / "native-2.1", copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    import_native(str(copy), str(tmp_path / "run"), allow_pickle=True)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
