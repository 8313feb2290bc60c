"""Verify: reads everything that a run's checkpoints name, and where told so, has good bytes written back.

Owns: what is looked at (run.json, the commit log, manifests, shard files and every chunk in them), and the report.
Promises: memory does not grow with the checkpoints' bytes, only with the number of their chunks; without `repair`
nothing is written but a pin. Writing back is done in store/mend.py.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rl_ckpt.errors import CheckpointNotFoundError, CorruptionError, InvalidInputError, StorageError, UntrustedDataError
from rl_ckpt.format.manifest import Manifest
from rl_ckpt.format.records import RUN_FILE, CommitRecord, commit_name, manifest_name
from rl_ckpt.info import Damage, VerifyReport
from rl_ckpt.state import leaves
from rl_ckpt.state.tree import Plain
from rl_ckpt.store import mend
from rl_ckpt.store.based import outer_base, sizes_of
from rl_ckpt.store.chunk_check import Spot, bad_spots, read_ranges
from rl_ckpt.store.layout import Leaves, arrow_problem, leaves_in, new_area, writer_of
from rl_ckpt.store.mend import DamagedFile, More
from rl_ckpt.store.parallel import run_all, spare_threads
from rl_ckpt.store.pins import pin
from rl_ckpt.store.repair import good_places, spots
from rl_ckpt.store.run import Run

_PIN_S = 24 * 3600.0


def verify(
    url: str,
    storage_options: Mapping[str, Any],
    step: int | str | None,
    repair: bool,
    more: More | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """As `Checkpointer.verify`.

    Args:
        url: Of the run.
        storage_options: For fsspec.
        step: Which checkpoint, by its step or id; None: all.
        repair: Whether to write good bytes back.
        more: A further source: gives the bytes of a digest and size, or None. What it gives is compared.
        progress: Told how many bytes were looked at, and of how many, by any thread.
    """
    begun = time.monotonic()
    run, damage = _opened(url, storage_options, repair)
    log = run.log.read()
    if log.damaged:
        rows = [_record(run, name, why, repair) for name, why in sorted(log.damaged.items())]
        log = run.log.read()
        commits = {commit_name(commit.number): (commit.id,) for commit in log.commits}
        damage += [replace(row, checkpoints=commits.get(row.file, ())) for row in rows]
    chosen = list(log.commits) if step is None else [run.find(log, step)]
    with _held(run, chosen if repair or step is not None else [], repair):
        known = {commit.id for commit in run.log.read().commits}
        chosen = [commit for commit in chosen if commit.id in known]  # the others were swept before they were held
        if step is not None and not chosen:
            run.find(run.log.read(), step)  # says what there is
        verifier = _Verifier(run, chosen, repair, more)
        damage += verifier.manifests()
        damage += verifier.files(progress)
        known = {commit.id for commit in run.log.read().commits}  # who sweeps meanwhile damages nothing
    damage = [d for d in damage if not d.checkpoints or known.intersection(d.checkpoints)]
    everybody = tuple(commit.id for commit in chosen)
    damage = [replace(d, checkpoints=everybody) if d.file == RUN_FILE else d for d in damage]
    states = {commit.id: _state(commit.id, damage) for commit in chosen if commit.id in known}
    read = [spot for found in verifier.spots.values() for spot in found]
    seconds = time.monotonic() - begun
    return VerifyReport(
        states, tuple(damage), len(verifier.spots), len(read), sum(spot.bytes for spot in read), seconds
    )


def _state(checkpoint: str, damage: Sequence[Damage]) -> str:
    mine = [item for item in damage if checkpoint in item.checkpoints]
    if not mine:
        return "good"
    return "repaired" if all(item.repaired_from is not None for item in mine) else "damaged"


def _opened(url: str, storage_options: Mapping[str, Any], repair: bool) -> tuple[Run, list[Damage]]:
    """The run, also where its run.json is damaged, missing or of another run: the commit log repeats the run's id."""
    try:
        run = Run.open(url, storage_options)
        log = run.log.read()
        if log.commits or not log.damaged:
            return run, []
        why = f"run.json says run {run.record.run}, and no record of the commit log does"
    except (CorruptionError, CheckpointNotFoundError) as error:
        found = mend.run_by_its_log(url, storage_options)
        if found is None:
            raise
        run, why = found, str(error)
    else:
        other = mend.run_by_its_log(url, storage_options)
        if other is None or other.record.run == run.record.run:
            return run, []
        run = other
    source = mend.write_run_record(run) if repair else None
    advice = "" if source else "`verify(repair=True)` makes it anew from the commit log"
    return run, [Damage(RUN_FILE, why, repaired_from=source, advice=advice)]


def _record(run: Run, name: str, why: str, repair: bool) -> Damage:
    source = mend.record(run, name) if repair else None
    advice = (
        "what it committed can't be loaded, and nothing is swept while it is there; put it back from a copy, or delete "
        "it if there is none"
    )
    return Damage(name, why, repaired_from=source, advice="" if source else advice)


@contextlib.contextmanager
def _held(run: Run, commits: Sequence[CommitRecord], must: bool) -> Iterator[None]:
    """Keeps the sweep of any process from checkpoints, where this process may write; `must`: an error if it may not."""
    with contextlib.ExitStack() as stack:
        for commit in commits:
            try:
                stack.enter_context(pin(run, commit.id, _PIN_S))
            except CheckpointNotFoundError:
                continue  # dropped by a job that goes on beside this one
            except (StorageError, InvalidInputError):
                if must:
                    raise
                break
        yield


class _Verifier:
    """One verification of some checkpoints of a run."""

    def __init__(self, run: Run, commits: Sequence[CommitRecord], repair: bool, more: More | None) -> None:
        self._run = run
        self._commits = commits
        self._repair = repair
        self._more = more
        self.spots: dict[str, set[Spot]] = {}
        """By shard file: the chunks that the checkpoints name, each once."""
        self._sizes: dict[str, int] = {}  # by shard file, as manifests have it
        self._users: dict[str, list[CommitRecord]] = {}  # by shard file

    def manifests(self) -> list[Damage]:
        """Reads all manifests, for what is wrong with them and what they name."""
        damage = []
        for commit in self._commits:
            try:
                manifest = self._run.manifest(commit)
                _check_plain(manifest)
            except CorruptionError as error:
                source = mend.manifest(self._run, commit, self._more) if self._repair else None
                advice = "" if source else "the checkpoint is lost unless its manifest is put back from a copy"
                name = manifest_name(commit.id) if commit.id else commit_name(commit.number)
                damage.append(
                    Damage(
                        name, str(error), commit.manifest_digest,
                        checkpoints=(commit.id,), repaired_from=source, advice=advice,
                    )
                )  # fmt: skip
                if source is None:
                    continue
                manifest = self._run.manifest(commit)
            for name, found in spots(manifest).items():
                self.spots.setdefault(name, set()).update(found)
                self._users.setdefault(name, []).append(commit)
            self._sizes.update({file.name: file.bytes for file in manifest.files})
        return damage

    def files(self, progress: Callable[[int, int], None] | None = None) -> list[Damage]:
        """Reads all chunks, and what is around them."""
        store = self._run.store
        there = sizes_of(store, self.spots)
        bad = bad_spots(store, self.spots, self._counter(progress))
        files: dict[str, DamagedFile] = {}
        for name in self.spots:
            files[name] = DamagedFile(name, self._sizes[name], there.get(name), set(self.spots[name]))
        for (name, spot), found in bad.items():
            files[name].bad[spot] = found
        self._look_around(list(files.values()))
        damaged = [file for file in files.values() if file.bad or file.around]
        # A base's files are another run's: what else lies in them, this one does not know.
        own = [file for file in damaged if outer_base(store, file.name) is None]
        if self._repair and own:
            bad |= self._widen({file.name: file for file in own})
            places = good_places(self._run, bad)
            for file in own:
                mend.file(self._run, file, {s: p for (name, s), p in places.items() if name == file.name}, self._more)
        return [item for file in damaged for item in self._damage(file)]

    def _counter(self, progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
        total = sum(spot.bytes for spots in self.spots.values() for spot in spots)
        done, lock = 0, threading.Lock()

        def read(more: int) -> None:
            nonlocal done
            with lock:
                done += more
                if progress is not None:
                    progress(done, total)

        return read

    def _widen(self, damaged: Mapping[str, DamagedFile]) -> dict[tuple[str, Spot], str]:
        """Looks for damage in what other checkpoints have in damaged files, as those are written anew as a whole.

        Returns:
            What was found, which the files are told as well.
        """
        chosen = {commit.id for commit in self._commits}
        more: dict[str, set[Spot]] = {}
        for commit in self._run.log.read().commits:
            manifest = self._readable(commit) if commit.id not in chosen else None
            named = spots(manifest) if manifest is not None else {}
            for name in damaged.keys() & named.keys():
                more.setdefault(name, set()).update(named[name] - damaged[name].spots)
                self._users[name].append(commit)
        bad = bad_spots(self._run.store, more)
        for name, found in more.items():
            damaged[name].spots.update(found)
        for (name, spot), why in bad.items():
            damaged[name].bad[spot] = why
        return bad

    def _look_around(self, files: Sequence[DamagedFile]) -> None:
        """Finds what is wrong with files beside their chunks."""
        live = {commit.id: commit for commit in self._run.log.read().commits}
        by_writer: dict[str, list[DamagedFile]] = {}
        for file in files:
            by_writer.setdefault(writer_of(file.name), []).append(file)
        for writer, written in by_writer.items():
            manifest = self._readable(live.get(writer))
            run_all([partial(self._around, file, manifest) for file in written], spare_threads())

    def _readable(self, commit: CommitRecord | None) -> Manifest | None:
        try:
            return self._run.manifest(commit) if commit is not None else None
        except CorruptionError:
            return None

    def _around(self, file: DamagedFile, manifest: Manifest | None) -> None:
        if manifest is not None:
            file.leaves = leaves_in(manifest, file.name)
        file.all_known = bool(file.leaves)
        if not file.leaves:  # its writer is gone, or does not name it: all that is known is what others read there
            file.leaves = {(spot.offset, spot.bytes): () for spot in sorted(file.spots)}
        file.around = around_problem(self._run, file)

    def _damage(self, file: DamagedFile) -> list[Damage]:
        """The rows of the report for one file."""
        by_spot: dict[Spot, tuple[set[str], list[str]]] = {spot: (set(), []) for spot in file.bad}
        for commit in self._users[file.name]:
            manifest = self._readable(commit)
            named = spots(manifest).get(file.name, set()) if manifest is not None else set()
            there: Leaves = leaves_in(manifest, file.name) if manifest is not None else {}
            for spot, (paths, ids) in by_spot.items():
                if spot in named:
                    ids.append(commit.id)
                    paths.update(leaf.path for leaf in there.get((spot.offset, spot.bytes), ()))
        base = outer_base(self._run.store, file.name)
        there_alone = f"it belongs to the run at {base}: `verify(repair=True)` of that one mends it where it can"
        lost = "no other checkpoint has the same bytes; load the checkpoint before, and save again"
        lost = lost if self._repair else "`verify(repair=True)` looks for other copies"
        rows = [
            Damage(
                file.name, found, spot.digest, spot.offset, spot.bytes, tuple(sorted(by_spot[spot][0])),
                tuple(by_spot[spot][1]), file.mended.get(spot),
                "" if spot in file.mended else lost if base is None else there_alone,
            )
            for spot, found in sorted(file.bad.items())
        ]  # fmt: skip
        if file.around is not None:
            users = tuple(commit.id for commit in self._users[file.name])
            kept = "rl-ckpt reads what is good in it by the manifest; other Arrow tools may not; save again"
            advice = kept if self._repair else "`verify(repair=True)` makes the file anew where it can"
            advice = advice if base is None else there_alone
            source = file.around_mended
            rows.append(
                Damage(
                    file.name, file.around, f"{file.size_bytes} bytes", checkpoints=users, repaired_from=source,
                    advice="" if source else advice,
                )
            )  # fmt: skip
        return rows


def _check_plain(manifest: Manifest) -> None:
    """Decodes the plain leaves that stand in a manifest.

    Raises:
        CorruptionError: One can't be.
    """
    for path, variants in manifest.nodes.items():
        for variant in variants:
            if isinstance(variant.node, Plain) and isinstance(variant.node.value, dict):
                with contextlib.suppress(UntrustedDataError):  # what it runs is nobody's business here
                    leaves.decode(variant.node.value, path, as_numpy=True)


def around_problem(run: Run, file: DamagedFile) -> str | None:
    """What is wrong with a file beside its chunks: it is missing, of another size, or Arrow can't read it."""
    if file.found_bytes is None:
        return "the file is missing"
    if file.found_bytes != file.size_bytes:
        return f"it has {file.found_bytes} bytes"
    area = new_area(file.size_bytes)
    low, high = min(place[0] for place in file.leaves), max(sum(place) for place in file.leaves)
    why = read_ranges(run.store, file.name, [(0, area[:low]), (high, area[high:])])
    return why or arrow_problem(area, file.leaves, file.all_known)
