"""When to try again: transient failures only, with jittered exponential backoff inside a deadline.

The policy knows no backend: each one says which of its failures are transient.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from rl_ckpt.errors import InvalidInputError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a store is tried; each field is also a key of `storage_options`."""

    retry_deadline_s: float = 120.0
    """No new try begins later than this after the first one of the same request."""
    retry_throttled_s: float | None = None
    """The same, once the store has asked to slow down (503 SlowDown and the like): it is there, and will be well. None:
    five times `retry_deadline_s`."""
    first_contact_s: float = 8.0
    """The same, while this store has never answered: then a wrong address is likelier than an outage."""
    retry_base_s: float = 0.1
    """Longest wait before the second try; doubles with each further one."""
    retry_cap_s: float = 10.0
    """Longest wait between two tries."""

    @property
    def throttled_s(self) -> float:
        """`retry_throttled_s`, or what stands for it."""
        return 5 * self.retry_deadline_s if self.retry_throttled_s is None else self.retry_throttled_s

    @classmethod
    def take(cls, storage_options: Mapping[str, Any]) -> tuple[RetryPolicy, dict[str, Any]]:
        """Split options into the policy's and the backend's.

        Raises:
            InvalidInputError: A time is not a number of seconds, or is negative.
        """
        rest = dict(storage_options)
        mine = {field.name: rest.pop(field.name) for field in fields(cls) if field.name in rest}
        for key, value in mine.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value < 0:
                raise InvalidInputError(f"storage_options[{key!r}] must be seconds, 0 or more; got {value!r}")
        return cls(**mine), rest


class Tries:
    """The tries of one request: counts them and says how long to wait before the next.

    Args:
        policy: The limits.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._started = time.monotonic()
        self._throttled = False
        self.count = 1

    @property
    def elapsed_s(self) -> float:
        """Seconds since the first try began."""
        return time.monotonic() - self._started

    def next_wait_s(self, *, known: bool = True, throttled: bool = False) -> float | None:
        """Seconds to wait before the next try, which is counted; None when the deadline does not allow one.

        Args:
            known: Whether the store has ever answered; one that has not is given up sooner.
            throttled: Whether the store has just asked to slow down: then the longer deadline holds from here on.
        """
        self._throttled |= throttled
        deadline = self._policy.throttled_s if self._throttled else self._policy.retry_deadline_s
        if not known:
            deadline = min(deadline, self._policy.first_contact_s)
        ceiling = min(self._policy.retry_cap_s, self._policy.retry_base_s * 2.0 ** min(self.count - 1, 30))
        wait = random.uniform(ceiling / 2, ceiling)
        if self.elapsed_s + wait > deadline:
            return None
        self.count += 1
        return wait

    def told(self) -> str:
        """How often and how long it was tried, for messages."""
        return f"{self.count} {'try' if self.count == 1 else 'tries'} in {self.elapsed_s:.1f} s"


def run_with_retries(
    attempt: Callable[[], T],
    tries: Tries,
    *,
    is_transient: Callable[[Exception], bool],
    on_retry: Callable[[], None],
) -> T:
    """Call `attempt` until it succeeds, fails for good, or the deadline has passed; then its last error is raised.

    Args:
        attempt: One try.
        tries: Limits and count; the caller reads the count for its message.
        is_transient: Whether the same call may succeed a moment later.
        on_retry: Called before each further try.
    """
    while True:
        try:
            return attempt()
        except Exception as error:
            wait = tries.next_wait_s() if is_transient(error) else None
            if wait is None:
                raise
        on_retry()
        time.sleep(wait)
