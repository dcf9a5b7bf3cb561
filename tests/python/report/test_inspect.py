"""`entropy-rl inspect`, from its command line to the page."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_rl import cli
from entropy_rl.report import inspect
from training import broken_copy


@pytest.fixture
def given(tmp_path: Path) -> Path:
    path = tmp_path / "given.jsonl"
    rows = [{"prompt": f"{a} + {a} =", "completion": f" {2 * a}, of course"} for a in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def arguments(model_path: Path, given: Path, tmp_path: Path) -> dict[str, Any]:
    return {"--model": model_path, "--input": given, "--output": tmp_path / "report.html"}


def run(arguments: dict[str, Any]) -> int:
    return cli.main(["inspect", *(str(word) for pair in arguments.items() for word in pair)])


def read_data(path: Path) -> Any:
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    data = json.loads(found)
    return data | data["steps"][0]


@pytest.mark.parametrize("program", [["-m", "entropy_rl"], ["-m", "entropy_rl.cli"]])
def test_command_line(program: list[str], arguments: dict[str, Any], tmp_path: Path) -> None:
    words = [str(word) for pair in arguments.items() for word in pair]
    result = subprocess.run(
        [sys.executable, *program, "inspect", *words], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert re.search(r"^65 tokens of 5 completions$", result.stdout, re.MULTILINE)
    assert f"report: {tmp_path / 'report.html'}" in result.stdout
    assert read_data(tmp_path / "report.html")["lengths"] == [13] * 5


def test_samples(arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """With --samples the completions of the input are ignored. The same seed draws the same samples."""
    sampled = arguments | {"--samples": 3, "--max-new-tokens": 6, "--limit": 2, "--batch-size": 4}
    pages = []
    for _ in range(2):
        assert run(sampled) == 0
        pages.append(arguments["--output"].read_bytes())
    assert pages[0] == pages[1]
    data = read_data(arguments["--output"])
    assert data["promptOf"] == [0, 0, 0, 1, 1, 1] and max(data["lengths"]) <= 6
    assert run(sampled | {"--seed": 1}) == 0
    assert arguments["--output"].read_bytes() != pages[0]


def test_temperatures_and_title(arguments: dict[str, Any]) -> None:
    """The temperature of sampling and that of measuring are two; given completions have no known one."""
    sampled = arguments | {"--samples": 1, "--max-new-tokens": 6, "--temperature": 0.7}
    found = []
    for options in (arguments, sampled, sampled | {"--sampling-temperature": 0.01, "--title": "greedy"}):
        assert run(options) == 0
        found.append(read_data(arguments["--output"]))
    assert [(data["temperature"], data["sampledAt"]) for data in found] == [(1.0, None), (0.7, 0.7), (0.7, 0.01)]
    assert found[2]["title"] == "greedy" and found[2]["tokens"] != found[1]["tokens"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("runs/demo/model", "demo/model"),
        ("run/global_step_20/actor/huggingface", "global_step_20"),
    ],
)
def test_the_name_of_a_model(path: str, name: str) -> None:
    assert inspect._name(path) == name


def test_an_end_of_text_ends_a_sample(arguments: dict[str, Any], model_path: Path, tmp_path: Path) -> None:
    assert run(arguments | {"--samples": 40, "--max-new-tokens": 100, "--limit": 1}) == 0
    data = read_data(arguments["--output"])
    assert min(data["lengths"]) < 100 and "<eos>" in data["vocabulary"]


def test_compare(arguments: dict[str, Any], model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments | {"--compare": model_path}) == 0
    assert "overlap of the selected positions: 100.0%" in capsys.readouterr().out
    assert read_data(arguments["--output"])["names"] == [str(model_path)] * 2


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("tokenizer*", None, "no tokenizer can be loaded from it"),
        ("tokenizer.json", b"{", "no tokenizer can be loaded from it"),
        ("config.json", b"{", "no tokenizer can be loaded|no Hugging Face causal language model can be loaded"),
        ("model.safetensors", None, "no Hugging Face causal language model can be loaded from it"),
        ("model.safetensors", b"weights", "no Hugging Face causal language model can be loaded from it"),
    ],
)
def test_a_broken_model(
    file: str, content: bytes | None, expected: str, arguments: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    path = broken_copy(arguments["--model"], tmp_path / "broken", file, content)
    assert run(arguments | {"--model": path}) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert re.search(expected, message) and str(path) in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--model": "/nowhere"}, "/nowhere: no tokenizer can be loaded from it"),
        ({"--compare": "/nowhere"}, "--compare /nowhere: no Hugging Face causal language model"),
        ({"--input": "/nowhere.jsonl"}, "--input /nowhere.jsonl: there is no such file"),
        ({"--input": "/nowhere"}, "its name must end in .jsonl or .parquet"),
        ({"--output": "/nowhere/report.html"}, "--output /nowhere/report.html: there is no directory /nowhere"),
        ({"--output": "/tmp"}, "--output /tmp: this is a directory"),
        ({"--output": "/proc/report.html"}, "--output /proc/report.html: it cannot be written: "),
        ({"--ratio": 1.5}, "argument --ratio: 1.5: it must be a number above 0 and at most 1"),
        ({"--ratio": 0}, "argument --ratio: 0: it must be a number above 0 and at most 1"),
        ({"--ratio": "nan"}, "argument --ratio: nan: it must be a number above 0 and at most 1"),
        ({"--temperature": -1}, "argument --temperature: -1: it must be a number of at least 1e-06"),
        ({"--temperature": "inf"}, "argument --temperature: inf: it must be a number of at least 1e-06"),
        ({"--temperature": 1e-39}, "argument --temperature: 1e-39: it must be a number of at least 1e-06"),
        ({"--sampling-temperature": 1e300}, "at least 1e-06 and at most 1e+06"),
        ({"--samples": 0}, "argument --samples: 0: it must be an integer of at least 1"),
        ({"--limit": 1.5}, "argument --limit: 1.5: it must be an integer of at least 1"),
        ({"--prompt-key": "question"}, "there is no 'question'; it has 'prompt', 'completion'"),
        ({"--dtype": "int8"}, "invalid choice: 'int8'"),
        ({"--colour": "red"}, "unrecognized arguments: --colour red; see entropy-rl --help"),
    ],
)
def test_an_error_is_one_line(
    changes: dict[str, Any], expected: str, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments | changes) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert expected in message


def test_a_gpu_that_does_not_exist(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(arguments | {"--device": "cuda"}) == 2
    assert "--device cuda: PyTorch sees no GPU" in capsys.readouterr().err


def test_models_with_other_tokens_are_not_compared(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = (arguments["--model"] / "tokenizer.json").read_text().replace('"~"', '"≈"')
    other = broken_copy(arguments["--model"], tmp_path / "other", "tokenizer.json", tokenizer.encode())
    assert run(arguments | {"--compare": other}) == 2
    assert "its tokenizer has other tokens than the first model's" in capsys.readouterr().err


def test_figures(arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments | {"--figures": tmp_path / "figures"}) == 0
    assert f"figures: {tmp_path / 'figures'}\n" in capsys.readouterr().out
    found = json.loads((tmp_path / "figures" / "entropy.json").read_text())
    assert found["tokens"] == 65 and found["sampling_temperature"] is None
    assert run(arguments | {"--figures": tmp_path / "missing" / "figures"}) == 2
    assert capsys.readouterr().err == (
        f"error: --figures {tmp_path / 'missing' / 'figures'}: it cannot be created: No such file or directory\n"
    )
    rollouts = {"--rollouts": tmp_path, "--output": arguments["--output"], "--figures": tmp_path / "figures"}
    assert run(rollouts) == 2
    assert capsys.readouterr().err == "error: --figures and --rollouts: give one of them\n"
