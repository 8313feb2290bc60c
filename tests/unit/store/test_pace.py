"""How many requests go at once when a server asks to slow down."""

from __future__ import annotations

import asyncio
import math

from rl_ckpt.store.pace import Pace


async def _requests(pace: Pace, count: int, refuse: int) -> tuple[list[float], int]:
    """Runs requests that all meet, of which the first `refuse` are refused; limits after each, and most at once."""
    limits: list[float] = []
    running = most = done = 0

    async def one() -> None:
        nonlocal running, most, done
        async with pace.turn() as began:
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            done += 1
            if done <= refuse:
                pace.slow_down(began)
            else:
                pace.went_well()
            limits.append(pace.limit)

    await asyncio.gather(*(one() for _ in range(count)))
    return limits, most


def test_without_complaints_there_is_no_limit() -> None:
    assert asyncio.run(_requests(Pace(), 100, 0)) == ([math.inf] * 100, 100)


def test_complaints_of_one_moment_halve_once_and_success_brings_it_back() -> None:
    async def scenario() -> None:
        pace = Pace()
        limits, _ = await _requests(pace, 16, 16)
        assert limits == [8.0] * 16
        limits, most = await _requests(pace, 40, 0)
        assert most <= 12
        assert 8 < limits[-1] < 13
        for _ in range(30):
            limits, most = await _requests(pace, 100, 0)
        assert limits[-1] == math.inf
        assert most == 100

    asyncio.run(scenario())


def test_one_request_always_goes_and_a_cancelled_one_gives_its_place_on() -> None:
    async def scenario() -> None:
        pace = Pace()
        for _ in range(5):
            await _requests(pace, 1, 1)
        assert pace.limit == 1
        async with pace.turn():
            waiting = [asyncio.ensure_future(_requests(pace, 1, 0)) for _ in range(3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            await asyncio.sleep(0)
        waiting[1].cancel()  # it was just woken
        await asyncio.wait_for(waiting[2], 10)
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(scenario())
