"""Generations: the two halves of staging memory, and who has them; with a memory tier there is a third.

Owns: which generation is free, held by a save or by the tier, being made, or promised to the next save of a standing
plan; and which file it is on each shard server. Pure. Promises: a file in which a rank may still write, unasked, is
never given to another save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rl_ckpt.options import Options

GENERATIONS = 2
"""Saves that may have memory at a time."""


def generations(options: Options) -> int:
    """How many there are: one more for the checkpoint that the tier holds."""
    return GENERATIONS + options.memory_tier


@dataclass(frozen=True, slots=True)
class StagingFile:
    """A generation's file on one shard server."""

    bytes: int
    path: str


@dataclass(slots=True)
class Generations:
    """See the module."""

    number: int = GENERATIONS
    _free: list[int] = field(default_factory=list)
    _promised: dict[int, str] = field(default_factory=dict)
    """Generation → id of the standing plan whose ranks may write into it as soon as they begin their next save."""
    _files: dict[tuple[str, int], StagingFile] = field(default_factory=dict)
    """By shard server and generation."""

    _all: set[int] = field(default_factory=set)
    """That there are: free, promised or held; one too many may be held yet."""

    def __post_init__(self) -> None:
        """All are free."""
        self._free = list(range(self.number))
        self._all = set(self._free)

    def any(self) -> bool:
        """Whether `take` would give one."""
        return bool(self._free or self._promised)

    def take(self, plan: str, sizes: Mapping[str, int]) -> int:
        """Gives a generation to a save of `plan` that stages `sizes` bytes by shard server.

        The one promised to it, else a free one, if there is one then with memory, else another plan's.
        """
        for generation, promised in self._promised.items():
            if promised == plan:
                del self._promised[generation]
                return generation
        if self._free:
            best = min(self._free, key=lambda generation: bool(self.missing(generation, sizes)))
            self._free.remove(best)
            return best
        generation = next(iter(self._promised))
        self.revoke()
        self._free.remove(generation)
        return generation

    def take_free(self, most: int = GENERATIONS) -> list[int]:
        """Gives what is free, at most so many."""
        taken, self._free = self._free[:most], self._free[most:]
        return taken

    def resize(self, number: int) -> None:
        """There are to be so many from now on; one too many that is not free goes when it is given back."""
        self._all -= {generation for generation in self._free if generation >= number}
        new = [generation for generation in range(number) if generation not in self._all]
        self._free = [generation for generation in self._free if generation < number] + new
        self._all.update(new)
        self.number = number
        for generation in [one for one in self._promised if one >= number]:
            self._end(generation)

    def _end(self, generation: int) -> None:
        """There is no such one any more."""
        self._promised.pop(generation, None)
        self.drop(generation)
        self._all.discard(generation)

    def give_back(self, generation: int) -> None:
        """A save is done with it."""
        if generation < self.number:
            self._free.append(generation)
        else:
            self._end(generation)

    def promise(self, plan: str, sizes: Mapping[str, int]) -> dict[str, str]:
        """Promises a free generation to the next save of `plan`.

        Args:
            plan: Of the standing plan.
            sizes: Bytes that it stages, by shard server.

        Returns:
            Its file by shard server; empty where none is free or large enough.
        """
        if plan in self._promised.values():
            return {}
        fits = (g for g in self._free if not self.missing(g, sizes))
        generation = next(fits, None)
        if generation is None or not sizes:
            return {}
        self._free.remove(generation)
        self._promised[generation] = plan
        return {server: self._files[server, generation].path for server in sizes}

    def promise_again(self, generation: int, plan: str) -> None:
        """A save that took what was promised to it gives it up while its ranks may be writing there."""
        if generation < self.number:
            self._promised[generation] = plan
        else:
            self._end(generation)

    def revoke(self, holds: Mapping[str, str] | None = None) -> None:
        """Takes all promises back.

        Args:
            holds: Files, by shard server, of which it is known that no rank writes in them any more.
        """
        for generation in list(self._promised):
            del self._promised[generation]
            self._free.append(generation)
            files = {server: file.path for (server, g), file in self._files.items() if g == generation}
            if holds is None or any(holds.get(server) != path for server, path in files.items()):
                self.drop(generation)

    def drop(self, generation: int) -> None:
        """Forgets a generation's files: who still writes there writes where nobody looks."""
        self._files = {key: file for key, file in self._files.items() if key[1] != generation}

    def drop_free(self) -> None:
        """Forgets the files of generations that no save holds and nobody may write to."""
        for generation in self._free:
            self.drop(generation)

    def lose(self, server: str) -> None:
        """Forgets the files of a shard server that is gone."""
        self._files = {key: file for key, file in self._files.items() if key[0] != server}

    def missing(self, generation: int, sizes: Mapping[str, int]) -> list[str]:
        """Shard servers that have no file of at least so many bytes for it."""
        none = StagingFile(-1, "")
        return [server for server, size in sizes.items() if self._files.get((server, generation), none).bytes < size]

    def making(self, server: str, generation: int, size: int) -> int:
        """A server is about to make a file, in place of the one it has.

        Returns:
            How many bytes to ask for: some more than needed where it grew (a replay buffer that fills), so that not
            every save pays for new memory.
        """
        return size + size // 4 if self._files.pop((server, generation), None) else size

    def made(self, server: str, generation: int, file: StagingFile) -> None:
        """A server has made a file."""
        self._files[server, generation] = file

    def path(self, server: str, generation: int) -> str:
        """Of the file; empty where there is none."""
        file = self._files.get((server, generation))
        return file.path if file else ""
