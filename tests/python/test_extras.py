"""The extras: what they require, and the one line where a package of theirs is missing."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from entropy_rl import extras


@pytest.mark.parametrize(
    "arguments", [["entropy_rl.train"], ["entropy_rl.demo"], ["entropy_rl", "ablate", "--output=o"]]
)
def test_a_command_without_a_package_of_the_extra(arguments: list[str], tmp_path: Path) -> None:
    for name in ("transformers", "pyarrow", "omegaconf"):
        text = f"raise ModuleNotFoundError(\"No module named '{name}'\", name={name!r})\n"
        (tmp_path / f"{name}.py").write_text(text)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", *arguments], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    [line] = result.stderr.splitlines()
    command = " ".join(["entropy-rl", "ablate"] if "ablate" in arguments else ["python", "-m", *arguments])
    assert result.returncode == 2 and line.startswith(f"error: {command} needs ")
    assert line.endswith(
        "which is not installed; install it with: pip install --no-build-isolation -e '.[train]' in a clone of the "
        "package"
    )


def test_a_module_of_this_package_that_is_missing_is_an_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"entropy_rl\.nothing"):
        extras.run_module("entropy_rl.nothing")


def test_requirements_are_those_of_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["torch>=2.11", 'trl==1.16.*; extra == "trl"', "numpy; extra == 'train'", 'tqdm>=4; extra == "train"']
    monkeypatch.setattr(extras, "requires", lambda name: declared)
    assert extras.requirements("train") == ["numpy", "tqdm>=4"]
    assert extras.requirements("trl") == ["trl==1.16.*"]

    def nothing(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", nothing)
    assert extras.requirements("trl") == []


@pytest.mark.parametrize(
    ("requirement", "installed", "expected"),
    [
        ("tqdm>=4.66", "4.70.1", None),
        ("tqdm>=4.66", None, "tqdm>=4.66"),
        ("trl==1.16.*", "1.16.3", None),
        ("trl==1.16.*", "1.17.0.dev0", "trl==1.16.* (1.17.0.dev0 is installed)"),
        ("transformers<6,>=5.5.3", "4.57.1", "transformers<6,>=5.5.3 (4.57.1 is installed)"),
    ],
)
def test_lacking(
    requirement: str, installed: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "installed_version", lambda name: installed)
    assert extras.lacking(requirement) == expected
