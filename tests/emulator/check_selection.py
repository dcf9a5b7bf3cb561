"""Cases of global_top_mask, by both algorithms, and of its steps over several processes."""

import math
from collections.abc import Iterator
from random import Random

import torch
from comparison import DTYPES, accumulate, compare, equal
from device import to_device
from torch import Tensor

from entropy_rl_ext import reference
from entropy_rl_ext.ops._select_over_ranks import digit_shifts

ops = torch.ops.entropy_rl

# One row and many; around a tile of 4096 keys and two; rows that begin at every alignment; more rows than blocks.
SHAPES = [
    (1, 1), (1, 2), (1, 31), (1, 4095), (1, 4096), (1, 4097), (1, 8191), (1, 8192), (1, 8193), (3, 4096), (2, 8200),
    (130, 33), (200, 70), (1, 70001), (3, 30011), (5, 1), (513, 5), (7, 4099), (2, 3, 50), (2100, 3), (9000, 2),
]  # fmt: skip


def make_values(rng: Random, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[str, Tensor]:
    kind = rng.choice(["random", "ties", "equal", "special", "denormal", "negative", "narrow"])
    x = torch.randn(shape, dtype=torch.float64).abs()
    if kind == "ties":
        x = (x * 4).round()
    elif kind == "equal":
        x.fill_(1.25)
    elif kind == "special":
        values = torch.tensor([0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1.0, 2.0], dtype=torch.float64)
        x = values[torch.randint(0, 8, shape)]
    elif kind == "denormal":
        x = (x * 8).round() * torch.finfo(dtype).smallest_normal / 64
    elif kind == "negative":
        x = -x
    elif kind == "narrow":  # keys that share their upper digits
        x = 1 + x * 1e-5
    return kind, x.to(dtype)


def lay_out(rng: Random, x: Tensor) -> tuple[str, Tensor]:
    """x as it is, as a slice of columns, or one element after an aligned address."""
    if rng.random() < 0.3 and x.dim() == 2:
        wide = torch.zeros(x.shape[0], x.shape[1] + 3, dtype=x.dtype)
        wide[:, 1 : 1 + x.shape[1]] = x
        return "slice", wide[:, 1 : 1 + x.shape[1]]
    if rng.random() < 0.3:
        wide = torch.zeros(x.numel() + 1, dtype=x.dtype)
        wide[1:] = x.reshape(-1)
        return "offset", wide[1:].view(x.shape)
    return "plain", x


def global_top_mask(rng: Random) -> Iterator[str]:
    dtype, shape = rng.choice(DTYPES), rng.choice(SHAPES)
    kind, x = make_values(rng, dtype, shape)
    rule, scope = rng.choice(["topk", "threshold", "quantile"]), rng.choice(["batch", "sequence", "group"])
    if shape[0] > 600 and scope == "sequence":
        scope = "group"  # a block for each of so many rows takes minutes here
    algorithm = rng.choice(["sort", "radix", "radix", "auto"])
    ratio, share = rng.choice([0.2, 0.2, 1.0, 1e-9, 0.5, 0.999]), rng.choice([0.0, 0.5, 0.9, 1.0])
    mask = torch.rand(shape) < share
    if rng.random() < 0.1:  # one token at the end
        mask[...] = False
        mask.view(-1)[-1] = True
    ids = None
    if scope == "group":
        groups = rng.choice([1, 2, 5, min(64, shape[0])])
        ids = torch.randint(0, groups, shape[:-1]) * rng.choice([1, -3, 2**40, -(2**61)])
    layout, x = lay_out(rng, x)
    yield f"{dtype} {shape} {kind} {rule} {scope} {algorithm} ratio={ratio} share={share} {layout}"
    expected = reference.global_top_mask(x, mask, ratio, rule=rule, scope=scope, group_ids=ids)
    actual = ops.global_top_mask_forward(
        to_device(x), to_device(mask), torch.tensor(ratio, dtype=torch.float64), rule, scope,
        None if ids is None else to_device(ids), algorithm,
    )  # fmt: skip
    equal("mask", actual, expected)


def select(
    values: list[Tensor], masks: list[Tensor], k: Tensor, rule: str, weight: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """(mask, lowest) of each process, by the steps that the processes take together; sums stand in for all-reduces."""
    parts = list(zip(values, masks, strict=True))
    key = None
    for shift in digit_shifts(values[0].dtype):
        counts = torch.stack([ops.global_top_mask_counts(*part, key, shift) for part in parts])
        key, k = ops.global_top_mask_key(counts.sum(0), key, k, shift)
    ties = next_key = None
    if rule == "topk":
        ties = counts.index_select(1, (key & (counts.shape[1] - 1)).view(1)).flatten()
    elif rule == "quantile":
        next_key = torch.stack([ops.global_top_mask_next_key(*part, key) for part in parts]).amin()
    return [ops.global_top_mask_at_key(*part, key, k, ties, i, next_key, weight) for i, part in enumerate(parts)]


def global_top_mask_steps(rng: Random) -> Iterator[str]:
    """Values cut into processes: what each keeps, put together, is what global_top_mask keeps of all."""
    dtype = rng.choice(DTYPES)
    sizes = [rng.choice([0, 1, 5, 100, 4096, 8193, 20000, 70001]) for _ in range(rng.choice([1, 2, 3]))]
    kind, x = make_values(rng, dtype, (sum(sizes),))
    rule, ratio = rng.choice(["topk", "threshold", "quantile"]), rng.choice([0.2, 1.0, 1e-9, 0.5])
    mask = torch.rand(x.shape) < rng.choice([0.0, 0.5, 1.0])
    n = int(mask.sum())
    yield f"{dtype} {sizes} {kind} {rule} ratio={ratio} n={n}"
    expected = reference.global_top_mask(x.view(1, -1), mask.view(1, -1), ratio, rule=rule).view(-1)
    weight = None
    if rule == "quantile":
        position = (1 - ratio) * (n - 1) if n else 0.0
        k = n - math.floor(position) if n else 0
        weight = to_device(torch.tensor(position - math.floor(position), dtype=torch.float64))
    else:
        k = min(n, max(1, int(n * ratio + 0.9999))) if n else 0
    values, masks = ([to_device(part.clone()) for part in whole.split(sizes)] for whole in (x, mask))
    results = select(values, masks, to_device(torch.tensor(k)), rule, weight)
    equal("mask", torch.cat([r[0].cpu() for r in results]), expected)
    kept = x[expected].to(accumulate(dtype))
    kept = kept[~kept.isnan()]
    lowest = kept.min() if len(kept) else torch.tensor(math.inf if expected.any() else 0.0)
    for result in results:
        compare("lowest", result[1], lowest, 0.0, 0.0)
