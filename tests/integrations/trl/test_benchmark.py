"""The benchmarks of an optimizer step run, ours and TRL's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("op", "contenders"), [("trl_step", 5), ("llm_step", 9)])
def test_every_contender_runs(tmp_path: Path, op: str, contenders: int) -> None:
    command = ["-W", "ignore", "-m", "benchmarks", "--quick", "--device", "cpu", "--threads", "1", "--op", op]
    subprocess.run([sys.executable, *command, "--json", str(tmp_path)], cwd=ROOT, check=True)
    (run,) = json.loads((tmp_path / f"{op}.threads1.json").read_text())["runs"]
    assert len(run["contenders"]) == contenders
    for name, record in run["contenders"].items():
        if "verl" in name:
            continue  # not in this environment
        assert len(record.get("seconds", [])) == 2, (name, record)
