"""Paths are unique and reversible, and selectors choose what their patterns say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ckpt.state.paths import Selector, above, escape, join, literal, parents, renamed, split, unescape
from tests.unit.trees import keys

any_keys = st.lists(keys, min_size=1, max_size=5).map(tuple)


def path_of(parts: tuple[str | int, ...]) -> str:
    path = ""
    for key in parts:
        path = join(path, key)
    return path


@settings(deadline=None)
@given(keys)
def test_a_component_gives_its_key_back(key: str | int) -> None:
    back = unescape(escape(key))
    assert (type(back), back) == (type(key), key)
    assert escape(key)
    assert "/" not in escape(key)


@settings(deadline=None)
@given(any_keys, any_keys)
def test_paths_are_unique_and_split_into_their_keys(one: tuple[str | int, ...], other: tuple[str | int, ...]) -> None:
    assert [(type(k), k) for k in split(path_of(one))] == [(type(k), k) for k in one]
    assert (path_of(one) == path_of(other)) == (list(map(repr, one)) == list(map(repr, other)))


@settings(deadline=None)
@given(any_keys)
def test_parents_are_all_containers_from_the_root(parts: tuple[str | int, ...]) -> None:
    assert parents(path_of(parts)) == [path_of(parts[:i]) for i in range(len(parts))]


@given(st.lists(st.lists(st.sampled_from(["a", "b", 0, ""]), max_size=4), max_size=6))
def test_above_many_paths_are_the_parents_of_each(keys: list[list[str | int]]) -> None:
    paths = [path_of(tuple(each)) for each in keys]
    assert above(paths) == {parent for path in paths for parent in parents(path)}


def test_the_root_has_no_parents() -> None:
    assert parents("") == []
    assert split("") == ()


@pytest.mark.parametrize(
    ("patterns", "taken", "left"),
    [
        (None, ["a", "a/b", ""], []),
        ("a", ["a", "a/b", "a/b/c"], ["ab", "b/a"]),
        ("a/*", ["a/b", "a/b/c"], ["a", "b"]),
        ("*/w", ["a/w", "a/w/0"], ["w", "a/b/w"]),
        ("**/w", ["a/w", "a/b/w"], ["w", "a/wx"]),
        ("l?y", ["lay", "lay/0"], ["ly", "l/y"]),
        ("[ab]", ["a", "b/c"], ["c"]),
        ("[!ab]", ["c"], ["a", "b"]),
        (["a", "!a/b"], ["a/c"], ["a/b", "a/b/c", "d"]),
        ("!opt", ["a", "x/opt"], ["opt", "opt/m"]),
        (["!a", "!b"], ["c"], ["a", "b/c"]),
        ("a.b", ["a.b"], ["axb"]),
        ("[", ["["], ["a"]),
    ],
)
def test_selectors(patterns: str | list[str] | None, taken: list[str], left: list[str]) -> None:
    chosen = Selector(patterns)
    assert [p for p in [*taken, *left] if chosen(p)] == taken


@given(st.lists(st.one_of(keys, st.text("*?[]!^\\ab/", min_size=1)), min_size=1, max_size=3).map(tuple))
def test_a_literal_chooses_its_path_and_what_is_below_it_alone(parts: tuple[str | int, ...]) -> None:
    path = path_of(parts)
    chosen = Selector([literal(path)])
    assert chosen(path)
    assert chosen(f"{path}/x")
    assert not chosen(f"{path}x")
    assert not chosen(f"x{path}")
    for char in "*?[":
        assert char not in path or not chosen(path.replace(char, "x"))


@pytest.mark.parametrize(
    ("path", "rename", "becomes"),
    [
        ("a/w", {"a": "b"}, "b/w"),
        ("a/w", {"a": "b", "a/w": "c/v"}, "c/v"),
        ("a/b/c", {"a": "x", "a/b": "y"}, "y/c"),
        ("ab/w", {"a": "b"}, "ab/w"),
        ("a/w", {"": "top"}, "top/a/w"),
        ("a/w", {"a": ""}, "w"),
    ],
)
def test_the_longest_prefix_is_renamed(path: str, rename: dict[str, str], becomes: str) -> None:
    assert renamed(path, rename) == becomes
