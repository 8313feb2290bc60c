"""`verify` and `doctor`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rl_ckpt import Checkpointer
from rl_ckpt.cli import doctor, progress
from rl_ckpt.cli.doctor import look_at_store
from rl_ckpt.store.local import LocalStore
from tests.cli.conftest import Cli, save
from tests.s3_servers import S3Server, free_port


def damage(run: Path, step: int) -> Path:
    """Flips a bit of what only that step has."""
    file = next((run / "shards").glob(f"{step}-*/*.arrow"))
    data = bytearray(file.read_bytes())
    at = data.rindex(bytes(4) if step == 0 else _head(step))
    data[at] ^= 1
    file.write_bytes(data)
    return file


def _head(step: int) -> bytes:
    import numpy as np

    return np.full(8, step, np.float32).tobytes()


def test_a_good_run(cli: Cli, run: Path, ids: dict[int, str]) -> None:
    lines = cli("verify", run).stdout.splitlines()
    assert lines[:3] == [f"ok    {ids[step]}  good" for step in (100, 200, 300)]
    assert lines[-1].startswith("all good: 4 chunks in 3 files, 608 bytes in ")
    assert cli("verify", run, "best").stdout.splitlines()[0] == f"ok    {ids[200]}  good"


def test_damage_is_named_with_what_to_do_and_exit_code_1(cli: Cli, run: Path, ids: dict[int, str]) -> None:
    file = damage(run, 200)
    text = cli("verify", run, code=1).stdout
    assert f"fail  {ids[200]}  damaged" in text
    assert f"file:       {file.relative_to(run)}, 32 bytes at " in text
    assert "leaves:     policy/head\n" in text
    assert "what to do: `rl-ckpt verify --repair` looks for other copies\n" in text
    assert "DAMAGED: 4 chunks" in text
    cli("verify", run, 300)
    found = json.loads(cli("verify", run, "--json", code=1).stdout)
    assert (found["ok"], found["report"]["checkpoints"][ids[200]]) == (False, "damaged")
    assert found["report"]["damage"][0]["paths"] == ["policy/head"]


def test_repair(cli: Cli, run: Path, ids: dict[int, str]) -> None:
    manifest = run / "manifests" / f"{ids[300]}.json"
    data = bytearray(manifest.read_bytes())
    data[20] ^= 1
    manifest.write_bytes(data)
    cli("verify", run, code=1)
    text = cli("verify", run, "--repair").stdout
    assert f"ok    {ids[300]}  repaired" in text
    assert "repaired from" in text
    assert "all good now:" in text
    cli("verify", run)


def test_progress_elsewhere_than_on_a_terminal_is_a_line(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("verify", run).stderr == ""
    monkeypatch.setattr(progress, "EVERY_S", 0)
    lines = cli("verify", run).stderr.splitlines()
    assert lines[-1].startswith("verify: 608 bytes of 608 bytes (100 %), ")
    shown = cli("verify", run, env={"FORCE_COLOR": "1"}).stderr
    assert "verify" in shown
    assert "\x1b[" in shown


def states(findings: Any) -> dict[str, str]:
    return {one.name: one.state for one in findings}


def test_doctor_of_a_folder_that_is_not_there_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    new = tmp_path / "deep" / "run"
    text = cli("doctor", new).stdout
    assert "ok    create-only PUT     of 8 writers of one new name exactly one won, 3 times\n" in text
    assert "ok    run                 none yet\n" in text
    assert "0 failures" in text
    assert list(tmp_path.iterdir()) == []


def test_doctor_of_a_run(cli: Cli, run: Path) -> None:
    before = sorted(path for path in run.rglob("*"))
    found = json.loads(cli("doctor", run, "--json").stdout)
    assert found["ok"] is True
    by_name = {one["name"]: one for one in found["findings"]}
    assert by_name["run"]["found"].startswith("3 checkpoints, the newest step 300 of ")
    assert by_name["run"]["found"].endswith("; nobody owns it")
    assert {"versions", "shared memory", "open files", "ports", "write", "read", "delete", "clock"} <= by_name.keys()
    assert sorted(path for path in run.rglob("*")) == before


def test_doctor_of_a_run_that_is_owned_or_damaged(run: Path) -> None:
    with Checkpointer(str(run)) as ckpt:
        ckpt.save_state(400, {}).result()
        owned = [one for one in look_at_store(str(run), {}, True) if one.name == "run"]
        assert "owned by rl-ckpt" in owned[0].found
    record = sorted((run / "commits").iterdir())[-1]
    record.write_bytes(record.read_bytes()[:-9])
    bad = [one for one in look_at_store(str(run), {}, True) if one.name == "run"]
    assert (bad[0].state, bad[0].advice) == ("fail", "`rl-ckpt verify --repair`")


def test_doctor_of_the_machine_alone(cli: Cli) -> None:
    text = cli("doctor").stdout
    assert "ok    versions            rl-ckpt " in text
    assert "no store was looked at" in text
    assert "write" not in text


def test_doctor_that_writes_nothing(run: Path) -> None:
    found = states(look_at_store(str(run), {}, True))
    assert found["write"] == "skip"
    assert "delete" not in found
    assert not (run / "probe").exists()


def test_a_store_that_lets_several_writers_win(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalStore, "create", lambda self, name, data: self.put(name, [data]))
    found = {one.name: one for one in look_at_store(str(run), {}, False)}
    assert found["create-only PUT"].state == "fail"
    assert "8 of 8 writers created the same new object" in found["create-only PUT"].found
    assert found["delete"].state == "ok"


def test_a_store_that_returns_other_bytes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LocalStore.get
    monkeypatch.setattr(
        LocalStore, "get", lambda self, name: real(self, name)[:-1] if "doctor" in name else real(self, name)
    )
    assert states(look_at_store(str(run), {}, False))["read"] == "fail"


@pytest.mark.parametrize(
    ("told", "state", "found"),
    [
        (100.0, "ok", "within 2 s"), (98.0, "ok", "within 2 s"), (102.0, "ok", "within 2 s"),
        (90.0, "warn", "10 s ahead of the store's"), (130.0, "warn", "30 s behind the store's"),
    ],
)  # fmt: skip
def test_a_clock_that_is_wrong(told: float, state: str, found: str) -> None:
    seen = doctor._skew(told, 100.0, 100.1)
    assert seen.state == state
    assert found in seen.found
    assert bool(seen.advice) == (state == "warn")


def test_shared_memory_that_is_small_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._shared_memory(str(tmp_path / "none")).state == "warn"
    monkeypatch.setattr(doctor, "_SHM_BYTES", 1 << 60)
    small = doctor._shared_memory(str(tmp_path))
    assert small.state == "warn"
    assert "--shm-size" in small.advice
    monkeypatch.setattr(doctor, "_SHM_BYTES", 0)
    assert doctor._shared_memory(str(tmp_path)).state == "ok"


def test_a_package_that_is_missing() -> None:
    found = doctor._versions(lambda name: None if name == "xxhash" else "1")
    assert (found.state, "xxhash missing" in found.found, "pip install xxhash" in found.advice) == ("fail", True, True)


def _lines(url: str, options: Mapping[str, Any]) -> dict[str, doctor.Finding]:
    return {one.name: one for one in look_at_store(url, options, False)}


def test_doctor_of_a_bucket(moto_server: S3Server) -> None:
    bucket = moto_server.new_bucket()
    found = _lines(f"s3://{bucket}/run", moto_server.storage_options())
    assert {name for name, one in found.items() if one.state != "ok"} == set()
    assert found["credentials"].found == "access key … from the storage options"
    assert moto_server.endpoint_url in found["endpoint"].found
    assert moto_server.client().list_objects_v2(Bucket=bucket)["KeyCount"] == 0


def test_doctor_without_credentials_or_server_or_bucket(moto_server: S3Server) -> None:
    nobody = _lines("s3://bucket/run", {"endpoint_url": moto_server.endpoint_url})
    assert nobody["credentials"].state == "fail"
    assert "AWS_ACCESS_KEY_ID" in nobody["credentials"].advice
    away = _lines("s3://b/run", {**moto_server.storage_options(), "endpoint_url": f"http://127.0.0.1:{free_port()}"})
    assert "cannot reach the server" in away["list"].found
    assert away["everything else"].state == "skip"
    no_bucket = _lines("s3://no-such-bucket/run", moto_server.storage_options())
    assert "the bucket does not exist" in no_bucket["list"].found
    assert states(look_at_store("s3:///", {}, False)) == {"url": "fail"}


def test_secrets_are_shown_nowhere(monkeypatch: pytest.MonkeyPatch, cli: Cli, moto_server: S3Server) -> None:
    env = {
        **moto_server.environment(),
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "hush-hush",
    }
    shown = cli("doctor", f"s3://{moto_server.new_bucket()}/run", env=env).output
    assert "access key AKIA…LE from env" in shown
    assert "hush" not in shown
    assert "FODNN7" not in shown


def test_a_run_beside_others(cli: Cli, tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 1)
    assert "holds ['a/" in cli("verify", tmp_path, code=3).stderr
