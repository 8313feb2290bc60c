"""`python -m benchmarks`: rl_ckpt beside the raw limits of this machine. Prints ratios; keeps the figures as JSON.

Default: 4 workers with 256 MB each on the local disk, and 32 MB each against an S3 server that it starts itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import ray
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Row, local_disk, object_store
from tests.s3_servers import S3Server, ceph_is_installed, run_ceph, run_moto

_BUCKET = "rl-ckpt-bench"


def main() -> None:
    """Runs what the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--mib", type=int, default=256, help="state of each worker, local disk")
    parser.add_argument("--s3-mib", type=int, default=32, help="state of each worker, S3; 0 leaves S3 out")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk to be measured; default: a temporary folder"
    )
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out"), help="folder for the figures")
    args = parser.parse_args()
    # PYTHONPATH reaches the actors: the benchmark's own modules are not installed.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    ray.init(address="local", num_cpus=4 * args.workers, include_dashboard=False, object_store_memory=200 << 20)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for kind in ("sharded", "declared", "replicated"):
            rows += local_disk(Path(folder), kind, args.workers, args.mib << 20, args.rounds)
    if args.s3_mib:
        with run_ceph() if ceph_is_installed() else run_moto() as server:
            rows += _s3(server, args.workers, args.s3_mib << 20, args.rounds)
    ray.shutdown()
    _show(rows, args.workers, args.mib, args.s3_mib)
    _keep(rows, args)


def _s3(server: S3Server, workers: int, size_bytes: int, rounds: int) -> list[Row]:
    import botocore.session

    options = {
        "endpoint_url": server.endpoint_url,
        "aws_access_key_id": server.key,
        "aws_secret_access_key": server.secret,
    }
    client = botocore.session.get_session().create_client("s3", region_name="us-east-1", **options)
    client.create_bucket(Bucket=_BUCKET)
    rows = object_store(options, _BUCKET, workers, size_bytes, rounds)
    for row in rows:
        row.question += f" ({server.name})"
    return rows


def _show(rows: list[Row], workers: int, mib: int, s3_mib: int) -> None:
    table = Table(title=f"{workers} workers, {mib} MiB each (S3: {s3_mib} MiB each)")
    for name in ("question", "ours, s", "limit, s", "limit is", "ratio", "quartiles", "goal"):
        table.add_column(name)
    for row in rows:
        low, high = row.spread()
        ours, limit = median(row.ours[2:]), median(row.limit[2:])
        table.add_row(
            row.question,
            f"{ours:.3f}",
            f"{limit:.3f}",
            row.limit_name,
            f"{row.ratio:.2f}",
            f"{low:.2f}…{high:.2f}",
            row.goal,
        )
    console = Console(width=None if os.isatty(1) else 160)
    console.print(_machine())
    console.print(table)


def _machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "pyarrow", "numpy", "s3fs"))
    return f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}, {packages}"


def _keep(rows: list[Row], args: argparse.Namespace) -> None:
    args.json.mkdir(parents=True, exist_ok=True)
    path = args.json / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    figures = [{"question": r.question, "ours_s": r.ours, "limit_s": r.limit, "ratio": r.ratio} for r in rows]
    settings = {"workers": args.workers, "mib": args.mib, "s3_mib": args.s3_mib, "rounds": args.rounds}
    path.write_text(json.dumps({"machine": _machine(), "settings": settings, "rows": figures}, indent=1))
    print(f"figures: {path}")


if __name__ == "__main__":
    main()
