"""docker-compose.yml and the images, as far as can be checked where no container engine is: they were never run."""

from __future__ import annotations

import fnmatch
import ipaddress
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.local import BUCKET
from rl_ckpt.demo.__main__ import _parser
from tests.cluster.files import (
    CLUSTER,
    PINNED,
    ROOT,
    images,
    ray_start_commands,
    ray_start_options,
    run_with_stand_ins,
    words,
)

COMPOSE = ROOT / "docker-compose.yml"
IMAGES = sorted(CLUSTER.glob("*Dockerfile"))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return made


def test_the_schema_of_compose_files_holds() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_that_a_service_names_is_there(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        assert set(service.get("networks", {})) <= set(compose["networks"]), name
        assert {config["source"] for config in service.get("configs", [])} <= set(compose["configs"]), name
        for other, wanted in service.get("depends_on", {}).items():
            assert other in services, f"{name} waits for {other}"
            if wanted["condition"] == "service_healthy":
                assert "healthcheck" in services[other], f"{name} waits for the health of {other}, which has no check"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            exists = (ROOT / source).exists() if source.startswith(".") else source in compose["volumes"]
            assert exists, f"{name} mounts {source}"
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_every_service_is_pinned_bounded_watched_and_open_to_this_machine_alone(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert PINNED.match(service["image"]), f"{name}: {service['image']}"
        assert {"cpus", "memory"} <= set(service["deploy"]["resources"]["limits"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        if name not in {"bucket", "job"}:  # these end
            assert "test" in service["healthcheck"], name
            assert service["restart"] == "unless-stopped", name


def test_the_nodes_can_stage_save_before_they_go_and_lose_their_head(compose: dict[str, Any]) -> None:
    for name in ("head", "worker", "job"):
        service = compose["services"][name]
        assert service["shm_size"] == "2gb", name
        assert service["stop_grace_period"] == "60s", name  # Ray drains for 30 s
        assert service["environment"]["RAY_AUTH_MODE"] == "token", name
    head, worker = (compose["services"][name] for name in ("head", "worker"))
    assert head["environment"]["RAY_REDIS_ADDRESS"] == "valkey:6379"
    (pool,) = compose["networks"]["cluster"]["ipam"]["config"]
    address = ipaddress.ip_address(head["networks"]["cluster"]["ipv4_address"])
    assert address in ipaddress.ip_network(pool["subnet"])
    assert address not in ipaddress.ip_network(pool["ip_range"])  # nobody gets it while the head is away
    assert "--num-cpus=0" in " ".join(words(head["command"]))
    assert worker["deploy"]["replicas"] >= 3  # one may go, and there still is somewhere for replicas


def test_ray_here_knows_every_option_that_it_is_started_with(compose: dict[str, Any]) -> None:
    commands = ray_start_commands(compose["services"])
    assert len(commands) == 3  # head, worker, job
    for options in commands:
        assert set(options) <= ray_start_options()
        assert "--metrics-export-port" in options


def test_the_one_command_is_the_demo_as_it_is(compose: dict[str, Any]) -> None:
    (line,) = [word for word in compose["services"]["job"]["command"] if "rl_ckpt.demo" in word]
    arguments = re.sub(r'"|\$\$\(.*?\)', "", line).partition("rl_ckpt.demo ")[2].split()
    args = _parser().parse_args(arguments)
    assert args.address == "auto"
    assert args.url.startswith(f"s3://{BUCKET}/")
    assert compose["services"]["bucket"]["command"][-1] == BUCKET


def test_the_shells_in_containers_start_what_they_should(compose: dict[str, Any], tmp_path: Path) -> None:
    services = compose["services"]
    secret = "a 'b\" $c"
    variables = {"VALKEY_PASSWORD": secret}
    programs = ["ray", "valkey-server", "python"]

    def calls(name: str, command: list[str]) -> list[list[str]]:
        (tmp_path / name).mkdir()
        # In the file $$ stands for $, so that Compose leaves it to the shell.
        words = [word.replace("$$", "$") for word in command]
        return run_with_stand_ins(words, tmp_path / name, programs, variables)

    ((*head,),) = calls("head", services["head"]["command"])
    assert head[:3] == ["ray", "start", "--head"]
    assert head[-1] == f"--redis-password={secret}"
    ((*valkey,),) = calls("valkey", services["valkey"]["command"])
    assert valkey[:3] == ["valkey-server", "--requirepass", secret]
    job = services["job"]
    node, demo = calls("job", [*job["entrypoint"], *job["command"]])
    assert node[:2] == ["ray", "start"]
    assert demo[:3] == ["python", "-m", "rl_ckpt.demo"]
    assert re.fullmatch(r"s3://rl-ckpt/demo-\d{8}-\d{6}", demo[demo.index("--url") + 1])
    _, other = calls("other", [*job["entrypoint"], "python", "train.py", "--name", "two words"])
    assert other == ["python", "train.py", "--name", "two words"]


def test_keys_agree_between_services(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert len({services[name]["environment"][key] for name in ("s3", "bucket", "head", "worker", "job")}) == 1
    assert services["head"]["environment"]["VALKEY_PASSWORD"] == services["valkey"]["environment"]["VALKEY_PASSWORD"]
    assert services["worker"]["environment"]["RAY_AUTH_TOKEN"] == compose["configs"]["ray_token"]["content"]
    (mount,) = services["prometheus"]["configs"]
    assert mount["target"] in (CLUSTER / "prometheus" / "prometheus.yml").read_text()


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_an_image_is_pinned_not_root_and_copies_what_the_context_has(path: Path) -> None:
    text = path.read_text().replace("\\\n", " ")
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert bases
    assert all(PINNED.match(base) for base in bases)
    users = re.findall(r"^USER (\S+)", text, re.MULTILINE)
    assert users
    assert users[-1] not in {"root", "0", "0:0"}
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert copied
    for pattern in copied:
        found = [made.relative_to(ROOT) for made in ROOT.glob(pattern)]
        assert found, f"{path.name} copies {pattern}, which is not there"
        assert all(_in_context(str(made)) for made in found), f".dockerignore keeps {pattern} from {path.name}"


def _in_context(name: str) -> bool:
    """Whether .dockerignore lets a file through: the last line that matches decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and (fnmatch.fnmatch(name, pattern) or name.startswith(f"{pattern}/")):
            kept = line.startswith("!")
    return kept


def test_no_image_anywhere_floats() -> None:
    files = [COMPOSE, *CLUSTER.rglob("*.yaml")]
    found = [image for path in files for made in yaml.safe_load_all(path.read_text()) for image in images(made)]
    assert len(found) > 8
    assert [image for image in found if not PINNED.match(image)] == []
