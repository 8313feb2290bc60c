"""What is left in the bucket by a writer that is killed within a multipart upload, and who takes it away, and when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rl_ckpt import Catalog, Checkpointer, LatestN
from rl_ckpt.store import sweep as sweep_module
from rl_ckpt.store.committer import Committer, SaveRequest
from rl_ckpt.store.run import Run
from tests.s3_servers import S3Server
from tests.store.faulty_proxy import Fault, on, run_proxy
from tests.unit.trees import assert_same

SAVE = """
import sys
import numpy as np
from rl_ckpt import Catalog, Checkpointer, LatestN
url, endpoint, key, secret = sys.argv[1:]
options = {"endpoint_url": endpoint, "key": key, "secret": secret}
state = {"w": np.random.default_rng(0).integers(0, 255, 20 << 20, np.uint8)}
Checkpointer(url, storage_options=options, write_streams=1).save_state(2, state).result()
"""


def uploads(server: S3Server, url: str) -> list[str]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    found = server.client().list_multipart_uploads(Bucket=bucket, Prefix=f"{prefix}/")
    return [upload["Key"] for upload in found.get("Uploads", [])]


def state(step: int) -> dict[str, Any]:
    return {"w": np.arange(100) + step, "step": step}


def test_the_upload_of_a_killed_writer_is_aborted_by_the_next(s3_server: S3Server) -> None:
    url = f"s3://{s3_server.new_bucket()}/run"
    options = s3_server.storage_options()
    with Checkpointer(url, storage_options=options) as first:
        first.save_state(1, state(1)).result(60)
    with run_proxy(s3_server) as proxy:
        proxy.faults = [Fault(on("PUT", having="partNumber=2"), hang=True)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", SAVE, url, proxy.url, s3_server.key, s3_server.secret]
        with subprocess.Popen(command, env=environment) as writer:
            while proxy.faults and writer.poll() is None:
                proxy.closing.wait(0.01)
            writer.send_signal(signal.SIGKILL)
    assert len(uploads(s3_server, url)) == 1
    assert_same(Checkpointer(url, storage_options=options).load_state(), state(1))
    if s3_server.name != "moto":  # moto says of every upload that it began in 2010
        with Checkpointer(url, storage_options=options, grace_s=3600) as patient:
            patient.save_state(2, state(2)).result(60)
        assert len(uploads(s3_server, url)) == 1, "younger than the grace time"
    with Checkpointer(url, storage_options=options, grace_s=0) as second:
        second.save_state(3, state(3)).result(60)
    assert uploads(s3_server, url) == []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = [1000.0]
    monkeypatch.setattr(sweep_module, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    return now


def test_a_sweep_leaves_the_uploads_of_saves_under_way_and_takes_the_others(
    moto_server: S3Server, clock: list[float]
) -> None:
    url = f"s3://{moto_server.new_bucket()}/run"
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    committer = Committer(Run.create(url, moto_server.storage_options()), [], 300.0)
    mine = committer.attempt(SaveRequest(1))
    keys = [f"{prefix}/shards/{mine}/a.arrow", f"{prefix}/shards/9-0123456789ab/a.arrow"]
    client = moto_server.client()
    for key in keys:
        client.create_multipart_upload(Bucket=bucket, Key=key)
    committer.tidy()
    assert uploads(moto_server, url) == keys[:1]
    client.create_multipart_upload(Bucket=bucket, Key=keys[1])
    committer.tidy()
    assert len(uploads(moto_server, url)) == 2, "not every sweep looks"
    clock[0] += 301
    committer.tidy()
    assert uploads(moto_server, url) == keys[:1], "the second look comes a grace time after the first"
    committer.abandon(mine)
    committer.tidy()
    assert uploads(moto_server, url) == []


def test_one_who_lost_the_run_aborts_nothing(moto_server: S3Server) -> None:
    url = f"s3://{moto_server.new_bucket()}/run"
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    old = Committer(Run.create(url, moto_server.storage_options()), [], 0.0)
    new = Committer(Run.create(url, moto_server.storage_options()), [], 0.0)
    key = f"{prefix}/shards/{new.attempt(SaveRequest(1))}/a.arrow"
    moto_server.client().create_multipart_upload(Bucket=bucket, Key=key)
    old.tidy()
    assert uploads(moto_server, url) == [key]


def test_a_sweep_by_hand_counts_and_aborts_them(moto_server: S3Server) -> None:
    url, options = f"s3://{moto_server.new_bucket()}/run", moto_server.storage_options()
    with Checkpointer(url, storage_options=options) as ckpt:
        for step in (1, 2):
            ckpt.save_state(step, state(step)).result(60)
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    for key in ("a", "b"):
        moto_server.client().create_multipart_upload(Bucket=bucket, Key=f"{prefix}/shards/9-0123456789ab/{key}.arrow")
    catalog = Catalog(url, storage_options=options)
    dry = catalog.sweep([LatestN(1)], dry_run=True)
    assert (dry.partial_uploads, len(uploads(moto_server, url))) == (2, 2)
    done = catalog.sweep([LatestN(1)], grace_s=0)
    assert (done.partial_uploads, uploads(moto_server, url)) == (2, [])
    assert done.deleted == dry.deleted
    assert (done.files, done.bytes) == (dry.files, dry.bytes)
    assert [info.step for info in catalog.checkpoints()] == [2]
