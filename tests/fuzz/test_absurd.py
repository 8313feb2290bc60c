"""Manifests and records that make no sense but carry the right digests: errors of ours, and never memory of others."""

from __future__ import annotations

import copy
import json
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_ckpt import Checkpointer, CheckpointError, CorruptionError
from rl_ckpt.format.digest import digest
from rl_ckpt.plan.match import match_all, match_state, view
from rl_ckpt.state.tree import flatten
from rl_ckpt.store.run import Run
from tests.fuzz.runs import SavedRun

Json = Any
MUTATIONS = 120
"""Of one seed."""
STEP = 4
ABSURD: list[Json] = [
    *(-1, 0, 1, 2**31, 2**53, 2**60, 2**63, 2**64, 2**70, 10**400, -(2**63), 0.5, 1e308, True, None),
    *("", "x", "../../../etc/passwd", "/", "\0", "float32", "object", "O", "|O8", "<f4", "a5", "float99", "V0", "T"),
    *("<M8[x]", 'descr:[["a", "|O"]]', "descr:[]", "descr:" + "[" * 2000, "f4,f4", "(3,)f4", "numpy", "torch", "jax"),
    *("pickle", "str", "container", "array", "tie", "plain", "0" * 32, "g" * 32),
    *([], {}, [[]], {"$": "pickle", "v": "gASVAAAAAA=="}, {"$": "array", "v": ""}, {"$": "scalar", "v": "!"}),
    {"$": "array", "kind": "numpy", "dtype": "float64", "shape": [2**57], "v": ""},
    {"$": "array", "kind": "numpy", "dtype": "float64", "shape": [3], "v": ""},
    {"$": "array", "kind": "torch", "dtype": "<M8[ns]", "shape": [], "v": "AAAAAAAAAAA="},
    {"$": "strings", "na": "", "shape": [2**40], "v": []},
    {"$": "scalar", "dtype": "|O8", "v": "AAAAAAAAAAA="},
]  # fmt: skip


def signed(record: Json) -> bytes:
    body = json.dumps(record, separators=(",", ":")).encode()
    return b'{"digest":"%s","record":%s}' % (digest(body).hex().encode(), body)


class Forger:
    """Writes a run whose manifests and records are somebody else's work."""

    def __init__(self, run: SavedRun, folder: Path) -> None:
        self.folder = folder
        for name, data in run.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        self.commit_name = next(n for n in reversed(run.kinds["commits"]) if self._is_of_step(run.files[n]))
        self.commit: Json = json.loads(run.files[self.commit_name])["record"]
        self.manifest_name = f"manifests/{self.commit['id']}.json"
        self.manifest: Json = json.loads(run.files[self.manifest_name])
        self.run_record: Json = json.loads(run.files["run.json"])["record"]

    def _is_of_step(self, data: bytes) -> bool:
        return bool(json.loads(data)["record"].get("step") == STEP)

    def write(self, manifest: Json, commit: Json | None = None) -> None:
        data = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
        (self.folder / self.manifest_name).write_bytes(data)
        named = dict(commit or self.commit) | {"manifest_digest": digest(data).hex(), "manifest_bytes": len(data)}
        (self.folder / self.commit_name).write_bytes(signed(named))

    def write_record(self, commit: Json) -> None:
        (self.folder / self.commit_name).write_bytes(signed(commit))


@pytest.fixture
def forger(runs: tuple[SavedRun, SavedRun, SavedRun], tmp_path: Path) -> Forger:
    return Forger(runs[0], tmp_path)


def array_of(manifest: Json, path: str) -> Json:
    return manifest["arrays"][manifest["nodes"][path][0]["node"]["index"]]


def first_chunk(manifest: Json) -> Json:
    return array_of(manifest, "frozen")["chunks"][0]


def _set(where: Callable[[Json], Json], key: Json, value: Json) -> Callable[[Json], None]:
    def change(manifest: Json) -> None:
        where(manifest)[key] = value

    return change


def _huge(manifest: Json) -> None:
    """An array of 2**60 bytes in one chunk, in a file that is said to be as large."""
    array = array_of(manifest, "frozen")
    array["spec"]["shape"], chunk = [2**57], array["chunks"][0]
    array["chunks"] = [[[[0], [2**57]], chunk[1], 0, 2**60, chunk[4]]]
    manifest["files"][chunk[1]][1] = 2**60 + 1


def _overlapping(manifest: Json) -> None:
    """The second chunk stands where the first does: the array is covered in number only."""
    chunks = array_of(manifest, "frozen")["chunks"]
    chunks[1][0] = chunks[0][0]


def _half_overlapping(manifest: Json) -> None:
    chunks = array_of(manifest, "frozen")["chunks"]
    chunks[1][0][0][0] -= 1


def _with_a_hole(manifest: Json) -> None:
    del array_of(manifest, "frozen")["chunks"][0]


def _other_bytes_at_one_place(manifest: Json) -> None:
    chunks = array_of(manifest, "frozen")["chunks"]
    chunks[1][1:3] = chunks[0][1:3]


def _objects(manifest: Json) -> None:
    array_of(manifest, "frozen")["spec"]["dtype"] = "|O8"


NONSENSE: dict[str, Callable[[Json], None]] = {
    "huge": _huge,
    "overlap": _overlapping,
    "half": _half_overlapping,
    "hole": _with_a_hole,
    "other bytes": _other_bytes_at_one_place,
    "objects": _objects,
    "dtype": _set(lambda m: array_of(m, "frozen")["spec"], "dtype", "float99"),
    "wider dtype": _set(lambda m: array_of(m, "frozen")["spec"], "dtype", "float128"),
    "kind": _set(lambda m: array_of(m, "frozen")["spec"], "kind", "cupy"),
    "shape": _set(lambda m: array_of(m, "frozen")["spec"], "shape", [400, 7]),
    "axes": _set(lambda m: array_of(m, "frozen")["spec"], "shape", [280]),
    "negative shape": _set(lambda m: array_of(m, "frozen")["spec"], "shape", [-40, -7]),
    "no chunks": _set(lambda m: array_of(m, "frozen"), "chunks", []),
    "file before the first": _set(first_chunk, 1, -1),
    "file after the last": _set(first_chunk, 1, 99),
    "offset before the file": _set(first_chunk, 2, -64),
    "offset after the file": _set(first_chunk, 2, 10**9),
    "too few bytes": _set(first_chunk, 3, 8),
    "no digest": _set(first_chunk, 4, "z" * 32),
    "short digest": _set(first_chunk, 4, ""),
    "box outside": _set(lambda m: first_chunk(m)[0], 0, [39, 0]),
    "negative box": _set(lambda m: first_chunk(m)[0], 0, [-1, 0]),
    "file elsewhere": _set(lambda m: m["files"][0], 0, "shards/../run.json"),
    "absolute file": _set(lambda m: m["files"][0], 0, "/etc/passwd"),
    "file size": _set(lambda m: m["files"][0], 1, -5),
    "array before the first": _set(lambda m: m["nodes"]["frozen"][0]["node"], "index", -1),
    "array after the last": _set(lambda m: m["nodes"]["frozen"][0]["node"], "index", 10**6),
    "nothing at a path": _set(lambda m: m["nodes"], "frozen", []),
    "container": _set(lambda m: m["nodes"][""][0]["node"], "type", "set"),
    "plain leaf": _set(lambda m: m["nodes"]["step"][0]["node"], "value", {"$": "int"}),
    "values of nobody": _set(lambda m: m["nodes"]["step"][0]["node"], "value", ABSURD[-5]),
    "values of too many": _set(lambda m: m["nodes"]["step"][0]["node"], "value", ABSURD[-4]),
    "step": _set(lambda m: m, "step", 99),
    "id": _set(lambda m: m, "id", "3-0"),
    "run": _set(lambda m: m, "run", "another"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_manifest_that_makes_no_sense_is_damage(what: str, forger: Forger) -> None:
    manifest = copy.deepcopy(forger.manifest)
    NONSENSE[what](manifest)
    forger.write(manifest)
    with pytest.raises(CorruptionError):
        Checkpointer(str(forger.folder)).load_state(STEP)
    with pytest.warns(UserWarning, match=f"fell back to checkpoint 3-.*{forger.commit['id']}"):
        assert Checkpointer(str(forger.folder)).load_state()["step"] == 3
    report = Checkpointer(str(forger.folder)).verify(repair=True)
    assert report.checkpoints[forger.commit["id"]] == "damaged"


def test_what_was_not_forged_loads(forger: Forger) -> None:
    forger.write(forger.manifest)
    assert Checkpointer(str(forger.folder)).load_state(STEP)["step"] == STEP


def spoil(rng: np.random.Generator, value: Json) -> str:
    """Puts something absurd somewhere into a JSON value.

    Returns:
        What was done.
    """
    at, path = value, []
    while True:
        keys: list[Any] = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = keys[int(rng.integers(len(keys)))]
        path.append(key)
        inner = at[key]
        if not isinstance(inner, dict | list) or not inner or rng.integers(8) == 0:
            break
        at = inner
    way = int(rng.integers(5))
    if way == 0:
        del at[key]
    elif way == 1 and isinstance(at, list):
        at.insert(key, copy.deepcopy(inner))
    elif way == 2 and isinstance(at, list):
        other = int(rng.integers(len(at)))
        at[key], at[other] = at[other], at[key]
    elif way == 3 and isinstance(inner, int):
        at[key] = inner + int(rng.choice([-1, 1, 64, 2**40]))
    else:
        at[key] = copy.deepcopy(ABSURD[int(rng.integers(len(ABSURD)))])
    return f"{path}: {str(inner)[:50]} became {str(at[key])[:50] if way else 'nothing'}"


def try_everything(folder: Path, state: dict[str, Any]) -> bool:
    """Reads, lists, plans restores and verifies; any error must be ours. Whether the checkpoint loaded."""
    loaded = False
    ckpt = Checkpointer(str(folder))
    for attempt in (lambda: ckpt.load_state(STEP), ckpt.load_state, ckpt.checkpoints, lambda: ckpt.verify(STEP)):
        try:
            attempt()
            loaded = True
        except CheckpointError:
            continue
    try:
        run = Run.open(str(folder))
        manifest = run.manifest(run.candidates(STEP)[0][0])
        for rank in (0, 1):
            seen = view(manifest, rank)
            match_all(seen, None, None)
            match_state(seen, flatten(state).nodes, manifest)
    except CheckpointError:
        return False
    return loaded


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.soak] if n >= 1 else []) for n in range(3)])
def test_absurd_content_with_good_digests_is_an_error_of_ours(
    seed: int, forger: Forger, runs: tuple[SavedRun, SavedRun, SavedRun]
) -> None:
    bad, peak_kb = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(MUTATIONS):
        rng = np.random.default_rng([2000 + seed, number])
        manifest, commit = copy.deepcopy(forger.manifest), copy.deepcopy(forger.commit)
        if number % 5 == 0:
            said = spoil(rng, commit)
            forger.write_record(commit)
            (forger.folder / forger.manifest_name).write_bytes(runs[0].files[forger.manifest_name])
        else:
            said = spoil(rng, manifest)
            forger.write(manifest)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", "fell back|.*was read whole|records that can't be read", UserWarning)
                bad += not try_everything(forger.folder, runs[0].saved[STEP])
        except Exception as error:
            raise AssertionError(f"seed {seed}, mutation {number}: {said}: {error!r}") from error
    assert bad > MUTATIONS // 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kb < 200_000, "memory for bytes that are not there"


@pytest.mark.parametrize("deep", [b"[" * 100_000, b'{"version":1,"metrics":' * 5000, b'{"version":' + b"9" * 5000])
def test_json_that_is_nested_or_long_beyond_reason(deep: bytes, forger: Forger) -> None:
    forger.write(deep)
    with pytest.raises(CorruptionError):
        Checkpointer(str(forger.folder)).load_state(STEP)
    (forger.folder / "run.json").write_bytes(b'{"digest":"","record":' + deep)
    with pytest.raises(CorruptionError):
        Checkpointer(str(forger.folder)).checkpoints()
