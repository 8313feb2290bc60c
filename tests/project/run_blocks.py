"""Runs the Python blocks of one Markdown file, in order and in one namespace: `python run_blocks.py FILE`.

The namespace is `__main__`, as for a script, so that Ray sends the classes of a block by value. Tracebacks show the
lines of the Markdown file. A Ray cluster that a block started is shut down at the end.
"""

import sys
from pathlib import Path

from tests.project.doc_blocks import python_blocks


def _run(path: Path) -> None:
    namespace = sys.modules["__main__"].__dict__
    for block in python_blocks(path.read_text()):
        if block.no_run is None:
            exec(compile("\n" * block.line + block.code, str(path), "exec"), namespace)


def _stop_ray() -> None:
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


if __name__ == "__main__":
    try:
        _run(Path(sys.argv[1]))
    finally:
        _stop_ray()
