"""After everything was killed and a new job has come and gone: no trace is left on the machine or in the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from rl_ckpt import Checkpointer, LatestN
from rl_ckpt.format import records
from rl_ckpt.runtime.spec import NAMESPACE
from rl_ckpt.store.run import Run
from tests.ray.holders import give, on_nodes, several_nodes, shared_memory, spec_of
from tests.s3_servers import S3Server
from tests.soak.arena import arena


def named_by_commits(run: Run) -> set[str]:
    """Every object that a run may hold once it is swept."""
    out = {records.RUN_FILE}
    log = run.log.read()
    for commit in log.commits:
        out |= {records.manifest_name(commit.id), *(file.name for file in run.manifest(commit).files)}
    return out


def objects(run: Run) -> set[str]:
    """Every object but the log's records, which the newest epoch needs."""
    return {item.name for item in run.store.list("") if not item.name.startswith(records.COMMITS)}


def kill_everything(url: str, storage_options: dict[str, Any], after: int) -> list[psutil.Process]:
    """A job saves `after` times, and is killed with all of its cluster as it writes the next save.

    Returns:
        What was killed.
    """
    with arena(2) as ground:
        ground.start_driver(url=url, storage_options=storage_options, seed=3, options={})
        committed = 0
        while True:
            event = ground.events.get(timeout=60)
            committed += event["event"] == "committed"
            if committed >= after and event["event"] == "staged":
                return ground.kill_all()


@pytest.mark.parametrize("store", ["local", pytest.param("s3", marks=pytest.mark.soak)])
def test_nothing_is_left_after_kill_9_of_everything_and_a_new_start(
    store: str, tmp_path: Path, moto_server: S3Server
) -> None:
    url, options = str(tmp_path / "run"), dict[str, Any]()
    if store == "s3":
        url, options = f"s3://{moto_server.new_bucket()}/run", moto_server.storage_options()
    killed = kill_everything(url, options, after=2)
    assert not [process for process in killed if process.is_running()]
    newest = Checkpointer(url, storage_options=options).latest()
    assert newest is not None
    with several_nodes(2):
        ckpt = Checkpointer(url, storage_options=options, keep=[LatestN(1)], grace_s=0)
        workers = on_nodes(2)
        give(workers, [{"step": 1, "own": rank} for rank in range(2)])
        memory = spec_of(ckpt).server("")  # of this run, on any node of any cluster: others may be at work here
        for step in (newest.step + 1, newest.step + 2):
            ckpt.save(step, workers).result(60)
        ckpt.close()
        assert [
            actor for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE
        ] == []
        assert {name for name in shared_memory() if name.startswith(memory)} == set()
    run = Run.open(url, options)
    assert objects(run) == named_by_commits(run)
    _no_half_objects(store, url, tmp_path, moto_server)


def _no_half_objects(store: str, url: str, tmp_path: Path, server: S3Server) -> None:
    if store == "local":
        names = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
        assert names == {item.name for item in Run.open(url).store.list("")}  # no temporary file
    else:
        bucket = url.removeprefix("s3://").split("/")[0]
        assert server.client().list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []
