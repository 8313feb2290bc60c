"""`python -m rl_ckpt.cli`: the same as `rl-ckpt`."""

import sys

from rl_ckpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
