"""Arrays as files: every dtype, names, metadata, memory, damage; nothing of torch or Ray where none is needed."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl_ckpt import Checkpointer, CorruptionError, InvalidInputError
from rl_ckpt.export import Format, export_arrays, export_model
from rl_ckpt.export import safetensors as writer
from rl_ckpt.export.__main__ import main
from rl_ckpt.export.stream import Target
from rl_ckpt.format.manifest import Chunk
from rl_ckpt.state.boxes import Box, slices
from rl_ckpt.store.run import Run
from tests.s3_servers import S3Server

ROOT = Path(__file__).resolve().parents[2]
TORCH_DTYPES = [
    torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = torch.empty(0, dtype=dtype).element_size() * int(np.prod(shape))
    values = np.random.default_rng(size).integers(0, 2, size, np.uint8)
    return torch.from_numpy(values).view(dtype).reshape(shape)


def module() -> dict[str, torch.Tensor]:
    tied = tensor(torch.float32, 5, 3)
    return {
        **{f"layer.{str(dtype).removeprefix('torch.')}": tensor(dtype, 3, 4) for dtype in TORCH_DTYPES},
        "tied.a": tied,
        "tied.b": tied,
        "temperature": torch.tensor(0.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "large": tensor(torch.float32, 300, 50),
        "odd/name é": tensor(torch.float64, 2),
    }


ABOUT = {"class": "some.module:Policy", "low": np.array([-1.0, -np.inf]), "bounds": (0, 1), "inference_only": False}


def save(url: str, policies: dict[str, Any], step: int = 3, **options: Any) -> None:
    tree = {"about": {"format": 1}, "policies": policies, "algorithm": {"iteration": 3, "big": np.zeros(100_000)}}
    with Checkpointer(url, chunk_bytes=8 << 10, **options) as ckpt:
        ckpt.save_state(step, tree).result(60)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("run") / "run")
    save(url, {"default_policy": {"about": ABOUT, "module": module()}, "a/b": {"module": {"w": torch.ones(2)}}})
    return url


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not same_bits(found[name], expected[name])] == []


def test_safetensors_has_every_dtype_to_the_bit(run: str, tmp_path: Path) -> None:
    report = export_model(run, format="safetensors", path=tmp_path / "p.safetensors")
    assert_same(safetensors.torch.load_file(report.path), module())
    with safetensors.safe_open(report.path, framework="pt") as file:
        said = file.metadata()
    assert said["rl_ckpt.policy"] == "default_policy"
    assert (said["rl_ckpt.step"], said["rl_ckpt.checkpoint"]) == ("3", report.checkpoint)
    assert said["rl_ckpt.weights_digest"] == report.weights_digest
    about = json.loads(said["rl_ckpt.about"])
    assert about == {**ABOUT, "low": [-1.0, "-inf"], "bounds": [0, 1]}
    assert report.bytes == Path(report.path).stat().st_size
    assert report.tensors == len(module())


def test_wider_elements_stand_first_so_that_all_are_aligned(run: str, tmp_path: Path) -> None:
    data = Path(export_model(run, format="safetensors", path=tmp_path / "p.safetensors").path).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    header.pop("__metadata__")
    for name, entry in header.items():
        width = module()[name].element_size()
        assert entry["data_offsets"][0] % width == 0, name


def test_state_dict_is_plain_tensors(run: str, tmp_path: Path) -> None:
    report = export_model(run, format="state_dict", path=tmp_path / "p.pt")
    for mmap in (False, True):
        found = torch.load(report.path, weights_only=True, mmap=mmap)
        assert type(found) in (dict, OrderedDict)
        assert_same(found, module())
    with zipfile.ZipFile(report.path) as archive:
        said = json.loads(archive.read("archive/rl_ckpt.json"))
    assert said["rl_ckpt.weights_digest"] == report.weights_digest


def test_numpy_keeps_foreign_dtypes_as_integers_and_says_so(run: str, tmp_path: Path) -> None:
    report = export_model(run, format="numpy", path=tmp_path / "p.npz")
    found = dict(np.load(report.path))
    said = json.loads(str(found.pop("__metadata__")))
    foreign = json.loads(said["rl_ckpt.dtypes"])
    assert foreign["layer.bfloat16"] == "bfloat16"
    assert found["layer.bfloat16"].dtype == np.uint16
    expected = module()
    assert found.keys() == expected.keys()
    for name, values in found.items():
        host = values.view(getattr(ml_dtypes, foreign[name])) if name in foreign else values
        assert str(expected[name].dtype).removeprefix("torch.") == host.dtype.name
        assert host.tobytes() == expected[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), name
        assert host.shape == tuple(expected[name].shape)


def test_the_digest_is_the_same_in_every_format_and_another_for_other_weights(run: str, tmp_path: Path) -> None:
    formats: list[Format] = ["safetensors", "numpy", "state_dict"]
    reports = [export_model(run, format=f, path=tmp_path / f) for f in formats]
    assert len({report.weights_digest for report in reports}) == 1
    changed = module()
    changed["large"][-1, -1] += 1
    url = str(tmp_path / "other")
    save(url, {"default_policy": {"module": changed}})
    other = [export_model(url, format=f, path=tmp_path / f"other.{f}") for f in formats]
    assert len({report.weights_digest for report in other}) == 1
    assert other[0].weights_digest != reports[0].weights_digest


def test_equal_checkpoints_give_equal_files(run: str, tmp_path: Path) -> None:
    for format in ("safetensors", "numpy", "state_dict"):
        files = [export_model(run, format=format, path=tmp_path / f"{i}.{format}").path for i in range(2)]
        assert Path(files[0]).read_bytes() == Path(files[1]).read_bytes()
        if format != "safetensors":  # and not because they were made within the same two seconds
            with zipfile.ZipFile(files[0]) as archive:
                assert {info.date_time[0] for info in archive.infolist()} == {1980}


def test_a_policy_with_a_slash_gets_a_file_of_its_own(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = export_model(run, "a/b", format="safetensors")
    assert report.path == "a_b.safetensors"
    assert_same(safetensors.torch.load_file(report.path), {"w": torch.ones(2)})


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    extent = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
    return shape, Box(offset, extent)


@given(boxes(), st.integers(1, 40), st.integers(0, 100))
def test_pieces_of_any_box_go_where_numpy_puts_them(case: tuple[tuple[int, ...], Box], piece: int, place: int) -> None:
    shape, box = case
    whole = np.zeros(shape, np.uint16)
    part = np.arange(1, box.size + 1, dtype=np.uint16).reshape(box.shape)
    whole[slices(box, Box.whole(shape))] = part
    target = Target("f", Chunk(box, 0, 0, part.nbytes, ""), place, shape, 2)
    out = bytearray(place + whole.nbytes)
    data = part.tobytes()
    for start in range(0, len(data), piece):
        done = start
        for at, count in target.pieces(start, min(piece, len(data) - start)):
            out[at : at + count] = data[done : done + count]
            done += count
    assert bytes(out[place:]) == whole.tobytes()


def test_safetensors_needs_memory_for_pieces_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = np.random.default_rng(0).random((2048, 1024))  # 16 MiB, one chunk of it and 16 of 1 MiB
    for chunk_bytes in (1 << 20, 32 << 20):
        url = str(tmp_path / f"run{chunk_bytes}")
        with Checkpointer(url, chunk_bytes=chunk_bytes) as ckpt:
            ckpt.save_state(0, {"w": large}).result(60)
        monkeypatch.setattr("rl_ckpt.export.stream.ROOM_BYTES", 1 << 20)
        tracemalloc.start()
        try:
            report = export_arrays(url, "**", path=tmp_path / f"{chunk_bytes}.safetensors")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 8 << 20
        assert safetensors.numpy.load_file(report.path)["w"].tobytes() == large.tobytes()


def test_only_the_policys_bytes_are_read(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Run] = []
    open_run = Run.open

    def spy(*args: Any) -> Run:
        opened.append(open_run(*args))
        return opened[-1]

    monkeypatch.setattr(Run, "open", spy)
    for format in ("safetensors", "numpy", "state_dict"):
        opened.clear()
        export_model(run, "a/b", format=format, path=tmp_path / format)
        (one,) = opened
        kept = sum(len(p.read_bytes()) for d in ("commits", "manifests") for p in (Path(run) / d).iterdir())
        assert one.store.stats.snapshot().bytes_read <= kept + 4096


def test_arrays_need_neither_torch_nor_ray(run: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom rl_ckpt.export import export_model\n"
        f"export_model({run!r}, 'default_policy', 'safetensors', {str(tmp_path / 'p.safetensors')!r})\n"
        f"export_model({run!r}, 'default_policy', 'numpy', {str(tmp_path / 'p.npz')!r})\n"
        "print([name for name in ('ray', 'torch', 'jax', 'gymnasium', 'safetensors') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert found.stdout.strip() == "[]", found.stderr


def test_from_s3(moto_server: S3Server, tmp_path: Path) -> None:
    url, options = f"s3://{moto_server.new_bucket()}/run", moto_server.storage_options()
    save(url, {"default_policy": {"module": module()}}, storage_options=options)
    for format in ("safetensors", "numpy", "state_dict"):
        report = export_model(url, format=format, path=tmp_path / format, storage_options=options)
        assert report.tensors == len(module())
    assert_same(safetensors.torch.load_file(tmp_path / "safetensors"), module())


def test_any_part_of_any_checkpoint(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    tree = {
        "w": np.arange(3.0),
        "n": {"steps": 7, "name": "x", "rng": np.uint64(5), "none": None},
        "z": np.ones(2, "c16"),
    }
    with Checkpointer(url) as ckpt:
        ckpt.save_state(1, tree).result(60)
    report = export_arrays(url, ["w", "n"], path=tmp_path / "a.safetensors")
    with safetensors.safe_open(report.path, framework="np") as file:
        assert file.keys() == ["w"]
        plain = json.loads(file.metadata()["rl_ckpt.plain"])
    assert plain["n/steps"] == 7
    assert plain["n/name"] == "x"
    assert report.notices == ("no arrays, and so in the metadata alone: n/steps, n/name, n/rng, n/none",)
    assert (report.policy, report.tensors) == (None, 1)
    with pytest.raises(InvalidInputError, match=r"no such dtype: z \(complex128\)"):
        export_arrays(url, "**", path=tmp_path / "b.safetensors")
    export_arrays(url, "**", "numpy", tmp_path / "b.npz")
    assert np.load(tmp_path / "b.npz")["z"].dtype == np.complex128
    with pytest.raises(InvalidInputError, match="chooses nothing"):
        export_arrays(url, "nope", path=tmp_path / "c.safetensors")
    with pytest.raises(InvalidInputError, match="no arrays"):
        export_arrays(url, "n", path=tmp_path / "c.safetensors")
    with pytest.raises(InvalidInputError, match="must be one of state_dict, safetensors, numpy"):
        export_arrays(url, "w", "onnx", tmp_path / "c.onnx")


def test_pickles_and_long_text_are_refused_by_name(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with Checkpointer(url, allow_pickle=True) as ckpt:
        ckpt.save_state(1, {"w": np.ones(2), "p": {1, 2}, "t": "x" * 5000}).result(60)
    with pytest.raises(InvalidInputError, match=r"p \(pickled\), t \(long text or bytes\)"):
        export_arrays(url, "**", path=tmp_path / "a.safetensors")


def damage(run: str, newest: int) -> None:
    for path in (Path(run) / "shards").glob(f"*{newest}-*/*"):
        data = bytearray(path.read_bytes())
        at = data.find(np.full(2, 7.25).tobytes())
        if at >= 0:
            data[at] ^= 1
            path.write_bytes(data)


@pytest.mark.parametrize(
    ("format", "room"), [("safetensors", 16 << 20), ("safetensors", 3000), ("numpy", 0), ("state_dict", 0)]
)
def test_a_damaged_checkpoint_gives_no_file_or_the_one_before(
    format: Any, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl_ckpt.export.stream.ROOM_BYTES", room)
    url, out = str(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    policy = {"module": {"w": np.full(5000, 7.25), "b": np.arange(9.0)}}
    with Checkpointer(url, chunk_bytes=8 << 10) as ckpt:
        ckpt.save_state(1, {"policies": {"p": {"module": {"w": np.zeros(5000)}}}}).result(60)
        ckpt.save_state(2, {"policies": {"p": policy}}).result(60)
    damage(url, 2)
    with pytest.raises(CorruptionError):
        export_model(url, "p", format, out / "p", step=2)
    assert list(out.iterdir()) == []
    report = export_model(url, "p", format, out / "p")
    assert report.step == 1
    assert "fell back to checkpoint" in report.notices[0]


@pytest.mark.parametrize(
    ("format", "room"), [("safetensors", 16 << 20), ("safetensors", 3000), ("numpy", 0), ("state_dict", 0)]
)
def test_damage_is_read_around_where_another_file_has_the_bytes(
    format: Any, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl_ckpt.export.stream.ROOM_BYTES", room)
    url = str(tmp_path / "run")
    values = np.concatenate([np.full(2000, 7.25), np.arange(3000.0)])
    with Checkpointer(url, chunk_bytes=8 << 10) as ckpt:
        for step, w in enumerate((np.zeros(5000), values, values)):
            if step == 2:
                ckpt.load_state(0)  # another branch begins, which does not lean on what it leaves: written again
            ckpt.save_state(step, {"policies": {"p": {"module": {"w": w, "b": np.ones(3)}}}}).result(60)
    good = export_model(url, "p", format, tmp_path / "good", step=2)
    damage(url, 2)
    found = export_model(url, "p", format, tmp_path / "found", step=2)
    assert "was taken from" in found.notices[0]
    assert found.weights_digest == good.weights_digest
    assert Path(found.path).read_bytes() == Path(good.path).read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policy": "nobody"}, "has no policy 'nobody': it has 'default_policy', 'a/b'"),
        ({"policy": ""}, "must be the id of a policy"),
        ({"format": "onnxx"}, "must be one of onnx, torch_export, state_dict, safetensors, numpy"),
        ({"format": None}, "must be one of"),
        ({"path": "there"}, "exists, and an export replaces no file"),
        ({"path": "folder"}, "is a folder; give the name of a file"),
        ({"path": "missing/p"}, "there is no folder missing"),
        ({"path": "s3://bucket/p"}, "must be a local file"),
        ({"path": ""}, "must be the name of a file"),
        ({"opset": 18}, "with format='onnx'"),
        ({"step": -1}, "step=-1"),
    ],
)
def test_bad_input_leaves_nothing(
    change: dict[str, Any], said: str, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("mine")
    Path("folder").mkdir()
    with pytest.raises(InvalidInputError, match=said):
        export_model(run, **{"format": "safetensors", "path": "p", **change})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "there"]
    assert Path("there").read_text() == "mine"


@pytest.mark.parametrize("change", [{"path": "there"}, {"path": "missing/p"}, {"format": "onnxx"}, {"policy": ""}])
def test_what_can_be_known_at_once_is_said_before_anything_is_read(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("mine")
    with pytest.raises(InvalidInputError):  # and not CheckpointNotFoundError
        export_model(str(tmp_path / "no run"), **{"format": "safetensors", "path": "p", **change})


def test_a_hundred_policies_are_not_all_listed(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    save(url, {f"p{i}": {"module": {"w": np.ones(1)}} for i in range(100)})
    with pytest.raises(InvalidInputError, match=r"'p19' … and 80 more"):
        export_model(url, "q", "numpy", tmp_path / "q")
    with Checkpointer(str(tmp_path / "plain")) as ckpt:
        ckpt.save_state(0, {"w": np.ones(2)}).result(60)
    with pytest.raises(InvalidInputError, match="it holds no policies"):
        export_model(str(tmp_path / "plain"), "q", "numpy", tmp_path / "q")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_ends_early_leaves_no_file(
    error: BaseException, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1, "the temporary file"
        raise error

    monkeypatch.setattr(writer, "copy_arrays", stop)
    with pytest.raises(BaseException, match=r"No space|^$") as found:
        export_model(run, format="safetensors", path=tmp_path / "p")
    assert getattr(found.value, "code", "") == ("storage" if isinstance(error, OSError) else "")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_came_meanwhile_is_not_replaced(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = writer.copy_arrays

    def slow(*args: Any) -> list[str]:
        (tmp_path / "p").write_text("mine")
        return copy(*args)

    monkeypatch.setattr(writer, "copy_arrays", slow)
    with pytest.raises(InvalidInputError, match="replaces no file"):
        export_model(run, format="safetensors", path=tmp_path / "p")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("p", "mine")]


def test_the_command_says_what_went_wrong(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p"
    assert main([run, "--select", "policies/a~1b", "--out", str(out)]) == 0
    assert safetensors.torch.load_file(out).keys() == {"policies/a~1b/module/w"}
    wrong = [
        ([str(tmp_path / "none"), "--out", "x"], 3, "no run at"),
        ([run, "--out", str(out)], 2, "exists"),
        ([run, "--out", "x", "--module-class", "json:nope"], 2, "there is no such class; write package.module:Class"),
        ([run, "--out", "x", "--module-class", "no.such.module:Class"], 2, "No module named 'no'"),
        ([run, "--out", "x", "-o", "key"], 2, "NAME=VALUE"),
    ]
    for args, code, said in wrong:
        capsys.readouterr()
        assert main(args) == code, args
        assert said in capsys.readouterr().err
    url = str(tmp_path / "damaged")
    save(url, {"p": {"module": {"w": np.full(5000, 7.25)}}}, step=1)
    damage(url, 1)
    assert main([url, "--policy", "p", "--format", "numpy", "--out", str(tmp_path / "x")]) == 1
    assert not (tmp_path / "x").exists()
