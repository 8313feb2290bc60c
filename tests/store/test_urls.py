"""Which store a url means, and what is said about urls that mean none."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.store.local import LocalStore
from rl_ckpt.store.memory import MemoryStore
from rl_ckpt.store.s3 import S3Store
from rl_ckpt.store.urls import normalise_url, open_store


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("/abs/path/", "file:///abs/path"),
        ("/abs//x/../path", "file:///abs/path"),
        ("file:///abs/path/", "file:///abs/path"),
        ("file://localhost/abs/path", "file:///abs/path"),
        ("local:///abs/path", "file:///abs/path"),
        ("/with space/ä#?", "file:///with space/ä#?"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3a://bucket//a///b", "s3://bucket/a/b"),
        ("S3://bucket", "s3://bucket"),
        ("memory://x/", "memory://x"),
        ("memory:///x", "memory://x"),
        ("gs://bucket/run/", "gs://bucket/run"),
    ],
)
def test_normalised(url: str, normal: str):
    assert normalise_url(url) == normal
    assert normalise_url(normal) == normal


def test_relative_paths_and_home_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert normalise_url("runs/7") == f"file://{tmp_path}/runs/7"
    assert normalise_url(Path("runs")) == f"file://{tmp_path}/runs"
    assert normalise_url("~/runs") == "file:///home/somebody/runs"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "not empty"),
        ("  ", "not empty"),
        ("s3://", "names no place"),
        ("s3:///", "names no place"),
        ("file://host/path", "three slashes"),
        ("file://relative", "three slashes"),
        ("s3:/bucket/x", "write s3://bucket/x, or ./s3:/bucket/x"),
        (Path("s3a://bucket/x"), "lacks a slash"),  # type: ignore[list-item]  # a Path takes one away
        ("s3://key:topsecret@bucket/x", "credentials"),
        ("gs://user:topsecret@bucket/x", "credentials"),
        ("s3://bucket/x?versionId=1", "no '\\?'"),
        ("simplecache::s3://bucket/x", "chains"),
        ("nosuch://x/y", "unknown scheme 'nosuch'.*s3://"),
        ("gs://bucket/x", "not installed: .*gcsfs"),
    ],
)
def test_refused(url: str, said: str):
    with pytest.raises(InvalidInputError, match=said) as told:
        open_store(url)
    assert "topsecret" not in str(told.value)


def test_backends(tmp_path: Path):
    assert isinstance(open_store(tmp_path), LocalStore)
    assert isinstance(open_store("memory://x"), MemoryStore)
    assert isinstance(open_store("s3a://bucket/x"), S3Store)
