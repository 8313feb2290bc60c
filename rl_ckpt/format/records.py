"""Records: run.json, the commit log's records, labels, pins and leases, as self-checking JSON (docs/format.md).

Owns: their fields and their encoding. A record's file is `{"digest": ..., "record": {...}}`, where the digest covers
the bytes of `record` as they stand in the file. Does not know: where files are, who may create one.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.format.digest import digest
from rl_ckpt.state.leaves import Json

FORMAT_VERSION = 2
"""The newest that this release reads."""
PLAIN_VERSION = 1
"""Of a run or manifest whose files are all its own; those of forks have version 2 (docs/format.md, "Forks")."""

RUN_FILE = "run.json"
WAITING_FILE = "sweep.json"
FORK_FILE = "fork.json"
"""A copy of a fork's run.json: nothing else tells where its bases are."""
BASES = "base/"
"""How the names of files begin that lie in another run, which this one was forked from."""
COMMITS, MANIFESTS, SHARDS, PINS, LEASES = "commits/", "manifests/", "shards/", "pins/", "leases/"
LABELS = "labels/"


class RunRecord(msgspec.Struct, frozen=True, tag="run", tag_field="kind", omit_defaults=True):
    """A run: created once, never changed."""

    version: int
    run: str
    """Random id; every commit record and manifest repeats it."""
    created: float
    """Unix seconds."""
    by: str
    """Release, host and process that created it."""
    create_only: str
    """"probed" where the store kept the create-only promise under a race, "weak" where the user did without."""
    bases: tuple[str, ...] = ()
    """Where the files lie whose names begin with `base/0/`, `base/1/` …: urls of other runs, relative to this one where
    they have no scheme."""
    held: tuple[str, ...] = ()
    """By base: the checkpoint there that this run's pin holds; empty where the base lies within this run."""
    forked_from: str = ""
    """The run that this one was forked from, as `bases`; for people."""


class CommitRecord(msgspec.Struct, frozen=True, tag="commit", tag_field="kind", kw_only=True):
    """A checkpoint exists once this record does."""

    number: int
    """Position in the commit log, from 1; also in the file's name."""
    run: str
    write_id: str
    """Random id of this write: tells a landed write from a lost race when the store's reply was lost."""
    epoch: int
    id: str
    """`<step>-<attempt>`."""
    step: int
    manifest_bytes: int
    manifest_digest: str
    bytes: int
    """Of all arrays, each once."""
    bytes_written: int
    """Of shard files and manifest that this save wrote."""
    time: float
    """Unix seconds of the commit."""
    metrics: dict[str, Json] = {}
    tag: str | None = None
    parent: str | None = None
    """Id of the checkpoint this one continues."""
    world_size: int = 1


class EpochRecord(msgspec.Struct, frozen=True, tag="epoch", tag_field="kind", kw_only=True):
    """A new coordinator owns the run from here on; older ones are fenced."""

    number: int
    run: str
    write_id: str
    epoch: int
    owner: str
    """Release, host and process, for messages."""
    time: float
    lease: str = ""
    """Id of the writer's lease; empty where it has none."""


class LabelRecord(msgspec.Struct, frozen=True, tag="label", tag_field="kind", kw_only=True):
    """What people say of a checkpoint after it was committed. Anybody may write it; the last one wins."""

    checkpoint: str
    """Id; also in the file's name."""
    commit: CommitRecord
    """The checkpoint's commit record, whole: a sweep that deleted it while the label came can put it back."""
    tags: tuple[str, ...] = ()
    note: str = ""
    untagged: bool = False
    """Whether the tag given at save counts no more."""
    remove: bool = False
    """Whether the checkpoint is to go, at the next sweep of whoever owns the run."""
    confirmed: bool = False
    """Whether the commit record was there after a label with tags was: if it is missing now, it may be put back."""
    by: str = ""
    """Who wrote it, for messages."""
    time: float = 0.0
    """Unix seconds, by the writer's clock."""


class PinRecord(msgspec.Struct, frozen=True, tag="pin", tag_field="kind", kw_only=True):
    """A reader's hold on one checkpoint against the sweep."""

    checkpoint: str
    by: str
    expires: float
    """Unix seconds, by the reader's clock."""
    seconds: float = 0.0
    """How long it holds after it was last written, by the store's clock; 0: only `expires` tells."""


class WaitingRecord(msgspec.Struct, frozen=True, tag="sweep", tag_field="kind", kw_only=True):
    """What a sweep by hand leaves to the next one: files that no checkpoint names, and whose grace is not over."""

    waiting: dict[str, float]
    """File → when a sweep first saw that nothing names it, in Unix seconds by the store's clock."""


_ID = re.compile(r"\d{1,19}-\w+\Z", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{32}\Z")


class LeaseRecord(msgspec.Struct, frozen=True, tag="lease", tag_field="kind", kw_only=True):
    """A writer's word that it lives, written again and again while it does."""

    epoch: int
    id: str
    """Random; the epoch record with this id in `lease` says that the run is this writer's."""
    owner: str
    """As in the epoch record."""
    job: str
    """What the writer works for, for messages; may be empty."""
    host: str
    pid: int
    started: str
    """When the process began, in the words of its machine: tells it from a later one with the same number."""
    machine: str
    """Start of the machine and process namespace in which `pid` counts; empty where neither is known."""
    service: str
    """Random id of what goes on in another process when this one dies; empty where nothing does."""
    since: float
    """Unix seconds, by the writer's clock, as `seen`: for messages."""
    seen: float
    beat: int
    """How often it was written: whoever sees it change knows that the writer lives."""
    lease_s: float
    """A lease that has not changed for as many seconds is over."""


LogRecord = CommitRecord | EpochRecord
Record = TypeVar("Record", bound=msgspec.Struct)


class _Envelope(msgspec.Struct):
    digest: str
    record: msgspec.Raw


def encode(record: msgspec.Struct) -> bytes:
    """The bytes of a record's file."""
    body = msgspec.json.encode(record)
    return msgspec.json.encode(_Envelope(digest(body).hex(), msgspec.Raw(body)))


def decode(name: str, data: bytes, kind: type[Record]) -> Record:
    """Reads a record's file.

    Args:
        name: Of the file, for messages.
        data: Its bytes.
        kind: Which record (or union of records) it must be.

    Raises:
        CorruptionError: The bytes are not such a record, or not those that were written.
    """
    try:
        envelope = msgspec.json.decode(data, type=_Envelope)
        found = digest(bytes(envelope.record)).hex()
        if found != envelope.digest:
            raise CorruptionError(f"{name} is damaged: its record has digest {found}, {envelope.digest} was written")
        return msgspec.json.decode(envelope.record, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptionError(f"{name} is damaged or no record of a run: {error}") from error


def is_id(text: str) -> bool:
    """Whether a text has the form of a checkpoint's id."""
    return _ID.match(text) is not None


def problem(record: CommitRecord) -> str | None:
    """Why nothing can be read by a record whose digest is right; None where it can.

    What others do with its fields must not depend on who wrote them: the id becomes part of file names.
    """
    if not (
        _ID.match(record.id)
        and _DIGEST.match(record.manifest_digest)
        and record.id.partition("-")[0] == str(record.step)
    ):
        return f"{commit_name(record.number)} commits {record.id!r}, step {record.step}, which is no checkpoint"
    return None


def decode_run(url: str, data: bytes) -> RunRecord:
    """Reads run.json.

    Raises:
        CorruptionError: It is damaged.
        InvalidInputError: The run was written by a newer release.
    """
    record = decode(f"{url}/{RUN_FILE}", data, _Version)
    if record.version > FORMAT_VERSION:
        raise InvalidInputError(
            f"{url} has format version {record.version}; this release reads up to {FORMAT_VERSION}: upgrade rl-ckpt"
        )
    run = decode(f"{url}/{RUN_FILE}", data, RunRecord)
    if len(run.held) != len(run.bases):
        raise CorruptionError(f"{url}/{RUN_FILE} has {len(run.bases)} bases, and pins in {len(run.held)} of them")
    return run


class _Version(msgspec.Struct):
    version: int


def commit_name(number: int) -> str:
    """File of a log record."""
    return f"{COMMITS}{number:08d}.json"


def commit_number(name: str) -> int | None:
    """The number in a log record's file name; None for any other file."""
    stem = name.removeprefix(COMMITS).removesuffix(".json")
    return int(stem) if stem.isdecimal() and commit_name(int(stem)) == name else None


def manifest_name(checkpoint: str) -> str:
    """File of a checkpoint's manifest."""
    return f"{MANIFESTS}{checkpoint}.json"


def based_name(base: int, name: str) -> str:
    """The name by which a fork calls a shard file of one of its bases."""
    return f"{BASES}{base}/{name}"


def split_base(name: str) -> tuple[int, str] | None:
    """Number of the base and the name there, of what lies in a base; None for any other name."""
    if not name.startswith(BASES):
        return None
    number, _, rest = name.removeprefix(BASES).partition("/")
    # What a base has of its own bases lies in it by their names.
    if not (number.isdecimal() and number.isascii() and (rest.startswith(SHARDS) or split_base(rest))):
        return None
    return (int(number), rest) if number == str(int(number)) else None


def in_run(name: str) -> str:
    """A shard file's name in the run that wrote it, whatever its name in a fork."""
    while (based := split_base(name)) is not None:
        name = based[1]
    return name


def label_name(checkpoint: str) -> str:
    """File of a checkpoint's label."""
    return f"{LABELS}{checkpoint}.json"


def pin_name(pin: str) -> str:
    """File of a pin."""
    return f"{PINS}{pin}.json"


def lease_name(epoch: int, lease: str) -> str:
    """File of a writer's lease."""
    return f"{LEASES}{epoch:08d}-{lease}.json"


def lease_epoch(name: str) -> int | None:
    """The epoch in a lease's file name; None for any other file."""
    number, dash, _ = name.removeprefix(LEASES).removesuffix(".json").partition("-")
    return int(number) if dash and number.isdecimal() and name.startswith(LEASES) else None
