"""The paper's figures (arXiv 2506.01939) for the tokens of a page: their entropies' distribution (Figure 2), and how
many of the selected positions two models share (Table 1)."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entropy_rl.errors import UserError
from entropy_rl.report.completions import Completion
from entropy_rl.report.page import MeasuredModel
from entropy_rl.report.tokens import token_text
from entropy_rl_ext import global_top_mask

PERCENTILES = (25, 50, 75, 80, 90, 95, 99)
SHARES = (0.05, 0.1, 0.2, 0.5)
ALMOST_CERTAIN = 0.01  # nats; the paper counts the tokens below it
BINS = 60
TOKENS = 20  # of highest, and of lowest, mean entropy


def write_figures(
    directory: Path,
    models: Sequence[MeasuredModel],
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ratio: float,
    temperature: float,
    sampling_temperature: float | None,
) -> None:
    """Writes entropy.json and entropy.png to an existing directory. The arguments are those of `page.write_page`.

    Entropies are in nats. "threshold" is the least entropy among the tokens that `ratio` selects.

    Raises:
        UserError: an entropy is not finite.
    """
    for model in models:
        unknown = int((~model.measurement.entropy.isfinite()).sum())
        if unknown:
            raise UserError(
                f"--figures {directory}: all entropies must be finite; under {model.name}, those of {unknown:,} of "
                f"{len(model.measurement.entropy):,} tokens are not"
            )
    tokens = torch.tensor([token for completion in completions for token in completion.tokens])
    found: dict[str, Any] = {
        "tokens": len(tokens),
        "completions": len(completions),
        "temperature": temperature,
        "sampling_temperature": sampling_temperature,
        "ratio": ratio,
        "models": {model.name: _distribution(model.measurement.entropy, tokens, tokenizer, ratio) for model in models},
    }
    if len(models) == 2:
        first, second = (model.measurement.entropy for model in models)
        found["overlap"] = {str(share): _overlap(first, second, share) for share in SHARES}
    (directory / "entropy.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _draw(found, directory / "entropy.png")


def _select(entropy: Tensor, share: float) -> Tensor:
    return global_top_mask(entropy[None], torch.ones(1, len(entropy), dtype=torch.bool), share)[0]


def _overlap(first: Tensor, second: Tensor, share: float) -> float:
    """The share of the positions selected by the first entropies that the second ones select, too."""
    selected = _select(first, share)
    return (selected & _select(second, share)).sum().item() / selected.sum().item()


def _distribution(entropy: Tensor, tokens: Tensor, tokenizer: PreTrainedTokenizerBase, ratio: float) -> dict[str, Any]:
    exact = entropy.double()
    counts, edges = torch.histogram(exact, BINS, range=(0.0, max(exact.max().item(), ALMOST_CERTAIN)))
    least, ranked = _by_mean_entropy(exact, tokens)
    return {
        "mean": exact.mean().item(),
        "percentiles": dict(zip(map(str, PERCENTILES), numpy.percentile(exact, PERCENTILES).tolist(), strict=True)),
        f"below_{ALMOST_CERTAIN}": (exact < ALMOST_CERTAIN).double().mean().item(),
        "threshold": entropy[_select(entropy, ratio)].min().item(),
        "histogram": {"edges": edges.tolist(), "counts": counts.long().tolist()},
        "least_occurrences": least,
        "highest": _rows(ranked[:TOKENS], tokenizer),
        "lowest": _rows(ranked[: -TOKENS - 1 : -1], tokenizer),
    }


def _by_mean_entropy(entropy: Tensor, tokens: Tensor) -> tuple[int, list[tuple[int, float, int]]]:
    """Token id, mean entropy and number of occurrences, the highest mean first, of the tokens that occur often enough.

    How often that is comes first. It is the rule of the page's table: a mean over few tokens is noise, so the bound
    grows with the input, but it leaves enough tokens to show.
    """
    count = tokens.bincount()
    mean = tokens.bincount(weights=entropy) / count
    often = count.sort(descending=True).values[:TOKENS].min().item()
    least = max(1, min(max(5, round(math.sqrt(len(tokens)) / 4)), int(often)))
    frequent = (count >= least).nonzero()[:, 0]
    order = frequent[mean[frequent].argsort(descending=True, stable=True)].tolist()
    return least, [(token, mean[token].item(), int(count[token])) for token in order]


def _rows(ranked: Sequence[tuple[int, float, int]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    return [
        {"token": token_text(tokenizer, token), "mean_entropy": mean, "occurrences": count}
        for token, mean, count in ranked
    ]


def _draw(found: dict[str, Any], path: Path) -> None:
    """Draws for each model the histogram, and bars for the tokens of highest and of lowest mean entropy."""
    from matplotlib.figure import Figure

    models = found["models"]
    figure = Figure(figsize=(13, 4.6 * len(models)), layout="constrained")
    rows = figure.subplots(len(models), 3, squeeze=False, width_ratios=(2, 1, 1))
    for (histogram, highest, lowest), (name, model) in zip(rows, models.items(), strict=True):
        edges, counts = model["histogram"]["edges"], model["histogram"]["counts"]
        histogram.stairs(counts, edges, fill=True, color="#b9b4ab")
        histogram.set_yscale("log")
        threshold = model["threshold"]
        histogram.axvline(threshold, color="#b1341a")
        histogram.set_title(
            f"{name}: {found['tokens']:,} tokens; the {found['ratio']:.0%} of highest entropy begin at "
            f"{threshold:.3f} nats",
            fontsize=10,
        )
        histogram.set_xlabel("entropy of a token, nats")
        histogram.set_ylabel("tokens")
        for axes, end in ((highest, "highest"), (lowest, "lowest")):
            entries = model[end][::-1]
            places = range(len(entries))
            axes.barh(places, [entry["mean_entropy"] for entry in entries], color="#b9b4ab")
            # "$" is a token here, not the beginning of a formula.
            axes.set_yticks(places, [_visible(entry["token"]) for entry in entries], parse_math=False)
            axes.set_title(f"tokens of {end} mean entropy", fontsize=10)
            axes.set_xlabel("nats")
            axes.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=110)


def _visible(text: str) -> str:
    """The text with its spaces, line ends and control characters to see."""
    return "".join("\N{OPEN BOX}" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in text)
