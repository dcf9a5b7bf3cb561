"""The benchmark of an optimizer step runs, ours and TRL's."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_contender_runs(tmp_path: Path) -> None:
    command = ["-W", "ignore", "-m", "benchmarks", "--quick", "--device", "cpu", "--threads", "1", "--op", "trl_step"]
    subprocess.run([sys.executable, *command, "--json", str(tmp_path)], cwd=ROOT, check=True)
    (run,) = json.loads((tmp_path / "trl_step.threads1.json").read_text())["runs"]
    assert len(run["contenders"]) == 5
    for name, record in run["contenders"].items():
        assert len(record.get("seconds", [])) == 2, (name, record)
