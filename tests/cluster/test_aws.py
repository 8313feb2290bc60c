"""The rights on AWS are enough and no more, on a server that enforces them (moto); Ray takes the launcher's file.

moto looks at the names of actions alone: conditions, resources of EC2, and `iam:PassRole` are checked by parliament's
rules only, and no file here was ever used on AWS.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import types
import urllib.request
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session
import numpy as np
import pytest

import rl_ckpt
from tests.cluster.files import CLUSTER, documents, ray_start_commands, ray_start_options
from tests.s3_servers import S3Server, run_moto

AWS = CLUSTER / "aws"
BUCKET = "my-bucket"
REGION = "eu-central-1"
NODES = json.loads((AWS / "iam-policy.json").read_text())
LAUNCH = json.loads((AWS / "iam-launch.json").read_text())


def actions(policy: dict[str, Any]) -> list[str]:
    return sorted({action for statement in policy["Statement"] for action in statement["Action"]})


@dataclass
class Account:
    """A server with one user, whose rights are enforced on request."""

    server: S3Server
    key: str
    secret: str

    def client(self, service: str) -> Any:
        names = {"aws_access_key_id": "admin", "aws_secret_access_key": "admin", "region_name": REGION}
        return botocore.session.get_session().create_client(service, endpoint_url=self.server.endpoint_url, **names)

    @contextmanager
    def allowed(self, policy: dict[str, Any], but: str | None = None) -> Iterator[None]:
        """Inside, the user has the rights of a policy but one, and the server looks."""
        made = copy.deepcopy(policy)
        for statement in made["Statement"]:
            statement["Action"] = [action for action in statement["Action"] if action != but]
        made["Statement"] = [statement for statement in made["Statement"] if statement["Action"]]
        self.client("iam").put_user_policy(UserName="job", PolicyName="p", PolicyDocument=json.dumps(made))
        self._look_from(0)
        try:
            yield
        finally:
            self._look_from(1 << 40)

    def _look_from(self, request: int) -> None:
        url = f"{self.server.endpoint_url}/moto-api/reset-auth"
        made = urllib.request.Request(url, str(request).encode(), {"Content-Type": "text/plain"}, method="POST")
        urllib.request.urlopen(made).close()


@pytest.fixture(scope="module")
def account(_no_aws_settings_from_outside: None) -> Iterator[Account]:
    with run_moto() as server:
        made = Account(server, "", "")
        iam = made.client("iam")
        iam.create_user(UserName="job")
        keys = iam.create_access_key(UserName="job")["AccessKey"]
        made.key, made.secret = keys["AccessKeyId"], keys["SecretAccessKey"]
        server.client().create_bucket(Bucket=BUCKET)
        yield made


def use_a_run(account: Account, url: str) -> list[str]:
    """Save, load, sweep and clean up after a killed writer; tells what was refused."""
    options = {"key": account.key, "secret": account.secret, "endpoint_url": account.server.endpoint_url}
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda message, *_, **__: said.append(str(message)))
        try:
            with rl_ckpt.Checkpointer(url, storage_options=options, keep=[rl_ckpt.LatestN(1)], grace_s=0) as ckpt:
                for step in range(3):
                    if step == 1:
                        begin_an_upload(account, url)
                    ckpt.save_state(step, {"a": np.full(100_000, step)}).result()
                assert ckpt.load_state()["a"][0] == 2
        except rl_ckpt.StorageError as error:
            said.append(str(error))
    return [text for text in said if "AccessDenied" in text]


def run_url() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def uploads_left(account: Account, url: str) -> int:
    answer = account.client("s3").list_multipart_uploads(Bucket=BUCKET, Prefix=url.partition(f"{BUCKET}/")[2])
    return len(answer.get("Uploads", []))


def begin_an_upload(account: Account, url: str) -> None:
    """As a writer that was killed leaves one."""
    user = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=account.server.endpoint_url,
        region_name=REGION,
        aws_access_key_id=account.key,
        aws_secret_access_key=account.secret,
    )
    user.create_multipart_upload(Bucket=BUCKET, Key=f"{url.partition(f'{BUCKET}/')[2]}/shards/0-dead/w-0.arrow")


def test_the_rights_of_a_node_are_enough(account: Account) -> None:
    url = run_url()
    with account.allowed(NODES):
        assert use_a_run(account, url) == []
    assert uploads_left(account, url) == 0


@pytest.mark.parametrize("action", actions(NODES))
def test_each_right_of_a_node_is_needed(action: str, account: Account) -> None:
    url = run_url()
    with account.allowed(NODES, but=action):
        refused = use_a_run(account, url)
    assert refused or uploads_left(account, url), f"all goes well without {action}"


@pytest.fixture(scope="module")
def config(account: Account) -> dict[str, Any]:
    """The launcher's file, with names that the server has."""
    ec2 = account.client("ec2")
    subnet = ec2.describe_subnets()["Subnets"][0]
    group = ec2.create_security_group(GroupName="-", Description="-", VpcId=subnet["VpcId"])["GroupId"]
    image = ec2.describe_images()["Images"][0]["ImageId"]
    made = documents(AWS / "cluster.yaml")[0]
    for name, kind in made["available_node_types"].items():
        account.client("iam").create_instance_profile(InstanceProfileName=name)
        kind["node_config"] |= {"SubnetIds": [subnet["SubnetId"]], "SecurityGroupIds": [group], "ImageId": image}
        kind["node_config"]["IamInstanceProfile"] = {"Name": name}
    return made


def launch(config: dict[str, Any], *, look_up_types: bool = True) -> None:
    """What `ray up`, the autoscaler and `ray down` ask AWS for; types of instances (2 s of moto) are optional."""
    from ray.autoscaler._private.aws import node_provider
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config({**copy.deepcopy(config), "cluster_name": uuid.uuid4().hex})
    validate_config(config)
    if look_up_types:
        config = node_provider.AWSNodeProvider.fillout_available_node_types_resources(config)
    config = bootstrap_aws(config)
    provider = node_provider.AWSNodeProvider(config["provider"], config["cluster_name"])
    provider.create_node(config["available_node_types"]["worker"]["node_config"], {"ray-node-type": "worker"}, 1)
    (node,) = provider.non_terminated_nodes({"ray-node-type": "worker"})
    provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
    provider.terminate_node(node)


@pytest.fixture
def as_the_user(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", account.server.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", account.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", account.secret)


def by_action(policy: dict[str, Any]) -> dict[str, Any]:
    """The same, without resources and conditions, which moto does not know of EC2."""
    statements = [{"Effect": "Allow", "Action": part["Action"], "Resource": "*"} for part in policy["Statement"]]
    return {"Version": policy["Version"], "Statement": statements}


@pytest.mark.usefixtures("as_the_user")
def test_the_rights_to_launch_are_enough(account: Account, config: dict[str, Any]) -> None:
    with account.allowed(by_action(LAUNCH)):
        launch(config)


@pytest.mark.usefixtures("as_the_user")
@pytest.mark.parametrize("action", [action for action in actions(LAUNCH) if action != "iam:PassRole"])
def test_each_right_to_launch_is_needed(action: str, account: Account, config: dict[str, Any]) -> None:
    import click
    from botocore.exceptions import ClientError
    from ray.autoscaler._private.node_launcher import NodeLaunchException

    with (
        account.allowed(by_action(LAUNCH), but=action),
        pytest.raises((ClientError, NodeLaunchException, click.ClickException)),
    ):
        launch(config, look_up_types=action == "ec2:DescribeInstanceTypes")


def test_the_launchers_file_starts_nodes_that_hold_checkpoints() -> None:
    made = documents(AWS / "cluster.yaml")[0]
    head, worker = (made["available_node_types"][name] for name in ("head", "worker"))
    assert made["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0}
    assert worker["min_workers"] >= 3
    assert worker["node_config"]["KeyName"] == head["node_config"]["KeyName"]
    commands = ray_start_commands([made["head_start_ray_commands"], made["worker_start_ray_commands"]])
    for options in commands:
        assert set(options) <= ray_start_options()
    assert any("--autoscaling-config" in options for options in commands)
    assert all("RAY_AUTH_MODE=token" in made[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    # Rights name the things of this file.
    passed = [
        arn for part in LAUNCH["Statement"] if part["Sid"] == "GiveInstancesTheirRole" for arn in part["Resource"]
    ]
    profiles = [kind["node_config"]["IamInstanceProfile"]["Arn"] for kind in (head, worker)]
    assert {arn.rpartition("/")[2] for arn in passed} == {arn.rpartition("/")[2] for arn in profiles}
    launched = json.dumps([part["Resource"] for part in LAUNCH["Statement"] if part["Action"] == ["ec2:RunInstances"]])
    node = worker["node_config"]
    for name in [*node["SubnetIds"], *node["SecurityGroupIds"], f"key-pair/{node['KeyName']}"]:
        assert name in launched
    # Not tagged on create, so AWS looks at the right to make the request that a spot instance comes of, too.
    assert (":spot-instances-request/*" in launched) == ("spot" in json.dumps(node.get("InstanceMarketOptions", {})))
    tags = [part["Condition"]["StringEquals"] for part in LAUNCH["Statement"] if "Condition" in part]
    assert {value for tag in tags for key, value in tag.items() if "ray-cluster-name" in key} == {made["cluster_name"]}


@pytest.fixture(scope="module")
def parliament() -> Iterator[Any]:
    """It finds its own files by a module that setuptools no longer has."""
    with pytest.MonkeyPatch.context() as patch:
        shim = types.ModuleType("pkg_resources")
        where = importlib.util.find_spec("parliament")
        assert where is not None
        assert where.origin is not None
        folder = Path(where.origin).parent
        shim.resource_filename = lambda _package, name: str(folder / name)  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "pkg_resources", shim)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the collector
            made = importlib.import_module("parliament")
        yield made


def test_parliament_finds_nothing_in_the_policies(parliament: Any) -> None:
    # The two statements of RunInstances cover its resources together; parliament looks at each alone.
    merged = copy.deepcopy(LAUNCH)
    launching = [part for part in merged["Statement"] if part["Action"] == ["ec2:RunInstances"]]
    assert len(launching) == 2
    launching[0]["Resource"] += launching[1]["Resource"]
    merged["Statement"].remove(launching[1])
    for policy in (NODES, merged):
        found = parliament.analyze_policy_string(json.dumps(policy)).findings
        assert [(finding.issue, finding.detail) for finding in found] == []


def test_parliament_finds_a_right_that_does_not_exist(parliament: Any) -> None:
    wrong = json.dumps(NODES).replace("s3:ListBucketMultipartUploads", "s3:ListMultipartUploads")
    assert [finding.issue for finding in parliament.analyze_policy_string(wrong).findings] == ["UNKNOWN_ACTION"]


def test_every_statement_is_explained() -> None:
    page = (AWS / "README.md").read_text()
    for statement in [*NODES["Statement"], *LAUNCH["Statement"]]:
        assert f"`{statement['Sid']}`" in page
