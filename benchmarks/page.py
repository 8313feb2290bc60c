"""placeholder"""

from pathlib import Path
from benchmarks.results import Results


def write(results: Results, docs: Path) -> None: ...
