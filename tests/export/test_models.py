"""Policies as ONNX and torch.export programs: the same outputs, for every kind of module, without RLlib."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.algorithms.sac.torch.default_sac_torch_rl_module import DefaultSACTorchRLModule
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.utils.torch_utils import convert_to_torch_tensor

from rl_ckpt import InvalidInputError
from rl_ckpt.export import ExportReport, export_model
from rl_ckpt.export.__main__ import main
from rl_ckpt.rllib.policy import save_policy
from tests.export import modules
from tests.export.modules import ACTION, NESTED, OBS

ROOT = Path(__file__).resolve().parents[2]
BOX_ACTION = gym.spaces.Box(-1, 1, (2,), np.float32)
IMAGE = gym.spaces.Box(-1, 1, (42, 42, 3), np.float32)


def config(**changes: Any) -> dict[str, Any]:
    return {**vars(DefaultModelConfig(fcnet_hiddens=[16, 16])), **changes}


def build(cls: type, obs: Any = OBS, action: Any = ACTION, **model_config: Any) -> Any:
    torch.manual_seed(0)
    return cls(observation_space=obs, action_space=action, inference_only=False, model_config=model_config)


def sac() -> Any:
    return build(DefaultSACTorchRLModule, OBS, BOX_ACTION, **config(), twin_q=True)


def dqn() -> Any:
    more = {"double_q": True, "dueling": True, "epsilon": [(0, 1.0), (10000, 0.05)], "num_atoms": 1, "std_init": 0.1}
    return build(DefaultDQNTorchRLModule, **config(), **more)


MODULES: dict[str, Any] = {
    "ppo": lambda: build(DefaultPPOTorchRLModule, **config()),
    "ppo-continuous": lambda: build(DefaultPPOTorchRLModule, OBS, BOX_ACTION, **config()),
    "ppo-lstm": lambda: build(DefaultPPOTorchRLModule, **config(use_lstm=True, lstm_cell_size=8, max_seq_len=5)),
    "ppo-image": lambda: build(
        DefaultPPOTorchRLModule, IMAGE, **config(conv_filters=[[4, 4, 2], [8, 4, 2]], conv_activation="relu")
    ),
    "dqn": dqn,
    "sac": sac,
    "nested": lambda: build(modules.Nested, NESTED, BOX_ACTION),
    "counting": lambda: build(modules.Counting),
    "float64": lambda: build(modules.Linear, dtype="float64"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Any]]:
    """One run for each module, and the module."""
    made = {}
    for name, make in MODULES.items():
        url = str(tmp_path_factory.mktemp("runs") / name)
        made[name] = (url, make())
        save_policy(url, made[name][1], step=7)
    return made


def batch_of(space: Any, size: int, steps: tuple[int, ...] = ()) -> Any:
    """Observations as RLlib hands them to a module: tensors, in the containers of the space."""
    if isinstance(space, gym.spaces.Dict):
        return {key: batch_of(sub, size, steps) for key, sub in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(batch_of(sub, size, steps) for sub in space.spaces)
    space.seed(size)
    values = np.stack([space.sample() for _ in range(size)])
    return convert_to_torch_tensor(values.reshape(size, *steps, *values.shape[1:]))


def named(value: Any, name: str) -> dict[str, np.ndarray[Any, Any]]:
    if isinstance(value, dict):
        return {k: v for key, sub in value.items() for k, v in named(sub, f"{name}.{key}" if name else key).items()}
    if isinstance(value, tuple):
        return {k: v for i, sub in enumerate(value) for k, v in named(sub, f"{name}.{i}").items()}
    return {name: value.detach().numpy()}


def case(module: Any, size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs by name, and what the policy makes of them."""
    stateful = module.is_stateful()
    batch: dict[str, Any] = {"obs": batch_of(module.observation_space, size, (1,) if stateful else ())}
    if stateful:
        initial = module.get_initial_state()
        batch["state_in"] = {key: torch.stack([value + 1] * size) for key, value in initial.items()}
    inputs = named(batch, "")
    with torch.no_grad():
        return inputs, named(module.forward_inference(batch), "")


def run_onnx(report: ExportReport, inputs: dict[str, Any]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    assert [one.name for one in session.get_inputs()] == [one.name for one in report.inputs]
    return dict(zip(names, session.run(names, inputs), strict=True))


def run_torch(report: ExportReport, inputs: dict[str, Any]) -> dict[str, Any]:
    program = torch.export.load(report.path).module()
    with torch.no_grad():
        found = program(*[torch.from_numpy(inputs[one.name]) for one in report.inputs])
    return {info.name: value.numpy() for info, value in zip(report.outputs, found, strict=True)}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_the_exported_model_gives_what_the_policy_gives(
    name: str, format: Any, runs: dict[str, tuple[str, Any]], tmp_path: Path
) -> None:
    url, module = runs[name]
    report = export_model(url, format=format, path=tmp_path / "model")
    assert report.max_difference is not None
    assert report.checked_batches == (1, 2, 7, 32)
    for size in (1, 5, 64):
        inputs, expected = case(module, size)
        assert {one.name for one in report.inputs} == inputs.keys()
        found = run_onnx(report, inputs) if format == "onnx" else run_torch(report, inputs)
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            assert found[key].shape == values.shape, key
            assert found[key].dtype == values.dtype, key
            np.testing.assert_allclose(found[key], values, rtol=1e-4, atol=1e-5, err_msg=key)


def test_what_the_report_and_the_files_say(runs: dict[str, tuple[str, Any]], tmp_path: Path) -> None:
    reports = {f: export_model(runs["ppo-lstm"][0], format=f, path=tmp_path / f) for f in ("onnx", "torch_export")}
    for report in reports.values():
        assert [(one.name, one.dtype, one.shape) for one in report.inputs] == [
            ("obs", "float32", ("batch", 1, 4)),
            ("state_in.c", "float32", ("batch", 1, 8)),
            ("state_in.h", "float32", ("batch", 1, 8)),
        ]
        assert [(one.name, one.shape) for one in report.outputs] == [
            ("action_dist_inputs", ("batch", 1, 3)),
            ("state_out.c", ("batch", 1, 8)),
            ("state_out.h", ("batch", 1, 8)),
        ]
        assert report.action_dist == "ray.rllib.core.distribution.torch.torch_distribution:TorchCategorical"
        assert (report.step, report.policy) == (7, "default_policy")
    model = onnx.load(reports["onnx"].path)
    onnx.checker.check_model(model)
    assert [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input] == [
        ["batch", 1, 4],
        ["batch", 1, 8],
        ["batch", 1, 8],
    ]
    said = {entry.key: entry.value for entry in model.metadata_props}
    extra = {"rl_ckpt.json": ""}
    torch.export.load(reports["torch_export"].path, extra_files=extra)
    assert json.loads(extra["rl_ckpt.json"]) == said
    assert said["rl_ckpt.action_dist"] == reports["onnx"].action_dist
    assert said["rl_ckpt.action_space"] == "Discrete(3)"
    assert json.loads(said["rl_ckpt.initial_state"]) == {"state_in.c": 0, "state_in.h": 0}
    assert [entry["name"] for entry in json.loads(said["rl_ckpt.inputs"])] == ["obs", "state_in.c", "state_in.h"]
    assert said["rl_ckpt.weights_digest"] == reports["onnx"].weights_digest
    arrays = export_model(runs["ppo-lstm"][0], format="safetensors", path=tmp_path / "arrays")
    assert arrays.weights_digest == reports["onnx"].weights_digest


def test_a_state_that_does_not_begin_at_zero_is_in_the_metadata(
    runs: dict[str, tuple[str, Any]], tmp_path: Path
) -> None:
    report = export_model(runs["counting"][0], path=tmp_path / "m.onnx")
    said = {entry.key: entry.value for entry in onnx.load(report.path).metadata_props}
    assert json.loads(said["rl_ckpt.initial_state"]) == {"state_in.mean": [0.5] * 4, "state_in.t": 0}


def test_a_program_of_torch_runs_without_rllib_and_rl_ckpt(runs: dict[str, tuple[str, Any]], tmp_path: Path) -> None:
    report = export_model(runs["ppo"][0], format="torch_export", path=tmp_path / "p.pt2")
    code = (
        "import sys\nsys.modules['ray'] = sys.modules['rl_ckpt'] = None\nimport torch\n"
        f"print(torch.export.load({report.path!r}).module()(torch.zeros(9, 4))[0].shape)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert "torch.Size([9, 3])" in found.stdout, found.stderr


def test_an_opset_can_be_chosen(runs: dict[str, tuple[str, Any]], tmp_path: Path) -> None:
    report = export_model(runs["ppo"][0], path=tmp_path / "p.onnx", opset=18)
    assert report.opset == 18
    assert [one.version for one in onnx.load(report.path).opset_import if not one.domain] == [18]


def test_bfloat16(tmp_path: Path) -> None:
    url, module = str(tmp_path / "run"), build(modules.Linear, dtype="bfloat16")
    save_policy(url, module)
    arrays = export_model(url, format="safetensors", path=tmp_path / "a")
    found = safetensors.torch.load_file(arrays.path)
    assert found["layer.weight"].dtype == torch.bfloat16
    assert all(torch.equal(found[name], value) for name, value in module.state_dict().items())
    program = export_model(url, format="torch_export", path=tmp_path / "p")
    assert program.outputs[0].dtype == "bfloat16"
    assert program.max_difference == 0


def test_saved_tensors_load_into_the_module(runs: dict[str, tuple[str, Any]], tmp_path: Path) -> None:
    url, module = runs["ppo"]
    report = export_model(url, format="state_dict", path=tmp_path / "p.pt")
    fresh = MODULES["ppo"]()
    torch.nn.init.zeros_(next(fresh.parameters()))
    fresh.load_state_dict(torch.load(report.path, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), module.parameters(), strict=True))


WRONG = [
    (modules.Silent, r"gives neither 'action_dist_inputs' nor 'actions' as a tensor \(it gives \['embeddings'\]\)"),
    (modules.Noisy, "gives another 'action_dist_inputs' each time"),
    (modules.Averaging, "'action_dist_inputs' has shape .* for a batch of 2"),
    (modules.Summing, r"'total' has shape \(\) for a batch of 2"),
    (modules.Colliding, r"would be called \['extra.x'\]"),
    (modules.Broken, "forward_inference fails on a batch of .*KeyError: 'observations'"),
]
WRONG_WHEN_TRACED = [
    (modules.Branching, r"torch.export can't trace this module's forward_inference: .*must not depend on the values"),
    (modules.TraceDependent, "'action_dist_inputs' differs from the policy's by 1"),
]


@pytest.mark.parametrize(
    ("cls", "said", "format"),
    [
        *((cls, said, "onnx") for cls, said in [*WRONG, *WRONG_WHEN_TRACED]),
        *((cls, said, "torch_export") for cls, said in WRONG_WHEN_TRACED),
    ],
)
def test_a_module_that_cant_be_exported_says_why(cls: type, said: str, format: Any, tmp_path: Path) -> None:
    url, out = str(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    save_policy(url, build(cls))
    with pytest.raises(InvalidInputError, match=said):
        export_model(url, format=format, path=out / "p")
    assert list(out.iterdir()) == []
    assert export_model(url, format="safetensors", path=out / "p").tensors == 2


def test_a_space_without_tensors_of_one_shape_is_named(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    space = gym.spaces.Dict({"word": gym.spaces.Text(5)})
    save_policy(url, build(modules.Linear, space))
    with pytest.raises(InvalidInputError, match=r"obs.word: a Text space has no tensors"):
        export_model(url, path=tmp_path / "p.onnx")


def test_a_class_that_cant_be_imported_is_named_and_can_be_given(tmp_path: Path) -> None:
    class Here(modules.Linear):
        pass

    url = str(tmp_path / "run")
    save_policy(url, build(Here))
    with pytest.raises(InvalidInputError, match=r"(?s)Here.*module_class"):
        export_model(url, path=tmp_path / "p.onnx")
    assert not (tmp_path / "p.onnx").exists()
    report = export_model(url, path=tmp_path / "p.onnx", module_class=modules.Linear)
    assert report.max_difference is not None


@pytest.mark.parametrize("opset", [5, 99])
def test_an_opset_that_cant_be_had_is_an_error(opset: int, runs: dict[str, tuple[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=f"can't be had in version {opset} of ONNX"):
        export_model(runs["float64"][0], path=tmp_path / "p.onnx", opset=opset)
    assert list(tmp_path.iterdir()) == []


def test_what_is_too_large_for_onnx_or_unknown_to_onnxruntime_says_so(
    runs: dict[str, tuple[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "run")
    save_policy(url, build(modules.Linear, dtype="bfloat16"))
    with pytest.raises(InvalidInputError, match=r"onnxruntime .* can't run the exported model: .*`check=False`"):
        export_model(url, path=tmp_path / "p.onnx")
    assert export_model(url, path=tmp_path / "p.onnx", check=False).outputs[0].dtype == "bfloat16"
    monkeypatch.setattr("rl_ckpt.export.onnx._MOST_BYTES", 100)
    with pytest.raises(InvalidInputError, match="an ONNX file holds at most 2 GiB"):
        export_model(runs["ppo"][0], path=tmp_path / "large.onnx")


def test_without_the_libraries_it_says_what_to_install(
    runs: dict[str, tuple[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"format='onnx' needs onnxruntime: pip install 'rl-ckpt\[export\]'"):
        export_model(runs["ppo"][0], path=tmp_path / "p.onnx")


def test_unchecked(runs: dict[str, tuple[str, Any]], tmp_path: Path) -> None:
    for format in ("onnx", "torch_export"):
        report = export_model(runs["ppo"][0], format=format, path=tmp_path / format, check=False)
        assert (report.checked_batches, report.max_difference) == ((), None)


def run_command(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rl_ckpt.export", *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)


def test_the_command(runs: dict[str, tuple[str, Any]], tmp_path: Path) -> None:
    done = run_command(runs["ppo"][0], "--out", "p.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "policy 'default_policy' of step 7" in done.stdout
    assert "checked with batches of 1, 2, 7, 32: largest difference" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["p.onnx"]
    bad = run_command(runs["ppo"][0], "--policy", "nobody", "--format", "numpy", cwd=tmp_path)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "has no policy 'nobody'" in bad.stderr
    again = run_command(runs["ppo"][0], "--out", "p.onnx", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: p.onnx exists")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_nothing(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, out = str(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    save_policy(url, build(modules.Interrupted, signal=int(number)))
    before = signal.getsignal(signal.SIGTERM)
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert main([url, "--format", "torch_export", "--out", str(out / "p.pt2")]) == 130
    finally:
        signal.signal(signal.SIGINT, outside)
    assert capsys.readouterr().err.endswith("interrupted; nothing was written\n")
    assert signal.getsignal(signal.SIGTERM) is before
    assert list(out.iterdir()) == []
