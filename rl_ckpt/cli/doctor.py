"""`doctor`'s checks: would saving and restoring work, from this machine, to this store.

Owns: what is looked at, and what to do about it. Promises: changes nothing but objects of its own below probe/, which
it deletes; an answer for each check within about ten seconds also where the store does not answer. Knows nothing of
output. Starts no Ray.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rl_ckpt._version import __version__
from rl_ckpt.cli.text import count, duration, size, when
from rl_ckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptionError, InvalidInputError, StorageError
from rl_ckpt.format.records import RUN_FILE
from rl_ckpt.store.base import Store
from rl_ckpt.store.lease import holder
from rl_ckpt.store.probe import PROBE, probe_create_only
from rl_ckpt.store.run import Run
from rl_ckpt.store.urls import normalise_url, open_store

SHM = "/dev/shm"
_NEEDED = ("fsspec", "ml_dtypes", "msgspec", "numpy", "psutil", "pyarrow", "ray", "s3fs", "xxhash")
_SHM_BYTES, _FILES = 1 << 30, 4096
_DEADLINE_S = 8.0
_SKEW_S, _GRANULARITY_S = 2.0, 1.0
_YEARS_S = 10 * 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    name: str
    state: str
    """"ok", "warn" (works, and may hurt), "fail", or "skip"."""
    found: str
    advice: str = ""
    """What to do."""


def look_at_machine() -> Iterator[Finding]:
    """Versions, shared memory, limits and ports of this machine."""
    yield _versions(_version)
    yield _shared_memory(SHM)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = 0 <= soft < _FILES
    advice = f"raise it (ulimit -n {_FILES}): shard servers and S3 connections need many" if low else ""
    yield Finding("open files", "warn" if low else "ok", f"limit {soft}", advice)
    yield _ports()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _versions(version: Callable[[str], str | None]) -> Finding:
    found = {name: version(name) for name in _NEEDED}
    text = f"rl-ckpt {__version__}, Python {platform.python_version()}, " + ", ".join(
        f"{name} {known or 'missing'}" for name, known in found.items()
    )
    missing = [name for name, known in found.items() if known is None]
    if missing:
        return Finding("versions", "fail", text, f"pip install {' '.join(missing)}, or install rl-ckpt anew")
    return Finding("versions", "ok", text)


def _shared_memory(folder: str) -> Finding:
    name = "shared memory"
    try:
        disk = shutil.disk_usage(folder)
    except OSError as error:
        return Finding(
            name,
            "warn",
            f"{folder}: {error.strerror}",
            "staging memory goes to the temporary folder, on a disk: slower",
        )
    text = f"{folder}: {size(disk.free)} free of {size(disk.total)}"
    if not os.access(folder, os.W_OK):
        return Finding(name, "fail", f"{folder} can't be written to", f"give this user the right to write to {folder}")
    if disk.free < _SHM_BYTES:
        return Finding(
            name, "warn", text, "staging takes up to three times what this node's workers save: start the container "
            "with a larger one (docker --shm-size, an emptyDir of medium Memory in Kubernetes), or remove what is in it"
        )  # fmt: skip
    return Finding(name, "ok", text)


def _ports() -> Finding:
    name = "ports"
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError as error:
        return Finding(
            name, "warn", f"this host's name {socket.gethostname()!r} has no address: {error.strerror or error}",
            "nodes reach each other by Ray's node address; see that ray start gets the right --node-ip-address",
        )  # fmt: skip
    try:
        with socket.create_server((address, 0)) as server:
            port = server.getsockname()[1]
            socket.create_connection((address, port), timeout=2).close()
    except OSError as error:
        return Finding(
            name, "warn", f"no connection to a port of {address} from here: {error.strerror or error}",
            "open the system's ephemeral ports between the nodes; until then chunks go through Ray's object store",
        )  # fmt: skip
    return Finding(
        name, "ok", f"{address} takes connections on a free port (whether other nodes' do, only they can say)"
    )


def look_at_store(url: str, storage_options: Mapping[str, Any], read_only: bool) -> Iterator[Finding]:
    """What a run at `url` would meet.

    Args:
        url: Of a run; there need not be one.
        storage_options: For fsspec.
        read_only: Whether nothing may be written.
    """
    try:
        remote = normalise_url(url).startswith("s3://")
        patience = {"retry_deadline_s": _DEADLINE_S, "retry_throttled_s": _DEADLINE_S} if remote else {}
        store = open_store(url, {**patience, **storage_options})
    except InvalidInputError as error:
        yield Finding("url", "fail", str(error), "correct the url or the options")
        return
    yield Finding("url", "ok", store.url)
    if remote:
        yield _credentials(storage_options)
    begun = time.monotonic()
    reached = _tried("list", lambda: f"{count(len(store.list(PROBE)), 'object')} left by checks")
    if reached.state == "fail":
        yield reached
        yield Finding("everything else", "skip", "the store can't be listed")
        return
    took = f"answered in {1000 * (time.monotonic() - begun):.0f} ms"
    yield Finding("endpoint", "ok", f"{_server(store)} {took}")
    yield Finding("list", "ok", "allowed")
    if read_only:
        yield Finding("write", "skip", "--read-only")
    else:
        yield from _writing(store)
    yield _uploads(store)
    yield from _space(store)
    yield from _run(url, storage_options)


def _server(store: Store) -> str:
    named = getattr(store, "endpoint", None)
    return str(named()) if callable(named) else store.url


def _tried(name: str, attempt: Callable[[], str], advice: str = "") -> Finding:
    """A check that is good where nothing is raised; our errors say themselves what to do."""
    try:
        return Finding(name, "ok", attempt())
    except CheckpointError as error:
        return Finding(name, "fail", str(error), advice)


def _credentials(options: Mapping[str, Any]) -> Finding:
    """Where the credentials come from; the secret itself is shown nowhere."""
    import botocore.exceptions
    import botocore.session

    name = "credentials"
    if options.get("anon"):
        return Finding(name, "ok", "none, as anon=true says: public buckets only")
    if options.get("key"):
        return Finding(name, "ok", f"access key {_masked(str(options['key']))} from the storage options")
    try:
        found = botocore.session.Session(profile=options.get("profile")).get_credentials()
        key = found.get_frozen_credentials().access_key if found is not None else None
    except botocore.exceptions.BotoCoreError as error:
        return Finding(name, "fail", str(error), "correct AWS_PROFILE, or the files in ~/.aws")
    if found is None or not key:
        return Finding(
            name, "fail", "none found", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the "
            "machine a role; -o anon=true for a public bucket"
        )  # fmt: skip
    return Finding(name, "ok", f"access key {_masked(key)} from {found.method}")


def _masked(key: str) -> str:
    return f"{key[:4]}…{key[-2:]}" if len(key) > 8 else "…"


def _writing(store: Store) -> Iterator[Finding]:
    """Rights, and promises that only writing shows."""
    name, data = f"{PROBE}doctor-{uuid.uuid4().hex}", b"written by rl-ckpt doctor"
    made = _folders_to_make(store)
    before = time.time()
    wrote = _tried("write", lambda: _nothing(store.put(name, [data])))
    after = time.time()
    yield wrote
    if wrote.state == "fail":
        return
    try:
        yield _tried("read", lambda: _same(store.get(name), data))
        yield _clock(store, name, before, after)
        yield _tried("create-only PUT", lambda: _race(store))
    finally:
        deleted = _tried("delete", lambda: _nothing(store.delete([name])), f"{store.object_url(name)} is left there")
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: somebody saves there by now
                os.rmdir(folder)
    yield deleted


def _folders_to_make(store: Store) -> list[Path]:
    """Of a local run, the folders down to it that are not there yet, the innermost first."""
    path = store.local_path(RUN_FILE)
    return [] if path is None else [folder for folder in Path(path).parents if not folder.exists()]


def _nothing(_: None) -> str:
    return "allowed"


def _race(store: Store) -> str:
    probe_create_only(store)
    return "of 8 writers of one new name exactly one won, 3 times"


def _same(found: bytes, written: bytes) -> str:
    if found != written:
        raise CorruptionError(f"{len(written)} bytes were written, {len(found)} others came back: look at what caches")
    return "allowed"


def _clock(store: Store, name: str, before: float, after: float) -> Finding:
    """This machine's clock beside the store's, as listings give it."""
    try:
        told = next((item.modified for item in store.list(name) if item.name == name), None)
    except StorageError as error:
        return Finding("clock", "fail", str(error))
    if told is None:
        return Finding(
            "clock", "fail", "what was just written is not listed", "use a store with consistent listings; else the "
            "newest checkpoint may not be found"
        )  # fmt: skip
    return _skew(told, before, after)


def _skew(told: float, before: float, after: float) -> Finding:
    if before - _GRANULARITY_S - _SKEW_S <= told <= after + _SKEW_S:
        return Finding("clock", "ok", f"within {_SKEW_S:.0f} s of the store's")
    apart = f"{duration(abs(told - after))} {'behind' if told > after else 'ahead of'} the store's"
    return Finding(
        "clock", "warn", apart, "set this machine's clock by NTP: retention by age goes by it, and S3 refuses requests "
        "from 15 minutes on"
    )  # fmt: skip


def _uploads(store: Store) -> Finding:
    """Whether unfinished uploads can be found; those of ten years ago are no more, so that nothing is removed."""

    def attempt() -> str:
        store.clean_partial(_YEARS_S, lambda _: True)
        return "can be listed"

    advice = "allow s3:ListBucketMultipartUploads: without it, what killed writers left half-written stays and costs"
    found = _tried("unfinished uploads", attempt, advice)
    return Finding(found.name, "warn", found.found, found.advice) if found.state == "fail" else found


def _space(store: Store) -> Iterator[Finding]:
    try:
        free = store.free_bytes()
    except StorageError as error:
        yield Finding("space", "warn", str(error))
        return
    if free is not None:
        low = free < _SHM_BYTES
        advice = "make room, sweep (`rl-ckpt sweep`), or use another disk" if low else ""
        yield Finding("space", "warn" if low else "ok", f"{size(free)} free", advice)


def _run(url: str, storage_options: Mapping[str, Any]) -> Iterator[Finding]:
    """The run that is there, if any."""
    try:
        run = Run.open(url, storage_options)
        log = run.log.read()
        lease = holder(run.store, log.last_epoch) if log.last_epoch is not None and log.last_epoch.lease else None
    except CheckpointNotFoundError as error:
        yield Finding("run", "ok", f"none yet ({error})" if "no run.json" in str(error) else "none yet")
        return
    except CheckpointError as error:
        yield Finding("run", "fail", str(error))
        return
    newest = f", the newest step {log.commits[-1].step} of {when(log.commits[-1].time)}" if log.commits else ""
    text = f"{count(len(log.commits), 'checkpoint')}{newest}"
    owned = f"; owned by {lease.owner}, last seen {when(lease.seen)}" if lease is not None else "; nobody owns it"
    if log.damaged:
        yield Finding("run", "fail", f"{text}; {'; '.join(log.damaged.values())}", "`rl-ckpt verify --repair`")
        return
    weak = run.record.create_only == "weak"
    advice = "it was made with weak_commits: only one job may ever write to it" if weak else ""
    yield Finding("run", "warn" if weak else "ok", text + owned, advice)
