"""Cases of token_entropy and logprob_entropy: every layout, mask and temperature, and logits that break sums."""

import math
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from comparison import DTYPES, accumulate, compare, finite_rows, for_dtype, gradient_scale
from device import to_device
from torch import Tensor

import entropy_rl_ext as ext
from entropy_rl_ext import reference

LAYOUTS = ["plain", "slice", "odd slice", "transposed", "expanded", "four dims"]


def make_logits(rng: Random, dtype: torch.dtype, vocab: int, rows: int) -> tuple[str, Tensor]:
    """Logits in a layout that the ops take without a copy, or must copy."""
    layout = rng.choice(LAYOUTS)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)

    if layout == "plain":
        return layout, random(rows, vocab)
    if layout == "slice":
        return layout, random(rows + 2, vocab + 5)[1:-1, 3 : 3 + vocab]
    if layout == "odd slice":
        return layout, random(rows, 1, vocab + 1)[..., 1:]
    if layout == "transposed":
        return layout, random(3, rows, vocab).transpose(0, 1)
    if layout == "expanded":
        return layout, random(rows, 1, vocab).expand(rows, 2, vocab)
    return layout, random(2, 2, rows, vocab + 2)[:, :, :, 1 : 1 + vocab].permute(2, 0, 1, 3)


def spoil(rng: Random, x: Tensor) -> str:
    """Writes values that break sums into x, and returns which."""
    if 0 in x.stride():
        return "none"
    kind = rng.choice(["none", "none", "huge", "-inf", "row of -inf", "nan", "+inf", "equal"])
    first_row = x[tuple(0 for _ in x.shape[:-1])]
    if kind == "huge":
        x.mul_(1e4)
    elif kind == "-inf":
        x[..., ::2] = -math.inf
        first_row[-1] = 1.0
    elif kind == "row of -inf":
        first_row[:] = -math.inf
    elif kind == "nan":
        first_row[-1] = math.nan
    elif kind == "+inf":
        first_row[-1] = math.inf
    elif kind == "equal":
        x[...] = -7.5
    return kind


def make_size(rng: Random) -> tuple[int, int]:
    """(vocab, rows): a warp a row, a block a row, and rows of several parts."""
    vocab = rng.choice([1, 2, 7, 8, 31, 127, 257, 1000, 1024, 2055, 4099, 8192, 20001, 50257, 70003])
    if vocab > 5000:
        rows = rng.choice([1, 2, 3, 5, 9])
    elif vocab > 300:
        rows = rng.choice([1, 3, 40, 200])
    else:
        rows = rng.choice([1, 7, 300, 800])
    if 4000 < vocab < 5000 and rng.random() < 0.15:
        rows = 400  # with two or more leading dimensions, above the rows that get a block each
    return vocab, rows


def make_options(rng: Random, shape: torch.Size, dtype: torch.dtype) -> dict[str, Any]:
    temperature: float | Tensor = rng.choice([1.0, 0.6, 1.7])
    if rng.random() < 0.3:
        temperature = torch.rand(shape, dtype=accumulate(dtype)) + 0.5
    mask = None
    if rng.random() < 0.6:
        mask = torch.rand(shape) < rng.choice([0.0, 0.5, 0.9])
        mask = mask.to(rng.choice([torch.bool, torch.int64, torch.float32]))
    return {"mask": mask, "temperature": temperature}


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    return {k: to_device(v) if isinstance(v, Tensor) else v for k, v in options.items()}


def check_gradient(
    rng: Random,
    x: Tensor,
    kind: str,
    options: dict[str, Any],
    leaves: tuple[Tensor, Tensor],
    outputs: list[tuple[Tensor, Tensor]],
) -> None:
    """leaves: the logits on the device and in float64; outputs: (actual, expected) of those with a gradient."""
    dtype, shape, mask = x.dtype, x.shape[:-1], options["mask"]
    density = rng.choice([1.0, 0.2, 0.0])
    grads = [torch.randn(shape, dtype=accumulate(dtype)) * (torch.rand(shape) < density) for _ in outputs]
    if len(outputs) == 2 and rng.random() < 0.3:
        chosen = rng.randrange(2)
        outputs, grads = [outputs[chosen]], [grads[chosen]]
    (got,) = torch.autograd.grad([o[0] for o in outputs], leaves[0], [to_device(g) for g in grads])
    (wanted,) = torch.autograd.grad([o[1] for o in outputs], leaves[1], [g.double() for g in grads])
    got = got.cpu().double()
    # A row without a gradient is zero, whatever its logits; NaN times zero is not.
    used = torch.stack([g != 0 for g in grads]).any(0)
    if mask is not None:
        used &= mask != 0
    wanted = torch.where(used.unsqueeze(-1), wanted, 0.0)
    scale = gradient_scale(grads, x.shape[-1], options["temperature"])
    atol = for_dtype(dtype, 1e-13, 1e-6) * scale + torch.finfo(dtype).smallest_normal
    # The reference's own derivative is NaN in places of a row with an infinite logit.
    compared = torch.isfinite(wanted) if kind == "-inf" else finite_rows(x)
    compare(
        "gradient", torch.where(compared, got, 0.0), torch.where(compared, wanted, 0.0), atol, torch.finfo(dtype).eps
    )


def logits_case(rng: Random, with_targets: bool) -> Iterator[str]:
    dtype = rng.choice(DTYPES)
    vocab, rows = make_size(rng)
    layout, x = make_logits(rng, dtype, vocab, rows)
    kind = spoil(rng, x)
    options = make_options(rng, x.shape[:-1], dtype)
    mask, temperature = options["mask"], options["temperature"]
    yield (
        f"{dtype} {tuple(x.shape)} {layout} {kind} mask={None if mask is None else mask.dtype} "
        f"T={temperature if isinstance(temperature, float) else 'rows'}"
    )
    targets = torch.randint(0, vocab, x.shape[:-1])
    if mask is not None:
        targets = torch.where(mask != 0, targets, -100)
    leaf, wide = to_device(x).requires_grad_(), x.double().requires_grad_()
    if with_targets:
        entropy_grad = rng.random() < 0.7
        actual = ext.logprob_entropy(leaf, to_device(targets), entropy_grad=entropy_grad, **on_device(options))
        expected = reference.logprob_entropy(wide, targets, entropy_grad=entropy_grad, **options)
        with_gradient = 2 if entropy_grad else 1
    else:
        actual = (ext.token_entropy(leaf, **on_device(options)),)
        expected = (reference.token_entropy(wide, **options),)
        with_gradient = 1
    rtol = for_dtype(dtype, 1e-13 * (1e4 if kind == "huge" else 1.0), 1e-6)
    for name, a, e in zip(["log_prob", "entropy"][-len(actual) :], actual, expected, strict=True):
        compare(name, a, e, for_dtype(dtype, 1e-12, 1e-5), rtol)
    outputs = list(zip(actual, expected, strict=True))[:with_gradient]
    check_gradient(rng, x, kind, options, (leaf, wide), outputs)


def token_entropy(rng: Random) -> Iterator[str]:
    return logits_case(rng, False)


def logprob_entropy(rng: Random) -> Iterator[str]:
    return logits_case(rng, True)
