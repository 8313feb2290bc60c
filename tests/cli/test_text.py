"""Words and numbers for people, values for JSON, and what the words of a command mean: all pure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_ckpt.cli.keeping import _best, seconds
from rl_ckpt.cli.moving import _bytes
from rl_ckpt.cli.place import is_local, ref, run_and_refs, run_and_rest, storage_options
from rl_ckpt.cli.text import ago, as_json, clean, count, duration, short, size, spoken, when
from rl_ckpt.errors import InvalidInputError
from rl_ckpt.info import Damage
from rl_ckpt.plan.retention import BestN


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "0.98 KiB"), (1024, "1.00 KiB"),
        (10 << 10, "10.0 KiB"), (212_448, "207 KiB"), (3 << 30, "3.00 GiB"), (1 << 62, "4096 PiB"),
    ],
)  # fmt: skip
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (0.04, "0.0 s"), (9.94, "9.9 s"), (59, "59 s"), (60, "1 min"), (61.4, "1 min 1 s"), (3600, "1 h"),
        (7380, "2 h 3 min"), (86400, "1 d"), (200_000, "2 d 7 h"), (float("inf"), "?"), (float("nan"), "?"),
    ],
)  # fmt: skip
def test_durations(length: float, text: str) -> None:
    assert duration(length) == text


def test_points_in_time() -> None:
    assert when(0) == "1970-01-01T00:00:00Z"
    assert when(1e300) == "1e+300 s"
    assert ago(90, 100) == "10 s ago"
    assert ago(110, 100) == "in 10 s: a clock is wrong"
    assert [count(n, "file") for n in (0, 1, 12_345)] == ["0 files", "1 file", "12 345 files"]


@given(st.text())
def test_what_is_shown_is_one_line_of_printable_text(text: str) -> None:
    shown = clean(text)
    assert shown.isprintable()
    assert text != shown or text.isprintable()
    assert len(short(text, 10)) <= 10


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.sets(st.integers()),
)


@given(_VALUES)
def test_whatever_is_stored_becomes_strict_json(value: Any) -> None:
    json.dumps(as_json(value), allow_nan=False)


def test_values_in_json() -> None:
    damage = Damage("a.arrow", "gone", paths=("w",))
    assert as_json(damage) == {
        "file": "a.arrow", "found": "gone", "expected": "", "offset": None, "bytes": 0, "paths": ["w"],
        "checkpoints": [], "repaired_from": None, "advice": "",
    }  # fmt: skip
    assert as_json({1: np.float32(0.5), "n": [float("nan"), float("inf"), -float("inf")]}) == {
        "1": 0.5, "n": ["NaN", "Infinity", "-Infinity"],
    }  # fmt: skip
    assert as_json((np.int64(3), b"\x01", {2, 1}, True)) == [3, "01", [1, 2], True]
    assert as_json(np.zeros(2)) == "[0. 0.]"


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ("`verify(repair=True)` mends it", "`rl-ckpt verify --repair` mends it"),
        ("check storage_options['endpoint_url']", "check --endpoint-url"),
        ("or storage_options['retry_throttled_s']", "or -o retry_throttled_s=…"),
        ("Pass allow_pickle=True to import", "Give --allow-pickle to import"),
        ("the rules [EveryNSteps(n=7)]; add LatestN(1)", "the rules [--every 7]; add --latest 1"),
    ],
)
def test_what_to_do_is_said_as_it_is_typed(said: str, typed: str) -> None:
    assert spoken(said) == typed


@pytest.mark.parametrize(
    ("default", "words", "url", "rest"),
    [
        (None, ["run", "5"], "run", ["5"]),
        (None, ["run", None], "run", []),
        ("s3://b/r", [], "s3://b/r", []),
        ("s3://b/r", ["5"], "s3://b/r", ["5"]),
        ("s3://b/r", ["best", "shipped"], "s3://b/r", ["best", "shipped"]),
        ("s3://b/r", ["./run", "5"], "./run", ["5"]),
        ("s3://b/r", ["file:///run"], "file:///run", []),
        ("s3://b/r", [".", "latest"], ".", ["latest"]),
    ],
)
def test_which_word_is_the_run(
    default: str | None, words: list[str | None], url: str, rest: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if default is not None:
        monkeypatch.setenv("RL_CKPT_URL", default)
    assert run_and_rest(words) == (url, rest)


def test_words_that_are_missing_or_too_many() -> None:
    with pytest.raises(InvalidInputError, match="which run"):
        run_and_rest([None])
    with pytest.raises(InvalidInputError, match="the NAME is missing"):
        run_and_refs(["run", "5"], ["REF", "the NAME"])
    with pytest.raises(InvalidInputError, match="'6' is too much"):
        run_and_refs(["run", "5", "6"], ["REF"])
    assert run_and_refs(["run"], ["REF"], optional=1) == ("run", [None])


def test_refs() -> None:
    assert [ref(text) for text in ("5", "05", "5-abc", "latest", "٣")] == [5, 5, "5-abc", "latest", "٣"]
    assert [is_local(url) for url in ("run", "/run", "file:///run", "s3://b/run")] == [True, True, True, False]


def test_options_of_the_store() -> None:
    words = ["anon=true", "retry_deadline_s=2.5", "key=1234", "client_kwargs.region_name=eu", 'x={"a": 1}', "y=a=b"]
    assert storage_options(words, "http://s3", "team") == {
        "anon": True, "retry_deadline_s": 2.5, "key": "1234", "client_kwargs": {"region_name": "eu"}, "x": {"a": 1},
        "y": "a=b", "endpoint_url": "http://s3", "profile": "team",
    }  # fmt: skip
    assert storage_options(None, None, None) == {}


@pytest.mark.parametrize("words", [["anon"], ["=true"], ["a=1", "a.b=2"]])
def test_options_that_are_none(words: list[str]) -> None:
    with pytest.raises(InvalidInputError, match="--storage-option"):
        storage_options(words, None, None)


def test_lengths_of_time_rates_and_rules() -> None:
    assert [seconds(text, "--x") for text in ("90", "90s", "10min", "2h", "1.5d", "1w")] == [
        90, 90, 600, 7200, 129_600, 604_800,
    ]  # fmt: skip
    assert [_bytes(text, "--x") for text in ("5", "800k", "50MB", "1GiB", "1.5 MiB")] == [
        5, 800e3, 50e6, 1 << 30, 1.5 * (1 << 20),
    ]  # fmt: skip
    assert [_best(text) for text in ("return", "loss:min", "return:3", "a:b:max:2", "eval:loss:min")] == [
        BestN("return"), BestN("loss", "min"), BestN("return", n=3), BestN("a:b", "max", 2), BestN("eval:loss", "min"),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "x", "5y", "-1s", "1 0s", "h"])
def test_lengths_of_time_that_are_none(text: str) -> None:
    with pytest.raises(InvalidInputError, match="--grace"):
        seconds(text, "--grace")


@pytest.mark.parametrize("text", ["", "0", "fast", "-5MB", "5XB"])
def test_rates_that_are_none(text: str) -> None:
    with pytest.raises(InvalidInputError, match="--limit"):
        _bytes(text, "--limit")


def test_a_folder_named_with_a_tilde_is_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RL_CKPT_URL", "s3://b/r")
    assert run_and_rest(["~/run"]) == ("~/run", [])
    assert run_and_rest([str(Path("a") / "b")]) == ("a/b", [])
