"""What a server may say about the range that it sends: without a server."""

from __future__ import annotations

from typing import Any

import pytest

from rl_ckpt.errors import CorruptionError
from rl_ckpt.store.ranges import Span
from rl_ckpt.store.s3 import S3Store
from rl_ckpt.store.s3_errors import WrongAnswerError


@pytest.fixture
def store() -> S3Store:
    return S3Store("s3://bucket/run", {"key": "k", "secret": "s"})


SPAN = Span(100, 100, ())


@pytest.mark.parametrize("length", [{"ContentLength": 100}, {}], ids=["length", "chunked"])
@pytest.mark.parametrize("size", ["5000", "200", "*"])
def test_the_range_that_was_asked_for_is_taken(store: S3Store, length: dict[str, Any], size: str) -> None:
    store._check_range("a", SPAN, {"ContentRange": f"bytes 100-199/{size}", **length})


def test_an_object_that_is_too_short_is_damaged(store: S3Store) -> None:
    with pytest.raises(CorruptionError, match="150"):
        store._check_range("a", SPAN, {"ContentRange": "bytes 100-149/150", "ContentLength": 50})


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param({"ContentLength": 100}, id="all of it"),
        pytest.param({}, id="nothing said"),
        pytest.param({"ContentRange": "bytes 0-99/5000", "ContentLength": 100}, id="another range, same size"),
        pytest.param({"ContentRange": "bytes 0-99/5000"}, id="another range, no length"),
        pytest.param({"ContentRange": "bytes 100-149/*", "ContentLength": 50}, id="less, of an unknown size"),
        pytest.param({"ContentRange": "bytes 100-149/5000", "ContentLength": 50}, id="less than there is"),
        pytest.param({"ContentRange": "bytes 100-199/5000", "ContentLength": 5000}, id="length of another answer"),
        pytest.param({"ContentRange": "nonsense", "ContentLength": 100}, id="nonsense"),
    ],
)
def test_any_other_answer_is_a_failure_of_the_server(store: S3Store, answer: dict[str, Any]) -> None:
    with pytest.raises(WrongAnswerError, match=r"asked for|ignores ranges"):
        store._check_range("a", SPAN, answer)
