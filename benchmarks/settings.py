"""Sizes of a run. The defaults fit a machine of 4 cores and 24 GB and twenty minutes; `quick` is for tests."""

from __future__ import annotations

from dataclasses import asdict, dataclass

WARM_UP = 3
"""Rounds that don't count: the first saves start actors and allocate three generations of staging memory."""


@dataclass(frozen=True)
class Settings:
    """All sizes in MiB."""

    workers: int = 4
    many_workers: int = 8
    mib: int = 128
    """State of each worker, local disk."""
    many_mib: int = 64
    """State of each worker where there are `many_workers`."""
    s3_mib: int = 32
    """State of each worker, S3."""
    rounds: int = 7
    """Beside the warm-up."""
    frozen_mib: int = 512
    """Largest broadcast object."""
    leaves: int = 100_000
    """Of the state with many small arrays."""
    small_mib: int = 96
    """All of them together, and the one array they are compared with."""
    starts: int = 5
    """Fresh processes for an import; fresh runs for a first save."""

    def as_dict(self) -> dict[str, int]:
        """For the record of a run."""
        return asdict(self)


QUICK = Settings(
    workers=2, many_workers=2, mib=1, many_mib=1, s3_mib=1, rounds=2, frozen_mib=2, leaves=200, small_mib=1, starts=1
)
"""Tiny: shows that everything runs, measures nothing."""
