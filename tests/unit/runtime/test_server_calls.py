"""The coordinator's calls of shard servers, with servers that answer when a test lets them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray

from rl_ckpt.errors import StorageError
from rl_ckpt.format.digest import digest
from rl_ckpt.plan.parts import Held
from rl_ckpt.runtime.server_calls import Servers


def test_what_a_server_was_told_to_forget_is_waited_for_and_only_that_servers() -> None:
    async def run() -> None:
        servers, answers, told = Servers(), dict[str, asyncio.Future[None]](), list[str]()

        def forget(name: str) -> Any:
            def remote(key: str) -> asyncio.Future[None]:
                told.append(key)
                return answers.setdefault(f"{name}/{key}", asyncio.get_running_loop().create_future())

            return SimpleNamespace(forget=SimpleNamespace(remote=remote))

        servers._handles = {"a": forget("a"), "b": forget("b")}
        servers.forget(["a"], ["r#1", "r#1+1"])
        await servers.forgotten("b")
        waiting = asyncio.create_task(servers.forgotten("a"))
        await asyncio.sleep(0)
        answers["a/r#1"].set_result(None)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        answers["a/r#1+1"].set_exception(ray.exceptions.RayError("the node is dead"))
        await waiting
        await servers.forgotten("a")
        assert told == ["r#1", "r#1+1"]

    asyncio.run(run())


def test_a_held_chunk_is_taken_from_the_first_holder_that_gives_it_as_it_was_committed() -> None:
    good = bytes(range(100))

    async def serve(part: str, ranges: list[tuple[int, int]], _: float) -> list[Any]:
        ((offset, size),) = ranges
        return [np.frombuffer(good if part == "good" else bytes(100), np.uint8)[offset : offset + size]]

    async def run() -> None:
        servers = Servers()
        servers._handles = {"here": SimpleNamespace(serve=SimpleNamespace(remote=serve))}

        def gone(name: str) -> Any:
            if name == "gone":
                raise StorageError(f"{name} is gone")
            return servers._handles[name]

        servers.get = gone  # type: ignore[method-assign]
        copies = [Held("gone", "good", "", 10), Held("here", "bad", "", 10), Held("here", "good", "", 10)]
        assert await servers.held_chunk(copies, digest(good[10:30]), 20) == good[10:30]
        assert await servers.held_chunk(copies[:2], digest(good[10:30]), 20) is None

    asyncio.run(run())
