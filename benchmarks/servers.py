"""The S3 server that a question is measured against: Ceph RGW where it is installed, else moto; and whether it lives.

A server that died in the middle must end the question: its figures would be those of error messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.s3_servers import S3Server, ceph_is_installed, run_ceph, run_moto

_BUCKET = "rl-ckpt-bench"
_ANSWER_S = 15


@dataclass(frozen=True)
class Bucket:
    """An empty bucket on a server."""

    server: S3Server
    name: str

    @property
    def url(self) -> str:
        """For fsspec."""
        return f"s3://{self.name}"

    @property
    def options(self) -> dict[str, Any]:
        """For fsspec, and so for ours."""
        return self.server.storage_options()

    @property
    def raw(self) -> dict[str, str]:
        """For `raw_s3.client`."""
        return {
            "endpoint_url": self.server.endpoint_url,
            "key": self.server.key,
            "secret": self.server.secret,
            "bucket": self.name,
        }

    def check_alive(self) -> None:
        """Writes and reads a small object.

        Raises:
            RuntimeError: The server does not answer any more.
        """
        import botocore.config
        import botocore.exceptions
        import botocore.session

        patience = botocore.config.Config(
            read_timeout=_ANSWER_S, connect_timeout=_ANSWER_S, retries={"max_attempts": 0}
        )
        client = botocore.session.get_session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.server.endpoint_url,
            aws_access_key_id=self.server.key,
            aws_secret_access_key=self.server.secret,
            config=patience,
        )
        try:
            client.put_object(Bucket=self.name, Key="alive", Body=b"yes")
            answer = client.get_object(Bucket=self.name, Key="alive")["Body"].read()
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            raise RuntimeError(f"the {self.server.name} server died during the measurement: {error}") from error
        if answer != b"yes":
            raise RuntimeError(f"the {self.server.name} server answers {answer!r} for an object of b'yes'")


@contextmanager
def bucket() -> Iterator[Bucket]:
    """A server with one empty bucket; checked once more at the end."""
    with run_ceph() if ceph_is_installed() else run_moto() as server:
        server.client().create_bucket(Bucket=_BUCKET)
        place = Bucket(server, _BUCKET)
        yield place
        place.check_alive()
