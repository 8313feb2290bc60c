"""`python -m benchmarks.scale`: what a coordinator costs with thousands of workers, and what storage allows.

growth      simulates saves and restores at many sizes; prints the tables, writes the plot
point       one size, in this process, as JSON
model       predicted times for 8 … 1,024 nodes and 1 GB … 10 TB
calibrate   measures 1 … 4 raylets on this machine, and prints how far the model is off
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.scale import growth, model

_OUT = Path("benchmarks/out")


def main() -> None:
    """Does what the arguments say."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_subparsers(dest="mode", required=True)
    grow = modes.add_parser("growth")
    grow.add_argument(
        "--json", type=Path, default=_OUT / "scale.json", help="kept figures; what stands there is not run"
    )
    grow.add_argument("--plot", type=Path, default=Path("docs/img/scaling.svg"))
    grow.add_argument("--most", type=int, default=None, help="stop after so many points")
    grow.add_argument("--tries", type=int, default=3, help="of each point; the fastest counts")
    one = modes.add_parser("point")
    one.add_argument("kind")
    one.add_argument("workers", type=int)
    one.add_argument("chunks", type=int)
    modes.add_parser("model")
    calibration = modes.add_parser("calibrate")
    calibration.add_argument("--only", default=None, help="one store: 'local disk', 'ceph' or 'moto'")
    args = parser.parse_args()
    if args.mode == "point":
        growth.point(args.kind, args.workers, args.chunks)
    elif args.mode == "growth":
        found = growth.measure(growth.POINTS[: args.most], args.json, args.tries)
        growth.plot(found, args.plot)
        print(growth.table(found), growth.exponents(found), growth.goal(found), sep="\n\n")
    elif args.mode == "model":
        print(model.tables())
    else:
        from benchmarks.scale.calibrate import calibrate  # brings Ray and the S3 servers in

        print(calibrate(args.only))


if __name__ == "__main__":
    main()
