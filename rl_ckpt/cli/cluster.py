"""Connecting to a Ray cluster, for the commands that can use one. Imports Ray only where an address is given."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Annotated

import typer

from rl_ckpt.errors import InvalidInputError

_REACH_S = 5.0

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

    if ray.is_initialized():  # whoever runs a command in a process of his own cluster's
        yield
        return
    _check_reached(address)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _nobody(address, str(error).strip().splitlines()[0]) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reached(address: str) -> None:
    """Fails at once where nothing listens, for which Ray takes a minute.

    Raises:
        InvalidInputError: Nothing does.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
    except (OSError, OverflowError) as error:
        raise _nobody(address, str(error)) from error


def _nobody(address: str, why: str) -> InvalidInputError:
    return InvalidInputError(
        f"no Ray cluster at {address!r}: {why.rstrip('.')}. Start one (`ray start --head`), or give its head's "
        "address, such as 10.0.0.1:6379, with --address or in $RAY_ADDRESS"
    )
