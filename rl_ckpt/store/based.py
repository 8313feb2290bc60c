"""A fork's store: names that begin with `base/<k>/` are files of the runs that it was forked from.

Owns: where a base is, and reading from it as if its files were the fork's own. Promises: nothing is ever written to, or
deleted from, a base that lies outside the run; a base that is gone is named. Does not know: which files of a base are
needed, or what holds them there (store/forks.py).

A base whose entry in run.json is `base/<k>` itself, as in a copy that stands by itself, is in the run: its files lie
there under the very names that manifests have for them, and are read, written and swept like any other.
"""

from __future__ import annotations

import os
import posixpath
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from rl_ckpt.errors import CorruptionError, InvalidInputError, StorageError
from rl_ckpt.format import records
from rl_ckpt.format.records import RunRecord
from rl_ckpt.store.base import (
    Buffer,
    ObjectMissingError,
    PartialObject,
    StorageOptions,
    Store,
    StoredObject,
    spare_none,
)
from rl_ckpt.store.urls import BASE_OPTIONS, open_store


def base_url(run_url: str, base: str) -> str:
    """The url that a base's entry in run.json means.

    Args:
        run_url: Normalised url of the run.
        base: The entry: a url, or a path relative to the run.

    Raises:
        CorruptionError: It leads out of the bucket, or nowhere.
    """
    if "://" in base:
        return base
    scheme, _, place = run_url.partition("://")
    # A run that is reached by a symbolic link has its neighbours where its folder really is.
    place = os.path.realpath(place) if scheme == "file" else place
    found = posixpath.normpath(posixpath.join(place, base))
    if found in (".", "/") or found.startswith(".."):
        raise CorruptionError(f"{run_url}/{records.RUN_FILE} names the base {base!r}, which leads nowhere")
    return f"{scheme}://{found}"


def base_entry(run_url: str, base: str) -> str:
    """What run.json says of a base: relative to the run where both lie below one root, so that a copy of all works.

    Args:
        run_url: Normalised url of the run.
        base: Normalised url of the base.
    """
    scheme, _, place = run_url.partition("://")
    other_scheme, _, other = base.partition("://")
    if scheme == "file" == other_scheme:
        place, other = os.path.realpath(place), os.path.realpath(other)
    here, there = place.strip("/").split("/"), other.strip("/").split("/")
    if scheme != other_scheme or here[0] != there[0]:
        return base
    return posixpath.relpath("/" + "/".join(there), "/" + "/".join(here))


def inner_entry(number: int) -> str:
    """What run.json says of a base whose files lie in the run itself, by the very names that manifests have."""
    return f"{records.BASES}{number}"


def is_inner(record: RunRecord, number: int) -> bool:
    """Whether the files of a base lie in the run itself."""
    return record.bases[number] == inner_entry(number)


def self_contained(record: RunRecord) -> RunRecord:
    """The run.json of a copy of a fork that has its bases' files itself, by the names that manifests have for them."""
    inner = tuple(map(inner_entry, range(len(record.bases))))
    return msgspec.structs.replace(record, bases=inner, held=("",) * len(inner))


def open_run_store(url: str | os.PathLike[str], storage_options: StorageOptions | None = None) -> Store:
    """The store of a run whose run.json was not read: that is done when the name of a base's file asks for it.

    Raises:
        InvalidInputError: As `open_store`.
    """
    return BasedStore(open_store(url, storage_options), None, (storage_options or {}).get(BASE_OPTIONS))


def with_bases(store: Store, record: RunRecord, storage_options: StorageOptions | None = None) -> Store:
    """The store of a run whose run.json was read; `store` itself where the run has no bases."""
    return BasedStore(store, record.bases, (storage_options or {}).get(BASE_OPTIONS)) if record.bases else store


def sizes_of(store: Store, names: Iterable[str]) -> dict[str, int]:
    """Sizes of the shard files that are there, in bytes, among them those of `names` that are.

    A base that can't be listed has none: what leans on its files can't be written now, and what reads them says why.

    Raises:
        StorageError: The store failed.
    """
    return {item.name: item.size_bytes for item in store.list(records.SHARDS)} | sizes_in_bases(store, names)


def sizes_in_bases(store: Store, names: Iterable[str]) -> dict[str, int]:
    """As `sizes_of`, of files in bases alone."""
    folders = {name.rpartition("/")[0] + "/" for name in names if records.split_base(name) is not None}
    out: dict[str, int] = {}
    for folder in sorted(folders):
        try:
            out.update({item.name: item.size_bytes for item in store.list(folder)})
        except (StorageError, InvalidInputError):
            continue
    return out


def outer_base(store: Store, name: str) -> str | None:
    """Url of the run that an object lies in, where that is another than the store's own."""
    based = records.split_base(name)
    if based is None or not isinstance(store, BasedStore) or not store.is_outer(based[0]):
        return None
    return store.base(based[0]).url


class BasedStore(Store):
    """A run's own store, and those of its bases; see the module."""

    def __init__(self, own: Store, bases: Sequence[str] | None, base_options: Mapping[str, Any] | None = None) -> None:
        """Opens nothing yet.

        Args:
            own: The run's.
            bases: As in run.json; None: it is read when a name asks for it.
            base_options: For fsspec, of the bases; None: those of `own`, where the scheme is the same.
        """
        super().__init__(own.url, own.storage_options)
        self.own = own
        self.stats = own.stats
        self._given = None if bases is None else tuple(bases)
        self._base_options = base_options
        self._bases = self._given
        self._open: dict[int, Store] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[Any, ...]]:
        """With its own store and what it was given."""
        return type(self), (self.own, self._given, self._base_options)

    @property
    def bases(self) -> tuple[str, ...]:
        """As in run.json, which is read for them where they were not given.

        Raises:
            CorruptionError, StorageError, InvalidInputError: run.json can't be read.
        """
        if self._bases is None:
            try:
                record = records.decode_run(self.url, self.own.get(records.RUN_FILE))
            except ObjectMissingError as error:
                raise CorruptionError(self.own.missing(records.RUN_FILE)) from error
            self._bases = record.bases
        return self._bases

    def base(self, number: int) -> Store:
        """The store of a base that lies outside the run; not of files, which are below `base/<number>/` here.

        Raises:
            CorruptionError: There is no such base.
            InvalidInputError: Its url can't be used here.
        """
        with self._lock:
            if number not in self._open:
                url = base_url(self.url, self._entry(number))
                same = url.partition("://")[0] == self.url.partition("://")[0]
                options = self._base_options
                store = open_store(url, options if options is not None else self.own.storage_options if same else None)
                store.stats = self.stats
                self._open[number] = store
            return self._open[number]

    def is_outer(self, number: int) -> bool:
        """Whether a base's files lie in another run.

        Raises:
            CorruptionError: There is no such base.
        """
        return self._entry(number) != inner_entry(number)

    def _entry(self, number: int) -> str:
        if number >= len(self.bases):
            raise CorruptionError(f"{self.url} has {len(self.bases)} bases; a manifest names files of base {number}")
        return self.bases[number]

    def _at(self, name: str) -> tuple[Store, str]:
        """The store that has an object, and its name there."""
        based = records.split_base(name)
        if based is None:
            return self.own, name
        return (self.base(based[0]), based[1]) if self.is_outer(based[0]) else (self.own, name)

    def _own_at(self, name: str) -> str:
        """The name in the run's own store, of what may be written.

        Raises:
            InvalidInputError: It lies in a base.
        """
        store, there = self._at(name)
        if store is not self.own:
            raise InvalidInputError(f"{store.object_url(there)} belongs to a run that {self.url} was forked from")
        return there

    def object_url(self, name: str) -> str:
        """Where the object really is."""
        store, there = self._at(name)
        return store.object_url(there)

    def put(self, name: str, segments: Sequence[Buffer]) -> None:
        """To the run's own store."""
        self.own.put(self._own_at(name), segments)

    def create(self, name: str, data: bytes) -> None:
        """In the run's own store."""
        self.own.create(self._own_at(name), data)

    def get(self, name: str) -> bytes:
        """From wherever it is."""
        store, there = self._at(name)
        return store.get(there)

    def getter(self) -> Callable[[str], bytes]:
        """The own store's, which may be the cheaper, for what is its own."""
        own = self.own.getter()
        return lambda name: own(name) if records.split_base(name) is None else self.get(name)

    def read_into(self, name: str, reads: Sequence[tuple[int, memoryview]]) -> None:
        """From wherever it is."""
        store, there = self._at(name)
        store.read_into(there, reads)

    def list(self, prefix: str = "") -> list[StoredObject]:
        """Of the run's own store, or of one base where the prefix begins with `base/<k>/shards/`."""
        store, there = self._at(prefix)
        found = store.list(there)
        if there == prefix:
            return found
        return [StoredObject(prefix + item.name[len(there) :], item.size_bytes, item.modified) for item in found]

    def delete(self, names: Sequence[str]) -> None:
        """From the run's own store."""
        self.own.delete([self._own_at(name) for name in names])

    def exists(self, name: str) -> bool:
        """Wherever it is."""
        store, there = self._at(name)
        return store.exists(there)

    def clean_partial(self, older_than_s: float, spare: Callable[[str], bool] = spare_none) -> int:
        """In the run's own store."""
        return self.own.clean_partial(older_than_s, spare)

    def local_path(self, name: str) -> str | None:
        """Wherever it is."""
        store, there = self._at(name)
        return store.local_path(there)

    def partial(self, name: str, size_bytes: int) -> PartialObject | None:
        """In the run's own store."""
        return self.own.partial(self._own_at(name), size_bytes)

    def partial_bytes(self, name: str) -> int:
        """In the run's own store."""
        return self.own.partial_bytes(self._own_at(name))

    def is_local(self) -> bool:
        """Of the run's own store and of all bases."""
        outer = [self.base(number) for number in range(len(self.bases)) if self.is_outer(number)]
        return self.own.is_local() and all(store.is_local() for store in outer)

    def missing(self, name: str) -> str:
        """With a word on the base, where that is gone as a whole."""
        store, there = self._at(name)
        text = store.missing(there)
        if store is self.own or store.exists(records.RUN_FILE):
            return text
        return (
            f"{text} ({self.url} was forked from the run at {store.url}, which is not there any more: put it back, or "
            "move both together)"
        )

    def free_bytes(self) -> int | None:
        """Of the run's own store."""
        return self.own.free_bytes()
