"""Records and manifests: read as they were written; any flipped byte, swapped file or newer version is found."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt.errors import CheckpointError, CorruptionError, InvalidInputError
from rl_ckpt.format import manifest as manifests
from rl_ckpt.format import records
from rl_ckpt.format.digest import digest
from rl_ckpt.format.manifest import ArrayEntry, ArrayRef, Chunk, Manifest, ShardFileEntry, Variant
from rl_ckpt.format.records import CommitRecord, EpochRecord, LogRecord, PinRecord, RunRecord
from rl_ckpt.state.arrays import ArraySpec
from rl_ckpt.state.boxes import Box
from rl_ckpt.state.tree import Container, Plain, Tie

names = st.text(max_size=6)
ids = st.text("0123456789abcdef-", min_size=1, max_size=12)
numbers = st.integers(0, 2**63 - 1)
times = st.floats(0, 4e9)
values: st.SearchStrategy[object] = st.none() | st.booleans() | names | st.floats(allow_nan=False, allow_infinity=False)
epochs = st.builds(EpochRecord, number=numbers, run=ids, write_id=ids, epoch=numbers, owner=names, time=times)
commits = st.builds(
    CommitRecord,
    number=numbers,
    run=ids,
    write_id=ids,
    epoch=numbers,
    id=ids,
    step=numbers,
    manifest_bytes=numbers,
    manifest_digest=ids,
    bytes=numbers,
    bytes_written=numbers,
    time=times,
    metrics=st.dictionaries(names, values, max_size=3),
    tag=st.none() | names,
    parent=st.none() | ids,
    world_size=st.integers(1, 9),
)
pins = st.builds(PinRecord, checkpoint=ids, by=names, expires=times)
boxes = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3).map(
    lambda axes: Box(tuple(o for o, _ in axes), tuple(n for _, n in axes))
)
specs = st.builds(ArraySpec, kind=names, dtype=names, shape=st.lists(numbers, max_size=3).map(tuple))
chunks = st.builds(Chunk, boxes, st.integers(0, 9), numbers, numbers, ids)
keys = st.lists(names | st.integers(), max_size=3, unique=True).map(tuple)
nodes = (
    st.builds(Container, st.sampled_from(["dict", "list"]), keys)
    | st.builds(Plain, values, st.booleans())
    | st.builds(Tie, names)
    | st.builds(ArrayRef, st.integers(0, 9))
)
variants = st.builds(Variant, nodes, st.none() | st.lists(st.integers(0, 9), max_size=3).map(tuple), st.booleans())
entries = st.builds(ArrayEntry, specs, st.lists(chunks, max_size=2).map(tuple))
some_manifests = st.builds(
    Manifest,
    run=ids,
    id=ids,
    step=numbers,
    world_size=st.integers(1, 9),
    time=times,
    writer=names,
    parent=st.none() | ids,
    metrics=st.dictionaries(names, values, max_size=2),
    tag=st.none() | names,
    files=st.lists(st.builds(ShardFileEntry, names, numbers), max_size=2).map(tuple),
    arrays=st.lists(entries, max_size=2).map(tuple),
    nodes=st.dictionaries(names, st.lists(variants, max_size=2).map(tuple), max_size=3),
)

COMMIT = CommitRecord(
    number=3, run="r1", write_id="w", epoch=1, id="5-abc", step=5, manifest_bytes=7, manifest_digest="00" * 16, bytes=9,
    bytes_written=11, time=1.5, metrics={"loss": 0.5}, tag="best", parent="4-abc",
)  # fmt: skip
RUN = RunRecord(records.FORMAT_VERSION, "r1", 1.5, "rl-ckpt", "probed")
MANIFEST = Manifest(
    run="r1", id="5-abc", step=5, world_size=1, time=1.5, writer="me", parent=None, metrics={}, tag=None,
    files=(ShardFileEntry("shards/5-abc/local-0.arrow", 640),),
    arrays=(ArrayEntry(ArraySpec("numpy", "float32", (2,)), (Chunk(Box((0,), (2,)), 0, 128, 8, "00" * 16),)),),
    nodes={"": (Variant(Container("dict", ("w",))),), "w": (Variant(ArrayRef(0)),)},
)  # fmt: skip


@settings(deadline=None)
@given(st.one_of(epochs, commits))
def test_log_records_read_as_they_were_written(record: LogRecord) -> None:
    assert records.decode("n", records.encode(record), CommitRecord | EpochRecord) == record  # type: ignore[arg-type]


@settings(deadline=None)
@given(pins)
def test_pins_read_as_they_were_written(record: PinRecord) -> None:
    assert records.decode("n", records.encode(record), PinRecord) == record


@settings(deadline=None)
@given(some_manifests)
def test_manifests_read_as_they_were_written(manifest: Manifest) -> None:
    data = manifests.encode(manifest)
    assert manifests.decode("m", data, digest(data)) == manifest


def read_commit(data: bytes) -> object:
    return records.decode("commits/00000003.json", data, CommitRecord | EpochRecord)  # type: ignore[arg-type]


def read_run(data: bytes) -> object:
    return records.decode_run("file:///run", data)


def read_manifest(data: bytes) -> object:
    return manifests.decode("manifests/5-abc.json", data, digest(manifests.encode(MANIFEST)))


FILES: list[tuple[str, Callable[[bytes], object], bytes]] = [
    ("commit", read_commit, records.encode(COMMIT)),
    ("run", read_run, records.encode(RUN)),
    ("manifest", read_manifest, manifests.encode(MANIFEST)),
]


@pytest.mark.parametrize(("read", "data"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_every_flipped_byte_is_found(read: Callable[[bytes], object], data: bytes) -> None:
    good = read(data)
    for i in range(len(data)):
        for flip in (0x01, 0x20, 0x80, 0xFF):
            damaged = data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :]
            try:
                found = read(damaged)
            except CorruptionError:
                continue
            assert found == good, f"byte {i} ^ {flip:#x} passed unseen"  # e.g. a digest in capital letters


@pytest.mark.parametrize(("read", "data"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_every_truncation_and_addition_is_found(read: Callable[[bytes], object], data: bytes) -> None:
    for cut in range(len(data)):
        with pytest.raises(CorruptionError):
            read(data[:cut])
    with pytest.raises(CorruptionError):
        read(data + b"}")


@pytest.mark.parametrize("read", [f[1] for f in FILES], ids=[f[0] for f in FILES])
def test_another_kind_of_file_is_found(read: Callable[[bytes], object]) -> None:
    for other in [records.encode(PinRecord(checkpoint="x", by="y", expires=1.0)), b"", b"{}", b"[]", b"\xff\xfe"]:
        with pytest.raises(CorruptionError):
            read(other)
    for kind, other_read, data in FILES:
        if other_read is not read:
            with pytest.raises(CheckpointError):
                read(data)
            assert kind


def test_a_newer_run_is_refused_whatever_else_it_holds() -> None:
    newer = msgspec.json.encode({"kind": "run", "version": records.FORMAT_VERSION + 1, "quite": ["new"]})
    data = msgspec.json.encode({"digest": digest(newer).hex(), "record": msgspec.Raw(newer)})
    with pytest.raises(InvalidInputError, match="has format version 3; this release reads up to 2: upgrade rl-ckpt"):
        records.decode_run("file:///run", data)


def test_a_newer_manifest_is_refused_whatever_else_it_holds() -> None:
    data = msgspec.json.encode({"version": manifests.FORMAT_VERSION + 1, "arrays": "elsewhere"})
    with pytest.raises(InvalidInputError, match="m has format version 3; this release reads up to 2: upgrade rl-ckpt"):
        manifests.decode("m", data, digest(data))


@settings(deadline=None)
@given(st.integers(1, 10**10))
def test_record_numbers_and_names_are_one(number: int) -> None:
    assert records.commit_number(records.commit_name(number)) == number


@pytest.mark.parametrize("name", ["commits/1.json", "commits/0000000x.json", "commits/00000001.json.tmp", "commits/"])
def test_other_files_have_no_record_number(name: str) -> None:
    assert records.commit_number(name) is None
