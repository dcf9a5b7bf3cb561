"""Cases of linear_logprob_entropy: vocabularies below, at and above a tile, and every option."""

import math
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from comparison import DTYPES, accumulate, compare, for_dtype, largest
from device import to_device
from torch import Tensor

import entropy_rl_ext as ext
from entropy_rl_ext import reference


def make_factors(rng: Random, dtype: torch.dtype, vocab: int, rows: int) -> dict[str, Tensor | None]:
    """hidden, weight and bias; `vocab` rows of the weight and 3 or none more."""
    width, padded = rng.choice([1, 8, 24]), vocab + rng.choice([0, 0, 3])
    weight = torch.randn(padded, width, dtype=torch.float64) * 3 / math.sqrt(width)
    bias = torch.randn(padded, dtype=torch.float64).to(dtype) if rng.random() < 0.5 else None
    return {
        "hidden": torch.randn(rows, width, dtype=torch.float64).to(dtype),
        "weight": weight.to(dtype),
        "bias": bias,
    }


def make_options(rng: Random, dtype: torch.dtype, rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what changes the results, what does not)"""
    mask = torch.rand(rows) < rng.choice([0.0, 0.6]) if rng.random() < 0.5 else None
    by_row = rng.random() >= 0.7
    temperature = torch.rand(rows, dtype=accumulate(dtype)) + 0.5 if by_row else rng.choice([1.0, 0.7])
    options = {
        "mask": mask, "temperature": temperature, "entropy_grad": True, "logit_scale": rng.choice([1.0, 0.5]),
        "softcap": rng.choice([None, 5.0]), "token_statistics": rng.random() < 0.5,
    }  # fmt: skip
    limits: dict[str, Any] = {"chunk_rows": rng.choice([None, 2, 7])}
    if rng.random() < 0.4:
        limits["max_grad_rows"] = rows
        if mask is not None:
            limits["max_mask_rows"] = max(1, int(mask.sum())) + rng.choice([0, 3])
    return options, limits


def check_gradients(
    rng: Random, factors: list[Tensor], actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], leaves: list[Any]
) -> None:
    """leaves: (on the device, in float64) of each factor."""
    dtype, rows = factors[0].dtype, len(factors[0])
    density = rng.choice([1.0, 0.2, 0.0])
    grads = [torch.randn(rows, dtype=accumulate(dtype)) * (torch.rand(rows) < density) for _ in range(2)]
    got = torch.autograd.grad(actual[:2], [leaf for leaf, _ in leaves], [to_device(g) for g in grads])
    wanted = torch.autograd.grad(expected[:2], [wide for _, wide in leaves], [g.double() for g in grads])
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    unit = for_dtype(dtype, 1e-13, 1e-6 + (eps if dtype != torch.float32 else 0))
    scale = max(1.0, largest(grads) * (1 + math.log(len(factors[1]))) * 2)
    # A gradient is a sum over the other factor; that of the bias is one over the rows.
    sums = [*(float(x.detach().double().abs().sum(0).max()) for x in (factors[1], factors[0])), float(rows)]
    names = ["grad hidden", "grad weight", "grad bias"]
    for name, g, w, total in zip(names, got, wanted, sums, strict=False):
        compare(name, g, w, unit * scale * total + tiny, eps)


def linear_logprob_entropy(rng: Random) -> Iterator[str]:
    dtype = rng.choice(DTYPES)
    vocab, rows = rng.choice([1, 2, 31, 257, 1000, 2055, 8192, 8193, 9001, 17001]), rng.choice([1, 5, 33])
    named = make_factors(rng, dtype, vocab, rows)
    factors = [x for x in named.values() if x is not None]
    options, limits = make_options(rng, dtype, rows)
    mask = options["mask"]
    padding = len(factors[1]) - vocab
    yield f"{dtype} rows={rows} vocab={vocab}+{padding} bias={len(factors) == 3} {options} {limits}"
    targets = torch.randint(0, vocab, (rows,))
    if mask is not None:
        targets = torch.where(mask, targets, -100)
    leaves = [(to_device(x).requires_grad_(), x.double().requires_grad_()) for x in factors]
    actual = ext.linear_logprob_entropy(
        leaves[0][0], leaves[1][0], to_device(targets), bias=leaves[2][0] if len(leaves) == 3 else None,
        vocab_size=vocab if padding else None, **limits,
        **{k: to_device(v) if isinstance(v, Tensor) else v for k, v in options.items()},
    )  # fmt: skip
    expected = reference.linear_logprob_entropy(
        leaves[0][1], leaves[1][1][:vocab], targets, bias=leaves[2][1][:vocab] if len(leaves) == 3 else None, **options
    )
    names = ["log_prob", "entropy", "is_top1", "sum_squared_probs"]
    for name, a, e in zip(names, actual, expected, strict=False):
        compare(name, a, e, for_dtype(dtype, 1e-12, 2e-5), for_dtype(dtype, 1e-12, 1e-6))
    check_gradients(rng, factors, actual, expected, leaves)
