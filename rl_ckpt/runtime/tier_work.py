"""Tier work: the memory tier in the coordinator: its brain, fed by the cluster, and what its instructions do.

Owns: making tables of parts (in a thread: 100,000 chunks take a while), calls of shard servers about parts, starting
a server on a node without ranks, and taking up what servers hold after the coordinator's restart. Failures here fail no
save.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any

import ray

from rl_ckpt.errors import CheckpointError, CorruptionError, StorageError
from rl_ckpt.plan.parts import Part, Remembered, parts_of
from rl_ckpt.runtime import tier_steps as t
from rl_ckpt.runtime.messages import (
    CopyOrder,
    Failure,
    FoundParts,
    HoldDone,
    HoldOrder,
    Ok,
    RememberOrder,
    decode,
    encode,
)
from rl_ckpt.runtime.save_steps import Save
from rl_ckpt.runtime.server_actor import start_server
from rl_ckpt.runtime.server_calls import Servers
from rl_ckpt.runtime.spec import NAMESPACE, RunSpec
from rl_ckpt.runtime.tier import Tier
from rl_ckpt.runtime.watch import Watch

_TRIES = 5
_RELEASE_TRIES = 120
_ANSWER_S = 300.0  # within which a server makes a copy, or is not waited for any more
_FOUND_S = 60.0  # within which it says what it holds
_WRITTEN_S = 10.0  # within which servers write down what they hold parts of, or others' word is enough
_AGAIN_S = 1.0  # a server that was killed is back after about so long

Tell = Callable[[Iterable[Any]], None]
Lost = Callable[[str, Mapping[str, tuple[str, str]]], None]


class TierWork:
    """See the module. For one event loop.

    Attributes:
        brain: The state machine; whose instructions go to `carry_out`.
    """

    def __init__(self, spec: RunSpec, servers: Servers, tell: Tell, saving: Callable[[], bool], lost: Lost) -> None:
        """Holds nothing.

        Args:
            spec: The run.
            servers: Of the run.
            tell: Takes instructions of the brain, to have them carried out.
            saving: Whether a save or restore is under way.
            lost: Is told of a server whose node is dead, with copies of what it had staged (`Tier.copies`).
        """
        self.brain = Tier(spec.options)
        self.notice = ""
        """What did not fit, for the next save's caller; empty where all did, or it was said before."""
        self._spec = spec
        self._servers = servers
        self._tell = tell
        self._lost = lost
        self._said = ""
        self._unsure: list[str] = []  # servers that may have something of which nobody knows
        self._nodes: dict[str, str] = {}  # by name of the shard server that each has or would have
        self._tasks: set[asyncio.Task[bool]] = set()
        self._adoption: asyncio.Task[None] | None = None
        self.watch = Watch(lambda: saving() or self.brain.busy(), self._seen)

    def configure(self, spec: RunSpec) -> None:
        """Takes a driver's options."""
        self._spec = spec
        self.brain.options = spec.options
        if not spec.options.memory_tier:  # what only memory has stays until the next commit
            self._tell(self.brain.make_room())

    @property
    def spec(self) -> RunSpec:
        """Of the run, with the options of who saves."""
        return self._spec

    def forget(self) -> None:
        """What is held is given up: it is of no use any more."""
        self._tell(self.brain.forget())

    # Events.

    def hold(self, save: Save) -> None:
        """All of a save is staged."""
        assert save.plan is not None
        sizes = save.plan.staged_bytes
        staged = {server: (sizes[server], path) for server, path in save.memory.items()}
        self.brain.begin(save.checkpoint, save.generations[0], staged, save.place)
        make = partial(parts_of, save.plan, save.servers, save.checkpoint, save.found)
        # What was seen last may be old; and an urgent save may be because a node goes away, as of just now.
        look = self.watch.start() or save.request.deadline_s is not None
        self._spawn(self._table(save.checkpoint, make, look))

    async def _table(self, checkpoint: str, make: Callable[[], list[Part]], look: bool) -> None:
        try:
            parts = await asyncio.get_running_loop().run_in_executor(None, make)
        except Exception as error:  # noqa: BLE001 - a bug of ours must not keep the checkpoint unsettled
            text = f"internal error in the coordinator: {type(error).__name__}: {error}"
            self._tell(self.brain.not_tabled(checkpoint, text))
            return
        if look:
            await self.watch.look()
        self._tell(self.brain.tabled(checkpoint, parts))

    def _seen(self, nodes: dict[str, bool]) -> None:
        before, self._nodes = set(self._nodes), {self._spec.server(node): node for node in nodes}
        self._tell(self.brain.servers_are({self._spec.server(node): leaving for node, leaving in nodes.items()}))
        for server in sorted(before - set(self._nodes)):
            self._lost(server, self.brain.copies(server))

    def cannot_land(self, why: str) -> None:
        """Something could not be held; its user is told once of each reason."""
        if self._spec.options.memory_tier and why != self._said:
            self.notice = self._said = why

    def take_notice(self) -> str:
        """What there is to say, once."""
        notice, self.notice = self.notice, ""
        return f"not all is in memory: {notice}" if notice else ""

    def remembered(self, save: Save, record: Any, manifest: bytes, in_store: bool) -> Remembered:
        """A checkpoint, as the brain is told of it."""
        return Remembered(
            save.checkpoint, save.request.step, manifest, record if in_store else None, record.number, True, record.time
        )

    # Instructions.

    def carry_out(self, instruction: t.Instruction) -> None:
        """Does what the brain wants done, but for what saves are to be told."""
        match instruction:
            case t.Hold(server, part, path):
                make = partial(encode, HoldOrder(part, path))
                self._spawn(self._have(part, server, "hold", make))
            case t.Copy(server, part, holder):
                make = partial(encode, CopyOrder(part, holder))
                self._spawn(self._have(part, server, "copy", make, holder))
            case t.Remember():
                self._remembering(instruction)
            case t.Release(server, name):
                self._spawn(self._release(server, name))
            case _:
                raise AssertionError(f"unknown instruction {instruction!r}")

    async def _have(self, part: Part, server: str, method: str, make: Callable[[], bytes], holder: str = "") -> None:
        """Has a server hold a part, and tells the brain what came of it: also where it never answers."""
        limit_s = min(self._spec.options.write_timeout_s, _ANSWER_S)
        try:
            async with asyncio.timeout(limit_s):
                if holder and server in self._nodes:
                    await self.ensure(server)
                done = await self.ask(server, method, make, HoldDone)
        except TimeoutError:
            why = f"shard server {server} did not answer within {limit_s} s"
            self._tell(self.brain.not_held(part.checkpoint, part.name, server, why))
            self._tell([t.Release(server, part.name)])  # it may have it by now, or later, and nobody would know
        except CorruptionError as error:  # the holder's copy is, and not this server's
            self._tell(self.brain.not_held(part.checkpoint, part.name, server, str(error)))
            self._tell(self.brain.bad(holder, part.name, b""))
        except CheckpointError as error:
            self._tell(self.brain.not_held(part.checkpoint, part.name, server, str(error)))
        except Exception as error:  # noqa: BLE001 - a bug of ours must not keep the checkpoint unsettled
            text = f"internal error in the coordinator: {type(error).__name__}: {error}"
            self._tell(self.brain.not_held(part.checkpoint, part.name, server, text))
        else:
            self._tell(self.brain.held(part.checkpoint, part.name, server, done.path))

    async def ensure(self, server: str) -> None:
        """Starts a server where its node has none.

        Raises:
            StorageError: It can't be started; or there is no such node.
        """
        if server not in self._servers.names():
            if server not in self._nodes:
                raise StorageError(f"there is no live node for shard server {server}")
            handle = await asyncio.get_running_loop().run_in_executor(
                None, start_server, self._spec, self._nodes[server]
            )
            try:
                await handle.ready.remote()
            except ray.exceptions.RayError as error:
                raise StorageError(f"no shard server can be started on {server}: {error}") from error
            self._servers.note(server)

    async def _remember(self, server: str, make: Callable[[], bytes]) -> None:
        try:
            await self.ask(server, "remember", make, Ok)
        except CheckpointError:
            await self.watch.look()
            if server in self._nodes:
                raise
            # Else gone with its node, and nobody's loss: the brain has told others.

    async def written_down(self, instructions: list[Any]) -> list[Any]:
        """Has those who hold a checkpoint that is in memory alone write down what it is, before anybody is told of it.

        The coordinator alone knew until then, and its loss would be the checkpoint's.

        Args:
            instructions: On its commit.

        Returns:
            The others of them, once as many have written it down as there are to be copies, or no more will.
        """
        memos = [one for one in instructions if isinstance(one, t.Remember) and one.checkpoint.record is None]
        left = {self._remembering(memo) for memo in memos}
        by, written = asyncio.get_running_loop().time() + _WRITTEN_S, 0
        while left and written <= self._spec.options.replicas:
            wait_s = by - asyncio.get_running_loop().time()
            done, left = await asyncio.wait(left, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            written += sum(task.result() for task in done)
        return [one for one in instructions if one not in memos]

    def _remembering(self, memo: t.Remember) -> asyncio.Task[bool]:
        return self._spawn(self._remember(memo.server, partial(encode, RememberOrder(memo.checkpoint, memo.parts))))

    async def _release(self, server: str, name: str) -> None:
        try:
            # Nobody waits for it, and what is not released stays: so for as long as the server may come back.
            await self._call(server, "release", name, Ok, _RELEASE_TRIES)
        except CheckpointError:
            return  # gone, and its memory with it

    async def ask(self, server: str, method: str, make: Callable[[], bytes], kind: Any) -> Any:
        """Calls a server with a message that is made in a thread; as `_call`."""
        return await self._call(server, method, await asyncio.get_running_loop().run_in_executor(None, make), kind)

    async def _call(self, server: str, method: str, argument: Any, kind: Any, tries: int = _TRIES) -> Any:
        """Calls a server, again where it was killed and comes back.

        Raises:
            CheckpointError: What it answered, or that it is gone.
        """
        for attempt in range(tries):
            try:
                answer = decode(await getattr(self._servers.get(server), method).remote(argument), kind | Failure)
            except ray.exceptions.RayTaskError as error:
                raise CheckpointError(f"internal error in a shard server: {error}") from error
            except ray.exceptions.RayError as error:
                self._servers.look_again()
                self.watch.now()
                await asyncio.sleep(_AGAIN_S)
                if attempt + 1 == tries or (self._nodes and server not in self._nodes):
                    raise StorageError(f"shard server {server} could not be reached: {error}") from error
            else:
                if isinstance(answer, Failure):
                    raise answer.error()
                return answer
        raise AssertionError("unreachable")

    # After the coordinator's restart.

    async def adopted(self) -> None:
        """Returns once it is known what servers of the run hold: at the first call, they are asked."""
        failed = self._adoption is not None and self._adoption.done() and self._adoption.exception() is not None
        if self._adoption is None or failed:  # Ray's head did not answer: it is asked again
            self._adoption = asyncio.get_running_loop().create_task(self._adopt())
        await asyncio.shield(self._adoption)

    async def _adopt(self) -> None:
        if not self._spec.options.memory_tier:
            return
        actors = await asyncio.get_running_loop().run_in_executor(
            None, partial(ray.util.list_named_actors, all_namespaces=True)
        )
        prefix = self._spec.server("")
        names = [a["name"] for a in actors if a["namespace"] == NAMESPACE and a["name"].startswith(prefix)]
        if not names:
            return
        self._unsure = names
        for name in names:
            self._servers.note(name)
        await self.watch.look()
        # Those of nodes that are known to be dead are not asked: Ray may take a while to say so of each.
        there = [name for name in names if not self._nodes or name in self._nodes]
        self._tell(self.brain.adopt(await self._find(there, True)))
        self.watch.start()

    def committed(self) -> None:
        """There is a checkpoint of this coordinator's own: what only the one before it knows of is of no use now.

        A copy that was being made for that one may have been done after `adopted`, and a server may have been away.
        """
        unsure, self._unsure = self._unsure, []
        if unsure:
            self._spawn(self._give_up_unknown(unsure))

    async def _give_up_unknown(self, servers: list[str]) -> None:
        self._tell(self.brain.unknown(await self._find(servers, False)))

    async def _find(self, servers: list[str], adopt: bool) -> dict[str, t.Found]:
        found = await asyncio.gather(*(self._found(server, adopt) for server in servers))
        return {server: one for server, one in zip(servers, found, strict=True) if one is not None}

    async def _found(self, server: str, adopt: bool) -> t.Found | None:
        try:
            async with asyncio.timeout(_FOUND_S):
                found: FoundParts = await self._call(server, "held", adopt, FoundParts)
        except (CheckpointError, TimeoutError):
            return None  # gone, with its memory; or it hangs, and what it has is of no use now
        return t.Found(
            [(held.part, held.path) for held in found.parts], [(memo.done, memo.parts) for memo in found.remembered]
        )

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[bool]:
        """In the background; the task tells whether it succeeded."""

        async def run() -> bool:
            try:
                await work
            except (CheckpointError, ray.exceptions.RayError) as error:
                self.cannot_land(str(error))
                return False
            return True

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
