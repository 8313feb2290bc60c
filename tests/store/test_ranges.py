"""Which requests fetch a set of ranges: properties over random ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rl_ckpt.store.ranges import SpanWriter, plan_spans

DATA = bytes((i * 37 + i // 256) % 256 for i in range(2000))
ranges = st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 500)), max_size=30)


@given(ranges, st.integers(1, 700), st.integers(0, 100), st.integers(1, 64))
def test_spans_fill_every_buffer_from_chunks_of_any_size(
    wanted: list[tuple[int, int]], span_bytes: int, gap_bytes: int, chunk_bytes: int
):
    buffers = [bytearray(size) for _, size in wanted]
    reads = [(offset, memoryview(buffer)) for (offset, _), buffer in zip(wanted, buffers, strict=True)]
    spans = plan_spans(reads, span_bytes=span_bytes, gap_bytes=gap_bytes)
    for span in spans:
        assert 0 < span.size_bytes <= span_bytes
        assert sum(view.nbytes for _, view in span.pieces) + gap_bytes * (len(span.pieces) - 1) >= span.size_bytes
        writer = SpanWriter(span)
        fetched = DATA[span.offset_bytes : span.end_bytes]
        for begin in range(0, len(fetched), chunk_bytes):
            writer.write(fetched[begin : begin + chunk_bytes])
    assert [bytes(b) for b in buffers] == [DATA[offset : offset + size] for offset, size in wanted]


@given(ranges)
def test_disjoint_ranges_without_gaps_are_fetched_once(wanted: list[tuple[int, int]]):
    offset = 0
    reads = []
    for _, size in wanted:
        reads.append((offset, memoryview(bytearray(size))))
        offset += size
    spans = plan_spans(reads[::-1], span_bytes=1 << 20, gap_bytes=0)
    assert [(span.offset_bytes, span.size_bytes) for span in spans] == ([(0, offset)] if offset else [])
