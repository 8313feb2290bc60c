"""What every store must do: one suite, which each backend's test class inherits and gives a `store` fixture."""

from __future__ import annotations

import gc
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from rl_ckpt.errors import CorruptionError, InvalidInputError
from rl_ckpt.store.base import ObjectExistsError, ObjectMissingError, Store, as_bytes_view
from rl_ckpt.store.probe import probe_create_only

BAD_NAMES = ["", "/abs", "a//b", "a/", "../up", "a/../b", "./a", "a/.hidden", ".hidden", "new\nline", "back\\slash"]


def some_bytes(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def read(store: Store, name: str, ranges: list[tuple[int, int]]) -> list[bytes]:
    """Fetch ranges given as offset and size; the buffers are larger and must keep what lies beyond the range."""
    buffers = [bytearray(b"\xee" * (size + 8)) for _, size in ranges]
    store.read_into(name, [(off, memoryview(b)[:size]) for (off, size), b in zip(ranges, buffers, strict=True)])
    assert all(bytes(b[-8:]) == b"\xee" * 8 for b in buffers)
    return [bytes(b[:-8]) for b in buffers]


class StoreContract:
    """Inherit, and give the fixture `store`: an empty store."""

    LARGE_BYTES = 40_000_003
    """Over the size of one part and of one parallel read, not a multiple of anything."""

    # put and get

    @pytest.mark.parametrize("size", [0, 1, 100_000])
    def test_get_gives_what_was_put(self, store: Store, size: int):
        store.put("folder/sub/object.bin", [some_bytes(size)])
        assert store.get("folder/sub/object.bin") == some_bytes(size)

    def test_put_joins_segments_of_every_size_and_kind(self, store: Store):
        data = some_bytes(3_000_000)
        array = np.frombuffer(data[2_000_000:2_500_000], np.float64).reshape(50, -1)
        cuts = [0, 1, 1, 2, 66, 1000, 70_000, 2_000_000]
        segments = [memoryview(data)[a:b] for a, b in pairwise(cuts)]
        segments += [array.data, memoryview(bytearray(data[2_500_000:2_900_001])), memoryview(data)[2_900_001:]]
        store.put("joined", segments)
        assert store.get("joined") == data

    def test_put_of_very_many_small_segments(self, store: Store):
        data = some_bytes(100_000)
        store.put("many", [memoryview(data)[i : i + 1] for i in range(len(data))])
        assert store.get("many") == data

    def test_put_of_empty_arrays_among_others(self, store: Store):
        store.put("a", [b"", np.zeros((3, 0)).data, b"x", memoryview(bytearray())])
        assert store.get("a") == b"x"

    def test_put_of_a_large_object_is_the_same_bytes(self, store: Store):
        data = some_bytes(self.LARGE_BYTES)
        third = self.LARGE_BYTES // 3
        store.put(
            "large", [memoryview(data)[:third], memoryview(data)[third : third + 1], memoryview(data)[third + 1 :]]
        )
        back = bytearray(len(data))
        store.read_into("large", [(0, memoryview(back))])
        assert back == data

    def test_put_replaces(self, store: Store):
        store.put("a", [b"old and longer"])
        store.put("a", [b"new"])
        assert store.get("a") == b"new"
        assert [o.size_bytes for o in store.list()] == [3]

    def test_put_refuses_buffers_that_are_not_contiguous(self, store: Store):
        for segment in (memoryview(b"abcdef")[::2], np.ones((3, 4), order="F").data):
            with pytest.raises(InvalidInputError, match="contiguous"):
                store.put("a", [segment])
        assert not store.exists("a")

    def test_get_of_a_missing_object(self, store: Store):
        store.put("folder/there", [b"x"])
        for name in ("missing", "folder/missing", "nofolder/missing", "folder"):
            with pytest.raises(ObjectMissingError, match=name):
                store.get(name)

    # create

    def test_create_then_get(self, store: Store):
        store.create("commits/00000001.json", b"one")
        assert store.get("commits/00000001.json") == b"one"

    def test_create_of_an_empty_object(self, store: Store):
        store.create("empty", b"")
        assert store.get("empty") == b""

    def test_create_never_replaces(self, store: Store):
        store.create("a", b"first")
        with pytest.raises(ObjectExistsError):
            store.create("a", b"second")
        assert store.get("a") == b"first"

    def test_create_sees_what_put_wrote_and_works_again_after_delete(self, store: Store):
        store.put("a", [b"put"])
        with pytest.raises(ObjectExistsError):
            store.create("a", b"created")
        store.delete(["a"])
        store.create("a", b"created")
        assert store.get("a") == b"created"

    def test_of_racing_creators_exactly_one_wins(self, store: Store):
        barrier = threading.Barrier(8)

        def race(job: tuple[int, int]) -> tuple[int, int] | None:
            number, writer = job
            barrier.wait()
            try:
                store.create(f"race/{number}", b"%d" % writer)
            except ObjectExistsError:
                return None
            return job

        for number in range(5):
            with ThreadPoolExecutor(8) as pool:
                winners = [won for won in pool.map(race, [(number, writer) for writer in range(8)]) if won]
            assert len(winners) == 1
            assert store.get(f"race/{number}") == b"%d" % winners[0][1]

    def test_probe_passes_and_leaves_nothing(self, store: Store):
        probe_create_only(store)
        assert store.list() == []

    # read_into

    def test_read_into_any_order_near_far_overlapping_and_empty(self, store: Store):
        data = some_bytes(2_000_000)
        store.put("a", [data])
        ranges = [
            (1_999_990, 10),
            (0, 5),
            (5, 5),
            (64, 100),
            (100, 300),
            (0, 0),
            (64, 100),
            (1_000_000, 70_000),
            (0, 1),
        ]
        assert read(store, "a", ranges) == [data[off : off + size] for off, size in ranges]

    def test_read_into_thousands_of_small_ranges_is_few_requests(self, store: Store):
        data = some_bytes(1_000_000)
        store.put("a", [data])
        before = store.stats.snapshot()
        ranges = [(off, 60) for off in range(0, 640_000, 64)]
        assert read(store, "a", ranges) == [data[off : off + size] for off, size in ranges]
        after = store.stats.snapshot()
        assert after.reads - before.reads <= 2
        assert 600_000 <= after.bytes_read - before.bytes_read <= 640_000

    def test_read_into_large_and_small_ranges_together(self, store: Store):
        data = some_bytes(self.LARGE_BYTES)
        store.put("a", [data])
        ranges = [(1, self.LARGE_BYTES - 2), (0, 1), (self.LARGE_BYTES - 1, 1)]
        before = store.stats.snapshot()
        assert read(store, "a", ranges) == [data[off : off + size] for off, size in ranges]
        assert store.stats.snapshot().bytes_read - before.bytes_read == self.LARGE_BYTES

    def test_read_into_array_memory(self, store: Store):
        array = np.arange(1000, dtype=np.float64).reshape(10, 100)
        store.put("a", [array.data])
        back = np.zeros((10, 100))
        store.read_into("a", [(0, back.data)])
        assert np.array_equal(array, back)

    @pytest.mark.parametrize(("offset", "size"), [(0, 101), (90, 11), (100, 1), (5000, 10)])
    def test_read_into_beyond_the_end(self, store: Store, offset: int, size: int):
        store.put("shards/a", [bytes(100)])
        with pytest.raises(CorruptionError, match=rf"shards/a.*at least {offset + size} bytes, found 100\b"):
            read(store, "shards/a", [(0, 10), (offset, size)])

    def test_read_into_of_an_object_cut_off_in_a_large_range(self, store: Store):
        store.put("a", [bytes(20_000_000)])
        with pytest.raises(CorruptionError, match=r"at least .* found 20000000"):
            store.read_into("a", [(0, memoryview(bytearray(self.LARGE_BYTES)))])

    @pytest.mark.parametrize("ranges", [[(0, 10)], []])
    def test_read_into_of_a_missing_object(self, store: Store, ranges: list[tuple[int, int]]):
        with pytest.raises(ObjectMissingError):
            read(store, "missing", ranges)

    def test_the_collector_survives_views_in_cycles(self, store: Store):
        """CPython 3.11 crashed on flat views made by PickleBuffer."""
        cycle: list[object] = [as_bytes_view(memoryview(bytearray(100)))]
        cycle.append(cycle)
        store.put("a", [as_bytes_view(bytearray(10))])
        with pytest.raises(CorruptionError):
            store.read_into("a", [(0, memoryview(bytearray(self.LARGE_BYTES)))])
        del cycle
        assert gc.collect() > 0

    def test_read_into_refuses_read_only_buffers_and_negative_offsets(self, store: Store):
        store.put("a", [b"abc"])
        with pytest.raises(InvalidInputError, match="read-only"):
            store.read_into("a", [(0, memoryview(b"xyz"))])
        with pytest.raises(InvalidInputError, match="-1"):
            store.read_into("a", [(-1, memoryview(bytearray(1)))])

    # list, exists, delete

    def test_list_is_sorted_recursive_and_tells_sizes_and_times(self, store: Store):
        begun = time.time()
        for name in ("b", "a/2", "a/10", "a/x/y/z", "ab"):
            store.put(name, [name.encode()])
        objects = store.list()
        assert [(o.name, o.size_bytes) for o in objects] == [
            (name, len(name)) for name in ("a/10", "a/2", "a/x/y/z", "ab", "b")
        ]
        # The store's clock is this machine's; some tell whole seconds only.
        assert all(begun - 2 <= o.modified <= time.time() + 2 for o in objects)

    def test_list_by_prefix(self, store: Store):
        for name in ("a/1", "a/2", "ab/3", "b"):
            store.put(name, [b"x"])
        assert [o.name for o in store.list("a/")] == ["a/1", "a/2"]
        assert [o.name for o in store.list("a")] == ["a/1", "a/2", "ab/3"]
        assert [o.name for o in store.list("a/2")] == ["a/2"]
        assert store.list("nothing/") == []

    def test_list_of_nothing(self, store: Store):
        assert store.list() == []
        assert store.list("commits/") == []

    def test_exists(self, store: Store):
        store.put("folder/a", [b""])
        assert store.exists("folder/a")
        assert not store.exists("folder/b")
        assert not store.exists("folder")
        assert not store.exists("other/a")

    def test_delete_many_some_missing(self, store: Store):
        names = [f"x/{n % 3}/{n}" for n in range(30)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: store.put(name, [b"x"]), names))
        store.delete([*names[1:], "missing", "no/such/folder"])
        assert [o.name for o in store.list()] == [names[0]]
        store.delete([])
        store.delete(names)
        assert store.list() == []
        store.put("x/0/again", [b"x"])
        assert store.exists("x/0/again")

    @pytest.mark.parametrize("name", BAD_NAMES)
    def test_names_that_cannot_be(self, store: Store, name: str):
        calls: list[Callable[[], object]] = [
            lambda: store.put(name, [b""]),
            lambda: store.create(name, b""),
            lambda: store.get(name),
            lambda: store.read_into(name, []),
            lambda: store.exists(name),
            lambda: store.delete([name]),
            lambda: store.local_path(name),
        ]
        for call in calls:
            with pytest.raises(InvalidInputError, match="name of a stored object"):
                call()

    def test_names_with_odd_but_printable_characters(self, store: Store):
        names = ["run 1/ä+b=c&d%20e.json", "shards/00-a~b@c,d;e!(f)'.arrow", "日本/語"]
        for name in names:
            store.put(name, [name.encode()])
        assert [o.name for o in store.list()] == sorted(names)
        assert [store.get(name) for name in names] == [name.encode() for name in names]
        assert all(store.exists(name) for name in names)
        store.delete(names)
        assert store.list() == []

    # threads, processes, counters

    def test_many_threads_at_once(self, store: Store):
        def work(number: int) -> bool:
            data = some_bytes(10_000 + number, seed=number)
            store.put(f"t/{number}", [data])
            return store.get(f"t/{number}") == data and read(store, f"t/{number}", [(number, 99)]) == [
                data[number:][:99]
            ]

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(work, range(48)))

    def test_pickles_without_its_connections_and_counters(self, store: Store):
        store.put("a", [b"x"])
        again: Store = pickle.loads(pickle.dumps(store))
        assert (again.url, again.storage_options) == (store.url, store.storage_options)
        assert again.get("a") == b"x"
        assert again.stats.snapshot().writes == 0

    def test_counts_traffic(self, store: Store):
        store.put("a", [b"12345", b"678"])
        store.create("b", b"1234")
        store.get("a")
        traffic = store.stats.snapshot()
        assert (traffic.writes, traffic.bytes_written, traffic.reads, traffic.bytes_read) == (2, 12, 1, 8)
        assert traffic.retries == 0

    def test_clean_partial_leaves_whole_objects(self, store: Store):
        store.put("a", [b"x"])
        assert store.clean_partial(0) == 0
        assert store.get("a") == b"x"

    def test_repr_shows_the_url_and_no_options(self, store: Store):
        assert store.url in repr(store)
        assert "secret" not in repr(store)
