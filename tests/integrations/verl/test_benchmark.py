"""The benchmark of an LM head under tensor parallelism runs, ours and verl's, and both give the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.full
def test_every_contender_runs(tmp_path: Path) -> None:
    search_path = (f"{sys.prefix}/megatron", os.environ.get("PYTHONPATH"))
    subprocess.run(
        [sys.executable, "-m", "benchmarks.head_over_ranks", "--quick", "--json", str(tmp_path / "head.json")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search_path))},
        check=True,
    )
    (run,) = json.loads((tmp_path / "head.json").read_text())["runs"]
    assert run["ranks"] == 2 and len(run["contenders"]) == 3
    for name, record in run["contenders"].items():
        assert len(record["seconds"]) == 2 and record["peak_bytes"] >= 0, name
