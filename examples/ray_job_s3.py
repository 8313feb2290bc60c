"""The demo job with its checkpoints on S3.

    AWS_ENDPOINT_URL=https://… AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… \\
        python examples/ray_job_s3.py --url s3://bucket/run-1

    python examples/ray_job_s3.py --start-server        # no S3 at hand: one for the time of the run, on this machine

Endpoint, credentials and region come from the environment or from AWS's own files, as for every AWS tool; leave
AWS_ENDPOINT_URL out for AWS itself. The bucket has to exist. `--start-server` needs moto (extra `test`), which keeps
everything in memory. Whatever else is given goes to the demo: see `python -m rl_ckpt.demo --help`.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import s3fs

from rl_ckpt.demo.__main__ import main as run_demo


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_open(port: int, server: subprocess.Popen[bytes], timeout_s: float = 30.0) -> None:
    """Return once the server takes connections."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not open port {port}; is moto[server] installed?")


@contextmanager
def own_server(bucket: str) -> Iterator[None]:
    """A server of moto's on a free loopback port, with one bucket; this process's environment points to it."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_open(port, server)
        # Set before the demo starts its cluster: the processes of the cluster inherit it.
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        os.environ.update(AWS_ACCESS_KEY_ID="demo", AWS_SECRET_ACCESS_KEY="demo", AWS_DEFAULT_REGION="us-east-1")
        s3fs.S3FileSystem().mkdir(bucket)
        yield
    finally:
        server.terminate()
        server.wait(10)


def main() -> int:
    """Run the demo, against a server of its own if asked."""
    parser = argparse.ArgumentParser(description="The demo job with its checkpoints on S3.")
    parser.add_argument("--url", default=f"s3://rl-ckpt-demo/{time.strftime('%Y%m%d-%H%M%S')}")
    parser.add_argument("--start-server", action="store_true", help="run against an S3 server started for this run")
    args, more = parser.parse_known_args()
    demo_args = ["--url", args.url, *more]
    if not args.start_server:
        return run_demo(demo_args)
    with own_server(bucket=args.url.removeprefix("s3://").split("/")[0]):
        return run_demo(demo_args)


if __name__ == "__main__":
    sys.exit(main())
