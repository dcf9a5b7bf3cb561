"""The benchmark suite runs, its results become tables, and docs/performance.md is what the committed results give."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py"))
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "--quick", "--device", "cpu", "--threads", "1"]
    subprocess.run([*command, "--json", str(directory)], cwd=ROOT, check=True)
    return directory


@pytest.mark.parametrize("op", OPS)
def test_every_contender_has_samples_or_an_error(results: Path, op: str) -> None:
    result = json.loads((results / f"{op}.threads1.json").read_text())
    assert result["threads"] == 1 and result["copy_bytes_per_second"] > 0
    for run in result["runs"]:
        assert len(run["contenders"]["ours"]["seconds"]) == 2
        assert len(run["contenders"]) > 1
        assert all(r.get("error") or len(r["seconds"]) == 2 for r in run["contenders"].values())
    table = report.table(result)
    for run in result["runs"]:
        assert sum(line.startswith(f"| {run['case']} |") for line in table.splitlines()) >= len(run["contenders"])


def test_a_missed_goal_is_told() -> None:
    run = {"bytes": 100, "contenders": {"ours": {"seconds": [1.0]}, "peer": {"seconds": [9.0]}, "gone": {"error": "x"}}}
    assert report._goal("peer", 10, run, 1.0) == ("at least 10× peer", "9×, **missed**")
    assert report._goal("peer", 9, run, 1.0)[1] == "9×, met"
    assert report._goal("gone", 2, run, 1.0)[1] == "the peer did not run"
    assert report._goal("copy", 0.9, run, 100.0)[1] == "100%, met"


def test_page_is_what_the_results_give() -> None:
    assert report.PAGE.read_text() == report.page(), "run make performance"
