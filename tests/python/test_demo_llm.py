"""The demo of a language model from end to end with a tiny model, too short to learn anything."""

import json
import re
from pathlib import Path

import pytest
import torch

import tiny_model
from entropy_rl import demo_llm


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_llm, "TRAIN_PROBLEMS", 8)
    monkeypatch.setattr(demo_llm, "VALIDATION_PROBLEMS", 4)


@pytest.mark.usefixtures("small")
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "demo-llm"
    overrides = demo_llm.training_overrides
    # A token of the tiny model is a character.
    longer = ["data.max_prompt_length=512", "data.max_response_length=8"]
    monkeypatch.setattr(demo_llm, "training_overrides", lambda *given: [*overrides(*given), *longer])
    model = tiny_model.save_tiny_model(tmp_path / "model", positions=1024)
    monkeypatch.setattr("sys.argv", ["demo_llm", f"--model={model}", f"--directory={directory}", "--steps=2"])
    assert demo_llm.main() == 0
    shown = capsys.readouterr().out
    results = json.loads((directory / "results.json").read_text())
    assert len(results["held_out_accuracy"]) == 2 and len(results["training"]["critic/rewards/mean"]) == 2
    assert results["before"]["tokens"] <= 8 and results["model"] == "model"
    assert re.search(r"^solved, greedy +[\d.]+% +[\d.]+%$", shown, flags=re.MULTILINE)
    for path in re.findall(r"^(?:metrics|curves|responses|report|model|command) +(.*)$", shown, flags=re.MULTILINE):
        assert all(Path(part).exists() for part in path.split(", "))
    assert (directory / "report.html").read_text().count("global_step_2")


def test_the_processor_decides_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
        overrides = demo_llm.training_overrides("model", Path("demo"), 0, 1)
        assert f"actor_rollout_ref.actor.fsdp_config.dtype={dtype}" in overrides


def test_the_pages_have_the_figures_of_the_committed_run() -> None:
    """README.md and docs/demo.md, from benchmarks/results/demo_llm."""
    root = Path(__file__).parents[2]
    run = json.loads((root / "benchmarks/results/demo_llm/seed_0.json").read_text())
    first, last = (f"{run['held_out_accuracy'][place]:.1%}" for place in (0, -1))
    readme, page = (
        " ".join((root / name).read_text().replace(" %", "%").split()) for name in ("README.md", "docs/demo.md")
    )
    assert (
        f"share of {run['held_out_problems']} held-out problems that it solves rises from {first} to {last}" in readme
    )
    cells = [str(run["seed"]), first, last]
    cells += [f"{run[when][name]:.1%}" for name in ("sampled_accuracy", "ended") for when in ("before", "after")]
    cells += [f"{run[when]['tokens']:.1f}" for when in ("before", "after")]
    assert f"| {' | '.join(cells)} |" in page
    assert f"took {run['seconds']:,.0f} s until the last measurement, and {run['processor_seconds']:.0f} s" in page
    seconds = {name: sum(run["training"][f"timing_s/{name}"]) for name in ("gen", "update_actor", "step")}
    gen, update = (f"{seconds[name] / seconds['step']:.0%}" for name in ("gen", "update_actor"))
    assert f"Sampling took {gen} of the time of the steps, and the update {update}." in page
    assert len(run["training"]["critic/rewards/mean"]) == demo_llm.STEPS
    assert run["held_out_problems"] == demo_llm.VALIDATION_PROBLEMS
