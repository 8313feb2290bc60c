"""Which store a url means."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import fsspec
from fsspec.registry import known_implementations

from rl_ckpt.errors import InvalidInputError
from rl_ckpt.store.base import StorageOptions, Store
from rl_ckpt.store.generic import FsspecStore
from rl_ckpt.store.local import LocalStore
from rl_ckpt.store.memory import MemoryStore

BASE_OPTIONS = "bases"
"""Among the storage options: those for the runs that this one was forked from, where they need others than its own."""

_SUPPORTED = (
    "a local path, file://, s3://, memory:// (tests), or another scheme of fsspec such as gs://, abfs://, hdfs://"
)


def normalise_url(url: str | os.PathLike[str]) -> str:
    """One spelling per place: absolute, with a scheme, without a trailing slash.

    Args:
        url: A local path (relative to the current folder, or with `~`) or a url.

    Raises:
        InvalidInputError: It is empty, names no place, or carries credentials, a query or several schemes.
    """
    text = os.fspath(url) if isinstance(url, os.PathLike) else url
    if not isinstance(text, str) or not text.strip():
        raise InvalidInputError(f"the url of a run must be text that is not empty, got {text!r}: give {_SUPPORTED}")
    if "://" not in text:
        _refuse_half_a_scheme(text)
        return "file://" + os.path.abspath(os.path.expanduser(text))
    scheme, _, rest = text.partition("://")
    scheme = {"s3a": "s3", "local": "file"}.get(scheme.lower(), scheme.lower())
    if "::" in text:
        raise InvalidInputError(f"{text!r} chains several file systems; give the plain url of one place")
    if scheme == "file":
        return "file://" + _local_path(text, rest)
    _refuse_secrets(scheme, rest)
    path = "/".join(part for part in rest.split("/") if part)
    if not path:
        raise InvalidInputError(f"{text!r} names no place: add a bucket or folder, as in {scheme}://bucket/run-7")
    return f"{scheme}://{path}"


def check_url(url: str | os.PathLike[str]) -> str:
    """The normalised url, once it is known that there is a file system for it. Nothing is opened.

    Raises:
        InvalidInputError: The url is not usable, the scheme is unknown, or a package is missing for it.
    """
    normal = normalise_url(url)
    scheme = normal.partition("://")[0]
    if scheme not in ("file", "memory", "s3"):
        _require_backend(normal, scheme)
    return normal


def open_store(url: str | os.PathLike[str], storage_options: StorageOptions | None = None) -> Store:
    """The store for a run's url. Nothing is read or written yet.

    Args:
        url: A local path or a url; see `normalise_url`.
        storage_options: What fsspec's file system for that scheme takes (for s3, s3fs: `key`, `secret`, `endpoint_url`,
            `profile`, `client_kwargs` …), and the fields of `RetryPolicy`, in seconds. What is not given, S3 takes from
            the environment and the AWS configuration files.

    Raises:
        InvalidInputError: The url or an option is not usable, the scheme is unknown, or a package is missing for it.
    """
    normal = check_url(url)
    scheme = normal.partition("://")[0]
    if storage_options is not None and BASE_OPTIONS in storage_options:
        storage_options = {key: value for key, value in storage_options.items() if key != BASE_OPTIONS}
    if scheme == "file":
        return LocalStore(normal, storage_options)
    if scheme == "memory":
        return MemoryStore(normal, storage_options)
    if scheme == "s3":
        from rl_ckpt.store.s3 import S3Store  # brings botocore along, which takes half a second to import

        return S3Store(normal, storage_options)
    return FsspecStore(normal, storage_options)


def _refuse_half_a_scheme(text: str) -> None:
    """s3:/bucket/run-7 is a url that lacks a slash: as a folder it would take what was meant for the bucket."""
    scheme, colon, rest = text.partition(":/")
    if colon and scheme.lower() in {*known_implementations, "s3a"}:
        raise InvalidInputError(
            f"{text!r} lacks a slash: write {scheme}://{rest}, or ./{text} if a folder of that name is meant"
        )


def _local_path(text: str, rest: str) -> str:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise InvalidInputError(f"{text!r} is not a local path: write file:///absolute/path, with three slashes")
    return os.path.abspath("/" + path)


def _refuse_secrets(scheme: str, rest: str) -> None:
    parts = urlsplit(f"{scheme}://{rest}")
    if parts.password is not None or (scheme == "s3" and "@" in parts.netloc):
        raise InvalidInputError(
            f"the url {scheme}://… carries credentials, which would end up in logs and records: "
            "give them in storage_options or the environment"
        )
    if scheme == "s3" and ("?" in rest or "#" in rest):
        raise InvalidInputError(f"{scheme}://{rest}: a run's url has no '?' or '#'")


def _require_backend(url: str, scheme: str) -> None:
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        hint = known_implementations.get(scheme, {}).get("err", str(error))
        raise InvalidInputError(f"{url} needs a package that is not installed: {hint}") from error
    except ValueError as error:
        raise InvalidInputError(f"{url}: unknown scheme {scheme!r}. Give {_SUPPORTED}") from error
