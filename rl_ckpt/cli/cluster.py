"""Connecting to a Ray cluster, for the commands that can use one. Imports Ray only where an address is given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from rl_ckpt.errors import InvalidInputError

Address = Annotated[
    str | None,
    typer.Option(envvar="RAY_ADDRESS", metavar="ADDRESS", help="Of the Ray cluster; 'auto': this machine's."),
]


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Is connected to a Ray cluster for the time of the block, where there is an address.

    Raises:
        InvalidInputError: There is no cluster.
    """
    if address is None:
        yield
        return
    import logging

    import ray

    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"no Ray cluster at {address!r}: {str(error).strip().splitlines()[0]}. Give the address that `ray status` "
            "shows, or leave --address and $RAY_ADDRESS out to do without a cluster"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
