"""The demo from end to end, too short to learn anything."""

import json
import re
from pathlib import Path

import pytest
import torch

from entropy_rl import demo


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TRAIN_PROBLEMS", 256)
    monkeypatch.setattr(demo, "VALIDATION_PROBLEMS", 16)


@pytest.mark.usefixtures("small")
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "demo"
    monkeypatch.setattr("sys.argv", ["demo", f"--directory={directory}", "--warmup-steps=2", "--steps=2"])
    assert demo.main() == 0
    shown = capsys.readouterr().out
    results = json.loads((directory / "results.json").read_text())
    assert len(results["held_out_accuracy"]) == 3 and len(results["training_reward"]) == 2
    assert 0 <= results["after"]["forks_selected"] <= 1
    assert re.search(r"^solved, of 16 held-out problems \(greedy\) +[\d.]+% +[\d.]+%$", shown, flags=re.MULTILINE)
    assert re.search(r"\x1b\[1;30;43m\S+\x1b\[0m", shown), "a selected token is coloured"
    for path in re.findall(r"^(?:metrics|curves|model|command) +(.*)$", shown, flags=re.MULTILINE):
        assert all(Path(part).exists() for part in path.split(", "))


def test_the_tokenizer_has_a_token_for_each_word() -> None:
    tokenizer = demo.make_tokenizer()
    text = "4 9 3 -> 39 : 4 * 9 = 36 , 36 + 3 = 39"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.split()) and tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id not in ids


def test_the_pages_have_the_figures_of_the_committed_runs() -> None:
    """README.md and docs/demo.md, from benchmarks/results/demo."""
    root = Path(__file__).parents[2]
    runs = [json.loads(path.read_text()) for path in sorted((root / "benchmarks/results/demo").glob("*.json"))]
    before, after = ([run["held_out_accuracy"][place] for run in runs] for place in (0, -1))
    rise = f"rises from {sum(before) / len(runs):.1%} to {sum(after) / len(runs):.1%}".replace("%", " %")
    assert rise in " ".join((root / "README.md").read_text().split())
    page = (root / "docs/demo.md").read_text()
    for run, first, last in zip(runs, before, after, strict=True):
        assert f"| {run['seed']} | {first:.1%} | {last:.1%} | {100 * (last - first):+.1f} |".replace("%", " %") in page


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_muon_takes_the_steps_of_pytorchs_up_to_bfloat16(shape: tuple[int, int]) -> None:
    start, gradients = torch.randn(shape), torch.randn(5, *shape)
    trained = []
    for optimizer_class in (torch.optim.Muon, demo.Muon):
        matrix = torch.nn.Parameter(start.clone())
        optimizer = optimizer_class([matrix], lr=0.02, weight_decay=0.01)
        for gradient in gradients:
            matrix.grad = gradient.clone()
            optimizer.step()
        trained.append(matrix.detach() - start)
    theirs, ours = trained
    assert theirs.norm() > 0.1 and (ours - theirs).norm() < 0.03 * theirs.norm()
