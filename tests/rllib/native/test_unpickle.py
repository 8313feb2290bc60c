"""Restricted reading of pickles: what is data comes back as it was, and nothing that a pickle names is ever called."""

from __future__ import annotations

import base64
import collections
import contextlib
import copyreg
import io
import os
import pickle
import sys
import types
import zlib

import gymnasium as gym
import ml_dtypes
import numpy as np
import pytest
import ray.cloudpickle as cloudpickle
import torch
from packaging.version import Version
from ray.rllib.utils.filter import RunningStat

from rl_ckpt.errors import CorruptionError, UntrustedDataError
from rl_ckpt.rllib.native.nodes import Code, Named, Record
from rl_ckpt.rllib.native.unpickle import restricted_loads

RAN: list[object] = []
BAD = "rl_ckpt_bad_module"  # by which pickles find what is below


class Target:
    """What a hostile pickle calls: harmless, but it leaves a trace."""

    def __new__(cls, *args, **kwargs):
        RAN.append("new")
        return object.__new__(cls)

    def __init__(self, *args):
        RAN.append("init")

    def __setstate__(self, state):
        RAN.append("setstate")

    def __reduce__(self):
        return payload, (1,)


def payload(*args):
    RAN.append(args)
    return args


@pytest.fixture(autouse=True)
def bad_module(monkeypatch):
    module = types.ModuleType(BAD)
    module.Target, module.payload = Target, payload  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, BAD, module)
    monkeypatch.setattr(Target, "__module__", BAD)
    monkeypatch.setattr(payload, "__module__", BAD)
    RAN.clear()


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()  # SHORT_BINUNICODE


def stack_global(name: str) -> bytes:
    return text(BAD) + text(name) + b"\x93"


HOSTILE = {
    "REDUCE": b"c" + BAD.encode() + b"\npayload\n(tR.",
    "REDUCE by STACK_GLOBAL": b"\x80\x04" + stack_global("payload") + b")R.",
    "REDUCE, result thrown away": b"\x80\x04" + stack_global("payload") + b")R0}.",
    "REDUCE inside of a list": b"\x80\x04]" + stack_global("payload") + b")Ra.",
    "REDUCE as a key": b"\x80\x04}" + stack_global("payload") + b")RK\x01s.",
    "REDUCE of a result": b"\x80\x04" + stack_global("payload") + b")R)R.",
    "INST": b"(i" + BAD.encode() + b"\nTarget\n.",
    "OBJ": b"(c" + BAD.encode() + b"\nTarget\no.",
    "NEWOBJ": b"\x80\x04" + stack_global("Target") + b")\x81.",
    "NEWOBJ_EX": b"\x80\x04" + stack_global("Target") + b")}\x92.",
    "BUILD with __setstate__": b"\x80\x04" + stack_global("Target") + b")\x81}b.",
    "copyreg": b"ccopyreg\n_reconstructor\n(c" + BAD.encode() + b"\nTarget\nc__builtin__\nobject\nNtR.",
    "getattr and call": b"cbuiltins\ngetattr\n(c" + BAD.encode() + b"\nTarget\nVpayload\ntR(tR.",
    "in the values of an array": b"cnumpy._core.multiarray\nscalar\n(c" + BAD.encode() + b"\npayload\n(tRVx\ntR.",
}


_HARMLESS = (
    "copyreg",
    "getattr and call",
    "in the values of an array",
)  # for pickle, which fails before, or runs no code


@pytest.mark.parametrize("how", HOSTILE)
def test_code_in_a_pickle_is_refused_by_name_and_does_not_run(how):
    with pytest.raises(UntrustedDataError, match=rf"dir/state\.pkl: .*{BAD}\.(payload|Target)"):
        restricted_loads(HOSTILE[how], "dir/state.pkl")
    assert RAN == []


@pytest.mark.parametrize("how", [how for how in HOSTILE if how not in _HARMLESS])
def test_the_same_pickles_would_run_code(how):
    with contextlib.suppress(TypeError):  # some call what a call gave
        pickle.loads(HOSTILE[how])
    assert RAN


@pytest.mark.parametrize(
    "opcode", [b"\x82\xf0", b"\x83\xf0\x00", b"\x84\xf0\x00\x00\x00"], ids=["EXT1", "EXT2", "EXT4"]
)
def test_an_extension_code_is_refused_also_once_it_is_known(opcode):
    copyreg.add_extension(BAD, "payload", 0xF0)
    data = b"\x80\x02" + opcode + b")R."
    try:
        pickle.loads(data)  # fills copyreg's cache, from which pickle takes it without asking find_class
        assert RAN
        RAN.clear()
        with pytest.raises(UntrustedDataError, match=rf"extension 240 .*{BAD}\.payload"):
            restricted_loads(data, "f")
    finally:
        copyreg.remove_extension(BAD, "payload", 0xF0)
    assert RAN == []


@pytest.mark.parametrize("data", [b"Pabc\n.", b"\x80\x02Vabc\nQ."], ids=["PERSID", "BINPERSID"])
def test_a_persistent_id_is_refused(data):
    with pytest.raises(UntrustedDataError, match="persistent_load"):
        restricted_loads(data, "f")


def test_attributes_of_a_class_are_not_set():
    data = b"\x80\x04" + stack_global("Target") + b"}" + text("x") + b"K\x01sb."
    with pytest.raises(UntrustedDataError, match=rf"{BAD}\.Target\.__setstate__"):
        restricted_loads(data, "f")
    assert not hasattr(Target, "x")


def test_what_is_only_named_is_not_imported():
    data = b"\x80\x04" + text("antigravity") + text("fly") + b"\x93."
    assert restricted_loads(data, "f") == Named("antigravity", "fly")
    assert "antigravity" not in sys.modules


def test_real_objects_that_reduce_to_calls():
    with pytest.raises(UntrustedDataError, match=rf"{BAD}\.payload"):
        restricted_loads(pickle.dumps({"weights": [Target()]}), "f")
    RAN.clear()
    with pytest.raises(UntrustedDataError, match=r"posix\.getpid"):
        restricted_loads(pickle.dumps(_Calls(os.getpid)), "f")


class _Calls:
    def __init__(self, function, *args):
        self.how = (function, args)

    def __reduce__(self):
        return self.how


VALUES = {
    "plain": [
        None,
        True,
        False,
        0,
        -1,
        2**40,
        -(10**30),
        0.1,
        float("inf"),
        "",
        "é",
        b"",
        b"\0\xff",
        1j,
        bytearray(b"q"),
    ],
    "containers": [
        {},
        [],
        (),
        (1,),
        (1, 2, 3, 4),
        {1: {"a": [2]}},
        {1, 2},
        frozenset([3]),
        slice(1, None),
        range(1, 9, 2),
    ],
    "ordered": collections.OrderedDict(z=1, a=2),
    "counts": collections.defaultdict(int, a=1),
    "deque": collections.deque([1, 2], maxlen=5),
    "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "strided": np.arange(10.0)[::3],
    "big endian": np.arange(3).astype(">i4"),
    "empty": np.zeros((0, 4)),
    "0-dim": np.array(3.5),
    "bools": np.array([True, False]),
    "strings": np.array(["ab", "c"]),
    "bytes": np.array([b"ab", b"c"]),
    "dates": np.array(["2020-01-02"], "M8[D]"),
    "bf16": np.array([1, 2.5], ml_dtypes.bfloat16),
    "scalars": [np.float32(1.5), np.int64(-(2**40)), np.bool_(True), np.uint8(3), np.float64("nan")],
    "dtypes": (np.dtype("f4"), np.dtype(">i8"), np.dtype("U7")),
}


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return (
            isinstance(b, np.ndarray)
            and (a.dtype, a.shape, a.flags.f_contiguous) == (b.dtype, b.shape, b.flags.f_contiguous)
            and a.tobytes() == b.tobytes()
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", VALUES)
def test_data_come_back_as_they_were(name, protocol):
    value = VALUES[name]
    found = restricted_loads(pickle.dumps(value, protocol=protocol), "f")
    expected = pickle.loads(pickle.dumps(value, protocol=protocol))
    if name in ("counts", "big endian"):  # without its default; numpy's own reading changes the byte order
        expected = dict(value) if name == "counts" else value
    assert same(expected, found)


def test_one_object_in_several_places_stays_one():
    array = np.arange(3)
    found = restricted_loads(pickle.dumps([array, {"x": array}]), "f")
    assert found[0] is found[1]["x"]
    above: list[object] = []
    above.append(above)
    again = restricted_loads(pickle.dumps(above), "f")
    assert again[0] is again


def test_torch_tensors():
    saved = {"t": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(2**40)}
    found = restricted_loads(pickle.dumps(saved), "f")
    for name, tensor in saved.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_torch_storage_with_code_is_refused_by_torch():
    inner = io.BytesIO()
    torch.save(_Calls(payload), inner)
    with pytest.raises(UntrustedDataError, match="_load_from_bytes"):
        restricted_loads(pickle.dumps(_Calls(torch.storage._load_from_bytes, inner.getvalue())), "f")
    assert RAN == []


def test_spaces_and_records_are_described():
    found = restricted_loads(pickle.dumps({"space": gym.spaces.Discrete(3), "v": Version("1.1")}), "f")
    assert isinstance(found["space"], Record)
    assert found["space"].kind.dotted == "gymnasium.spaces.discrete.Discrete"
    assert found["space"].state["n"] == 3
    assert isinstance(found["v"], Record)


def test_code_by_value_is_described_and_not_made():
    hidden = _Calls(payload, 2)

    def mapping(agent, *, x=hidden):
        return agent

    mapping.__module__ = "__main__"
    found = restricted_loads(cloudpickle.dumps({"f": mapping, "n": 1}), "f")
    assert isinstance(found["f"], Code)
    assert found["f"].name.endswith("mapping")
    assert found["n"] == 1
    assert RAN == []  # what the function's default would call is part of code that is not made


def test_a_call_inside_of_code_and_beside_it_is_refused():
    hidden = _Calls(payload, 2)

    def mapping(agent, *, x=hidden):
        return agent

    mapping.__module__ = "__main__"
    with pytest.raises(UntrustedDataError, match=rf"{BAD}\.payload"):
        restricted_loads(cloudpickle.dumps({"f": mapping, "weights": hidden}), "f")
    assert RAN == []


WHOLE = pickle.dumps({"weights": {"w": np.arange(40.0)}, "steps": [1, 2, 3], "name": "x" * 50})


@pytest.mark.parametrize("size", range(0, len(WHOLE), 7))
def test_a_truncated_pickle_is_named(size):
    with pytest.raises(CorruptionError, match=r"dir/x\.pkl: no pickle that can be read"):
        restricted_loads(WHOLE[:size], "dir/x.pkl")


MEMORY_WANTED = b"\x80\x04cbuiltins\nbytearray\nM\xff\xff\x85R."
"""65,535 zeros out of four bytes; it could be as many gigabytes."""


@pytest.mark.parametrize(
    "data",
    [
        b"not a pickle",
        b"\x80\x04K\x01K\x02s.",
        b"\x80\x04h\x05.",
        b"\x80\x04a.",
        b"\x80\x04)\x85\x94e.",
        b"t.",
        MEMORY_WANTED,
    ],
)
def test_nonsense_is_named(data):
    with pytest.raises((CorruptionError, UntrustedDataError), match=r"dir/x\.pkl"):
        restricted_loads(data, "dir/x.pkl")


def test_random_damage_is_an_error_or_data():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        data = bytearray(WHOLE)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        with contextlib.suppress(CorruptionError, UntrustedDataError):
            restricted_loads(bytes(data), "f")
    assert RAN == []


def hidden(array: np.ndarray) -> str:
    """As RLlib writes the arrays of filters and spaces; it reads them with `allow_pickle=True`."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return base64.b64encode(zlib.compress(file.getvalue())).decode()


@pytest.mark.parametrize("form", [str, str.encode, lambda text: "!" + text[:8] + "\n" + text[8:]])
def test_a_pickle_inside_of_a_text_is_refused(form):
    bad = form(hidden(np.array([_Calls(payload, 3)], object)))
    with pytest.raises(UntrustedDataError, match=r"dir/state\.pkl: a text in it hides"):
        restricted_loads(pickle.dumps({"mean_array": [bad]}), "dir/state.pkl")
    assert RAN == []
    RunningStat.from_state(dict.fromkeys(RunningStat().to_state(), bad) | {"num_pushes": 1, "num_pushes_delta": 1})
    assert RAN  # what it would have done


def test_an_array_inside_of_a_text_is_allowed():
    good = hidden(np.arange(3.0))
    assert restricted_loads(pickle.dumps({"mean_array": good}), "f") == {"mean_array": good}
