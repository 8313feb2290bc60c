"""The documentation is true: its Python blocks run, its links lead somewhere.

A block is left out with `<!-- no-run: reason -->` on the line above its fence. Buckets that a file names in its
blocks exist on a moto server, which the environment variables of AWS point at.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project import run_blocks
from tests.project.doc_blocks import anchors, links, python_blocks

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
WITH_CODE = [path for path in PAGES if any(block.no_run is None for block in python_blocks(path.read_text()))]
TIMEOUT_S = 240
_BUCKET = re.compile(r"s3://([a-z0-9][a-z0-9.-]+)")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _run(page: Path, cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Where a page leaves Ray's start to RLlib, that would take the cluster of whatever test runs beside this one.
    alone = {"RAY_ADDRESS": "local", "MPLBACKEND": "agg"}
    return subprocess.run(
        [sys.executable, run_blocks.__file__, str(page)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": search, **alone, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def _s3_environment(endpoint: str, buckets: set[str]) -> dict[str, str]:
    """Makes the buckets, empty ones as pages name the same, and says where they are, as users would."""
    import s3fs

    credentials = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    fs = s3fs.S3FileSystem(key="testing", secret="testing", endpoint_url=endpoint, skip_instance_cache=True)
    for bucket in sorted(buckets):
        if fs.exists(bucket):
            fs.rm(bucket, recursive=True)
        if not fs.exists(bucket):
            fs.mkdir(bucket)
    return {**credentials, "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize("page", WITH_CODE, ids=_name)
def test_python_blocks_run(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    code = "".join(block.code for block in python_blocks(page.read_text()) if block.no_run is None)
    buckets = set(_BUCKET.findall(code))
    environment: dict[str, str] = {}
    if buckets:
        server = request.getfixturevalue("moto_server")
        environment = _s3_environment(server.endpoint_url, buckets)
    result = _run(page, tmp_path, environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_block_that_is_not_run_says_why(page: Path) -> None:
    silent = [block.line for block in python_blocks(page.read_text()) if block.no_run == ""]
    assert silent == [], "lines of blocks whose no-run mark gives no reason"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    assert _dead_links(page) == []


def _dead_links(page: Path) -> list[str]:
    dead = []
    for target in links(page.read_text()):
        if re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        # A link that leaves the repository works on one machine only.
        inside = path.is_relative_to(ROOT) or path.is_relative_to(page.parent.resolve())
        found = inside and path.exists()
        if not found or (anchor and path.suffix == ".md" and anchor not in anchors(path.read_text())):
            dead.append(target)
    return dead


PAGE = """\
# A page

See [below](#below), [itself](page.md "title"), [`code`](page.md#a-page), not [gone](gone.md) nor [lost](#lost)
nor <img src="no.png">, and `[this](is-code.md)` is code.

## Below

```python
import pathlib
x = 1
```

<!-- no-run: needs a cluster of 500 nodes -->
```python
raise SystemExit("must not run")
```

<!-- no-run -->
```py
raise SystemExit("must not run")
```

```text
[neither](is-this.md)
```

1. In a list:

   ```python
   pathlib.Path("out").write_text(str(x + 1))
   ```
"""


def test_the_reader_of_pages(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert [block.no_run for block in python_blocks(PAGE)] == [None, "needs a cluster of 500 nodes", "", None]
    assert _dead_links(page) == ["gone.md", "#lost", "no.png"]
    assert anchors(PAGE) == {"a-page", "below"}


def test_blocks_share_a_namespace_and_run_in_a_folder_of_their_own(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    result = _run(page, tmp_path, {})
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out").read_text() == "2"


def test_a_failing_block_is_reported_with_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```python\nx = 1\nassert x == 2\n```\n")
    result = _run(page, tmp_path, {})
    assert result.returncode == 1
    assert f'"{page}", line 5' in result.stderr
