"""The benchmark suite runs, its results become tables, and docs/performance.md is what the committed results give."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
# tests/integrations/trl has the one that needs TRL.
OPS = sorted({path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")} - {"trl_step"})
sys.path.insert(0, str(ROOT))

from benchmarks import gradient_error, report, selection_over_ranks  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "--quick", "--device", "cpu", "--threads", "1"]
    subprocess.run([*command, "--json", str(directory), "--op", *OPS], cwd=ROOT, check=True)
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


def test_charts_are_what_the_results_give(tmp_path: Path) -> None:
    """Byte by byte: the same results give the same file."""
    report.picture(report.load("cpu"), tmp_path / report.PICTURE.name)
    assert (tmp_path / report.PICTURE.name).read_bytes() == report.PICTURE.read_bytes(), "run make performance"
    for device in report.DEVICES:
        path = report.PAGE.with_name(f"performance-{device}.svg")
        assert path.exists() == bool(report.load(device))
        if path.exists():
            report.chart(device, report.load(device), tmp_path / path.name)
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), "run make performance"


# ---- Over ranks


def test_selection_over_ranks_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.selection_over_ranks", "--quick"]
    path = tmp_path / "selection.json"
    subprocess.run([*command, "--json", str(path)], cwd=ROOT, check=True)
    result = json.loads(path.read_text())
    for ranks, run in zip((2, 4), result["runs"], strict=True):
        assert run["ranks"] == ranks
        ours, alone = (run["contenders"][name] for name in ("ours, topk", "each rank alone"))
        assert len(ours["seconds"]) == len(ours["wire_bytes"]) == 2
        # What a ring sends of four all-reduces, at the least; others may use the loopback interface meanwhile.
        assert min(ours["wire_bytes"]) >= 2 * (ranks - 1) * (40_960 + 8 * ranks)
        assert len(alone["wire_bytes"]) == 2
        assert f"| {ranks} | ours, topk |" in selection_over_ranks.table(result)


@pytest.mark.parametrize("module", [selection_over_ranks, gradient_error])
def test_docs_have_the_measured_table(module: ModuleType) -> None:
    result = json.loads(module.RESULT.read_text())
    page = module.PAGE.read_text()
    assert module.page(result) == page, f"run python -m {module.__name__}"
    assert module.table(result) in page
