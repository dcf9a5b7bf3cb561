"""The command `entropy-rl`: its help, and errors in one line."""

import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from entropy_rl import cli

PROGRAM = Path(sys.executable).with_name("entropy-rl")


@pytest.mark.parametrize("arguments", [[], *([name] for name in cli.COMMANDS)])
def test_help(arguments: list[str]) -> None:
    """The installed program has help for each command."""
    shown = subprocess.run([PROGRAM, *arguments, "--help"], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("usage: entropy-rl")
    if not arguments:
        assert all(name in shown for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--"], "the following arguments are required: COMMAND; see entropy-rl --help"),
        (["inspekt"], "invalid choice: 'inspekt'"),
        (["inspect"], "the following arguments are required: --output"),
        (["doctor", "--all"], "unrecognized arguments: --all"),
    ],
)
def test_an_error_is_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and expected in message


def test_without_arguments_it_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("usage: entropy-rl") and not shown.err
    assert all(f"    {name} " in shown.out for name in cli.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"entropy-rl {version('entropy-rl-ext')}\n"


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(cli, "import_module", missing)
    assert cli.main(["inspect", "--model=m", "--input=i.jsonl", "--output=o.html"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "inspect needs transformers" in message and "[train]" in message


@pytest.mark.parametrize("module", cli.COMMANDS.values())
def test_every_command_has_its_module(module: str) -> None:
    assert callable(importlib.import_module(module).run)
