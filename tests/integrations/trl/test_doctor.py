"""`entropy-rl doctor` where TRL is installed."""

import re
from pathlib import Path

import pytest

from entropy_rl import cli, doctor


def test_here(capsys: pytest.CaptureFixture[str]) -> None:
    """doctor reports that the package is on the search path but not installed, and does not count it as an error."""
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"✓ TRL +1\.16\.\S+; EntropyGRPOTrainer can be imported", shown)


def test_an_integration_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trl.py").write_text("__version__ = '1.16.0'")
    monkeypatch.chdir(tmp_path)  # where `python -c` looks first
    found = next(finding for finding in doctor.check_integrations() if finding.name == "TRL")
    assert found.state == "wrong" and "has no trl.GRPOTrainer._compute_loss, which" in found.text
    assert found.fix == doctor.REINSTALL
