"""`entropy-rl doctor` where verl is installed."""

import re
from pathlib import Path

import pytest

from entropy_rl import cli, doctor


def test_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"✓ verl +0\.9\.\S+; .*entropy_top_ratio is available, and its loss is installed", shown)


def test_a_plugin_that_verl_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    found = next(finding for finding in doctor.check_integrations() if finding.name == "verl")
    assert found.state == "wrong" and found.text.endswith("VERL_USE_EXTERNAL_PLUGINS=none")
    assert "unset VERL_USE_EXTERNAL_PLUGINS" in found.fix


def test_a_plugin_that_broke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss cannot import something: the plugin stores the reason, and doctor reports it."""
    (tmp_path / "entropy_rl_ext.py").write_text("raise ImportError('no such symbol')\n")
    monkeypatch.chdir(tmp_path)  # where `python -c` looks first
    found = next(finding for finding in doctor.check_integrations() if finding.name == "verl")
    assert found.state == "wrong" and found.fix == doctor.REINSTALL
    assert "its loss could not be installed: ImportError: no such symbol" in found.text
