"""`entropy-rl inspect --figures`: the paper's figures as numbers and as a picture."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from entropy_rl.errors import UserError
from entropy_rl.report.completions import Completion
from entropy_rl.report.figures import write_figures
from entropy_rl.report.measure import Measurement
from entropy_rl.report.page import MeasuredModel


def measured(name: str, entropy: torch.Tensor) -> MeasuredModel:
    top = torch.zeros(len(entropy), 1)
    return MeasuredModel(name, Measurement(entropy, torch.zeros_like(entropy), top.long(), top))


def test_figures(tmp_path: Path, model_path: Path) -> None:
    """Ten completions of ten tokens; token `a` has an entropy of 2 nats, `$` of 1 and `b` of 0.001."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    a, dollar, b = (tokenizer.encode(text)[0] for text in ("a", "$", "b"))
    completions = [Completion([b], [a, dollar, *[b] * 8]) for _ in range(10)]
    entropy = torch.tensor([2.0, 1.0, *[0.001] * 8]).repeat(10)
    other = torch.tensor([2.0, 0.0, 1.0, *[0.001] * 7]).repeat(10)
    models = [measured("before", entropy), measured("after", other)]
    write_figures(tmp_path, models, completions, tokenizer, ratio=0.2, temperature=0.7, sampling_temperature=1.0)

    found = json.loads((tmp_path / "entropy.json").read_text())
    assert (found["tokens"], found["completions"]) == (100, 10)
    assert (found["temperature"], found["sampling_temperature"], found["ratio"]) == (0.7, 1.0, 0.2)
    before = found["models"]["before"]
    assert math.isclose(before["mean"], 0.3008, rel_tol=1e-6)
    assert math.isclose(before["percentiles"]["50"], 0.001, rel_tol=1e-6)
    assert before["percentiles"]["95"] == 2.0
    assert before["below_0.01"] == 0.8
    assert before["threshold"] == 1.0
    counts, edges = before["histogram"]["counts"], before["histogram"]["edges"]
    assert len(edges) == len(counts) + 1 and (edges[0], edges[-1]) == (0.0, 2.0)
    assert (counts[0], counts[30], counts[-1], sum(counts)) == (80, 10, 10, 100)
    rows = [("a", 2.0, 10), ("$", 1.0, 10), ("b", 0.001, 80)]
    for end, expected in (("highest", rows), ("lowest", rows[::-1])):
        assert [(row["token"], round(row["mean_entropy"], 6), row["occurrences"]) for row in before[end]] == expected
    # Both models select `a`; the other half of their fifths differ. The least share selects five of the ten `a`.
    assert found["overlap"] == {"0.05": 1.0, "0.1": 1.0, "0.2": 0.5, "0.5": 0.8}
    assert (tmp_path / "entropy.png").read_bytes().startswith(b"\x89PNG")


def test_rare_tokens_are_left_out(tmp_path: Path, model_path: Path) -> None:
    """Among many tokens, a mean over few occurrences is noise."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    common = [tokenizer.encode(chr(ord("a") + i))[0] for i in range(20)]
    (rare,) = tokenizer.encode("$")
    completion = Completion([rare], [*common * 10, rare])
    entropy = torch.cat([torch.arange(20.0).repeat(10), torch.tensor([99.0])])
    write_figures(
        tmp_path,
        [measured("m", entropy)],
        [completion],
        tokenizer,
        ratio=0.2,
        temperature=1.0,
        sampling_temperature=None,
    )
    found = json.loads((tmp_path / "entropy.json").read_text())
    assert "overlap" not in found
    model = found["models"]["m"]
    assert model["least_occurrences"] == 5
    assert [row["token"] for row in model["highest"]] == [chr(ord("t") - i) for i in range(20)]


def test_an_entropy_that_is_not_finite(tmp_path: Path, model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    entropy = torch.tensor([1.0, math.nan])
    with pytest.raises(UserError, match="all entropies must be finite; under m, those of 1 of 2 tokens are not"):
        write_figures(
            tmp_path,
            [measured("m", entropy)],
            [Completion([5], [6, 7])],
            tokenizer,
            ratio=0.2,
            temperature=1.0,
            sampling_temperature=None,
        )
    assert not list(tmp_path.iterdir())


def test_the_page_has_the_figures_of_its_file() -> None:
    """docs/entropy.md, from benchmarks/results/entropy."""
    root = Path(__file__).parents[3]
    page = (root / "docs" / "entropy.md").read_text()
    names = ("smollm2_135m", "smollm2_135m_temperature_0.7")
    results = [json.loads((root / "benchmarks" / "results" / "entropy" / f"{name}.json").read_text()) for name in names]
    models = [model for result in results for model in result["models"].values()]
    rows = {
        "sampled tokens": [f"{result['tokens']:,}" for result in results],
        "below 0.01 nats": [f"{100 * model['below_0.01']:.1f} %" for model in models],
    }
    rows |= {
        f"{share} below": [f"{model['percentiles'][percentile]:.3f} nats" for model in models]
        for share, percentile in (("half are", "50"), ("80 % are", "80"), ("95 % are", "95"))
    }
    for name, values in rows.items():
        assert f"| {name} | {' | '.join(values)} |" in page
    for model in models:
        assert f"A token needs {model['least_occurrences']} occurrences" in page
    named = (
        (("A", "To", "The", " This", " So", " but", " only", " not"), ("0", "9", " $", "%", " =", " of")),
        (("There", " calculate", " convert", " multiply", " find"), (" paint", " balls", " eggs", " many", " than")),
    )
    for model, (highest, lowest) in zip(models, named, strict=True):
        assert set(highest) <= {row["token"] for row in model["highest"]}
        assert set(lowest) <= {row["token"] for row in model["lowest"]}
    trained = json.loads((root / "benchmarks" / "results" / "entropy" / "smollm2_135m_trained.json").read_text())
    for share, overlap in trained["overlap"].items():
        assert f"| {float(share):.0%} | {overlap:.1%} |".replace("%", " %") in page
    after, before = (model["mean"] for model in trained["models"].values())
    assert f"from {before:.3f} to {after:.3f} nats" in page and f"{trained['tokens']:,} tokens" in page
