"""What `top` shows: a run's status as lines. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rl_ckpt.cli.text import ago, count, duration, short, size

if TYPE_CHECKING:
    from rl_ckpt.runtime.status import PrefetchStatus, RestoreStatus, RunStatus, SaveStatus, ServerStatus

_BAR = 20


def status_lines(status: RunStatus) -> list[str]:
    """A run's status for people, a line for each fact."""
    return [f"{name:9} {text}" for name, text in _lines(status)]


def _lines(status: RunStatus) -> Iterator[tuple[str, str]]:
    now = status.time
    yield "run", status.url
    last = status.last
    if last is None:
        yield "last", "no checkpoint yet"
    else:
        many = count(status.checkpoints, "checkpoint")
        yield (
            "last",
            f"step {last.step}, {duration(last.age_s)} ago, {size(last.bytes)} ({last.id}); {many} in the store",
        )
    owner = status.owner
    if owner is None:
        yield "owner", "nobody"
    else:
        late = now - owner.seen > 2 * owner.lease_s
        dead = ": dead, or its clock is wrong" if late else ""
        job = f" for {owner.job}" if owner.job else ""
        yield "owner", f"{owner.by}{job}, since {ago(owner.since, now)}, seen {ago(owner.seen, now)}{dead}"
    if status.service is not None:
        yield from _service(status)
    if status.notice:
        yield "notice", status.notice


def _service(status: RunStatus) -> Iterator[tuple[str, str]]:
    service = status.service
    assert service is not None
    missing = f", {count(service.copies_missing, 'copy', 'copies')} missing" if service.copies_missing else ""
    held = f": {', '.join(service.in_memory)}" if service.in_memory else ""
    yield "memory", f"{size(service.memory_bytes)} in {count(service.memory_parts, 'part')}{missing}{held}"
    for save in service.saves:
        yield "save", _save(save)
    for restore in service.restores:
        yield "restore", _restore(restore)
    if service.prefetch is not None:
        yield "prefetch", _prefetch(service.prefetch)
    if not (service.saves or service.restores):
        yield "now", "nothing under way"
    for server in service.servers:
        yield "server", _server(server)


def _save(save: SaveStatus) -> str:
    staged = f"{_bar(save.bytes_staged, save.bytes)} staged {size(save.bytes_staged)} of {size(save.bytes)}"
    ranks = f"{save.joined} of {save.ranks} ranks joined, {save.staged} staged"
    wrote = f", written {size(save.bytes_written)} of {size(save.bytes_to_write)}" if save.bytes_to_write else ""
    return (
        f"step {save.step}  {save.state} for {duration(save.state_s)}  {ranks}  {staged}{wrote}  "
        f"{duration(save.seconds)} in all"
    )


def _restore(restore: RestoreStatus) -> str:
    step = "?" if restore.step is None else restore.step
    sources = ", ".join(f"{size(held)} from {name}" for name, held in restore.bytes_from.items())
    return (
        f"step {step}  {restore.phase} for {duration(restore.state_s)}  {restore.ready} of {restore.ranks} ranks ready"
        f"{'  ' if sources else ''}{sources}  {duration(restore.seconds)} in all"
    )


def _prefetch(prefetch: PrefetchStatus) -> str:
    what = "under way" if prefetch.under_way else "done"
    progress = f"{_bar(prefetch.bytes_in_memory, prefetch.bytes)} {size(prefetch.bytes_in_memory)}"
    return f"step {prefetch.step}  {what}  {progress} of {size(prefetch.bytes)} in memory"


def _server(server: ServerStatus) -> str:
    if not server.answers:
        return f"{short(server.name)}: does not answer"
    retries = f", {count(server.store_retries, 'retry', 'retries')}" if server.store_retries else ""
    return (
        f"{short(server.name)}: {count(server.parts, 'part')}, {size(server.bytes)}; store read "
        f"{size(server.store_bytes_read)}, written {size(server.store_bytes_written)}{retries}; from peers "
        f"{size(server.bytes_from_peers)}"
    )


def _bar(done: int, total: int) -> str:
    full = min(_BAR, _BAR * done // total) if total else 0
    return f"[{'#' * full}{'.' * (_BAR - full)}]"
