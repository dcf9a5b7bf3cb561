"""Cases of policy_loss, kl_loss and aggregate: every loss, aggregation and shape of a batch."""

import math
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from comparison import DTYPES, compare, for_dtype
from device import to_device
from torch import Tensor

import entropy_rl_ext as ext
from entropy_rl_ext import reference

LOSS_MODES = ["vanilla", "gpg", "clip_cov", "kl_cov", "gspo", "geo_mean", "dppo_tv", "dppo_kl", "sapo", "dro", "cispo"]
AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
# Around the tokens of a block; more rows, and more blocks, than one finishing block takes at once; nothing at all.
SHAPES = [
    (1, 1), (3, 7), (1, 2047), (2, 2048), (3, 2049), (2, 5000), (600, 3), (1, 70000), (70, 33), (5, 0), (0, 4),
    (1100, 1), (2, 131073),
]  # fmt: skip

Batch = dict[str, Tensor]


def make_batch(rng: Random, dtype: torch.dtype, shape: tuple[int, int]) -> Batch:
    b = {"log_prob": -torch.rand(shape) * 3, "advantages": torch.randn(shape), "weights": torch.rand(shape) * 2}
    b["old"] = (b["log_prob"] + torch.randn(shape)).clamp(max=0)
    b = {name: value.to(dtype) for name, value in b.items()}
    b["response"] = torch.rand(shape) < rng.choice([0.0, 0.8, 1.0])
    b["entropy"] = torch.rand(shape) < 0.3
    if rng.random() < 0.5:  # tokens outside the response may hold anything
        for name in ("log_prob", "old", "advantages"):
            b[name] = torch.where(b["response"], b[name], math.nan)
    if rng.random() < 0.3 and shape[-1] > 1:  # a slice of columns
        for name in ("log_prob", "old", "advantages"):
            wide = torch.zeros(shape[0], shape[1] + 1, dtype=dtype)
            wide[:, 1:] = b[name]
            b[name] = wide[:, 1:]
    return b


def aggregation_options(rng: Random, shape: tuple[int, int]) -> dict[str, Any]:
    options: dict[str, Any] = {"loss_agg_mode": rng.choice(AGGREGATIONS)}
    if rng.random() < 0.5 or shape[1] == 0:  # the default loss_scale_factor is the number of columns
        options.update(dp_size=2, batch_num_tokens=700, global_batch_size=12, loss_scale_factor=50.0)
    return options


def summed_tokens(b: Batch, options: dict[str, Any]) -> int:
    """How many losses a loss adds up without dividing by their number."""
    return max(1, b["response"].numel()) if "sum" in options["loss_agg_mode"] else 1


def compare_loss(actual: Tensor, expected: Tensor, leaf: Tensor, wide: Tensor, scale: float) -> None:
    dtype = leaf.dtype
    compare("loss", actual, expected, for_dtype(dtype, 1e-13, 4e-6) * scale, for_dtype(dtype, 1e-13, 1e-6))
    (got,) = torch.autograd.grad(actual, leaf)
    (wanted,) = torch.autograd.grad(expected, wide)
    largest = wanted.abs().max().item() if wanted.numel() else 0
    eps = torch.finfo(dtype).eps
    compare("gradient", got, wanted, 32 * min(eps, 1.2e-7) * largest + torch.finfo(dtype).smallest_normal, eps)


def policy_loss(rng: Random) -> Iterator[str]:
    dtype, shape, mode = rng.choice(DTYPES), rng.choice(SHAPES), rng.choice(LOSS_MODES)
    b = make_batch(rng, dtype, shape)
    options = {
        "loss_mode": mode, "normalize": rng.choice(["selected", "response"]), "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.28, "clip_ratio_c": 1.5, "clip_cov_ratio": rng.choice([0.2, 0.0002]),
        "clip_cov_lb": -0.5, "clip_cov_ub": 1.0, "kl_cov_ratio": rng.choice([0.2, 0.0002, 1.0]), "dro_beta": 0.3,
        "seed": 11, **aggregation_options(rng, shape),
    }  # fmt: skip
    optional = {}
    if rng.random() < 0.5:
        optional["entropy_mask"] = b["entropy"]
    if rng.random() < 0.5:
        optional["rollout_is_weights"] = b["weights"]
    if rng.random() < 0.5:  # clip ratios of each token
        names = rng.choice([["clip_ratio_low"], ["clip_ratio_high"], ["clip_ratio_low", "clip_ratio_high"]])
        for name, values in zip(names, ((0.1, 0.3), (0.2, 0.5)), strict=False):
            ratios = torch.where(torch.rand(shape) < 0.3, *values).to(dtype)
            optional[name] = torch.where(b["response"], ratios, math.nan)
        options = {name: value for name, value in options.items() if name not in optional}
    yield f"{dtype} {shape} {options} {list(optional)} response={int(b['response'].sum())} {b['log_prob'].stride()}"
    leaf, wide = to_device(b["log_prob"]).requires_grad_(), b["log_prob"].double().requires_grad_()
    names = ("old", "advantages", "response")
    loss, metrics = ext.policy_loss(
        leaf, *(to_device(b[name]) for name in names), **{k: to_device(v) for k, v in optional.items()}, **options
    )
    in_double = {k: v.double() if v.is_floating_point() else v for k, v in {**b, **optional}.items()}
    wanted, wanted_metrics = reference.policy_loss(
        wide, *(in_double[name] for name in names), **{k: in_double[k] for k in optional}, **options
    )
    compare_loss(loss, wanted, leaf, wide, 32.0 * summed_tokens(b, options))
    assert metrics.keys() == wanted_metrics.keys()
    for name, value in metrics.items():
        compare(name, value, wanted_metrics[name], for_dtype(dtype, 1e-12, 4e-6), 1e-6)


def kl_loss(rng: Random) -> Iterator[str]:
    dtype, shape = rng.choice(DTYPES), rng.choice(SHAPES)
    b = make_batch(rng, dtype, shape)
    weights = rng.choice([None, b["weights"]])
    kind = rng.choice(["kl", "abs", "mse", "low_var_kl", "k1", "k2", "k3"]) + rng.choice(["", "+"])
    options = {"kl_loss_type": kind, **aggregation_options(rng, shape)}
    yield f"{dtype} {shape} {options} weights={weights is not None} response={int(b['response'].sum())}"
    leaf, wide = to_device(b["log_prob"]).requires_grad_(), b["log_prob"].double().requires_grad_()
    on_device = None if weights is None else to_device(weights)
    loss = ext.kl_loss(leaf, to_device(b["old"]), to_device(b["response"]), weights=on_device, **options)
    in_double = None if weights is None else weights.double()
    wanted = reference.kl_loss(wide, b["old"].double(), b["response"], weights=in_double, **options)
    compare_loss(loss, wanted, leaf, wide, 32.0 * summed_tokens(b, options))


def aggregate(rng: Random) -> Iterator[str]:
    dtype, shape = rng.choice(DTYPES), rng.choice(SHAPES)
    b = make_batch(rng, dtype, shape)
    options = aggregation_options(rng, shape)
    yield f"{dtype} {shape} {options} response={int(b['response'].sum())}"
    leaf, wide = to_device(b["log_prob"]).requires_grad_(), b["log_prob"].double().requires_grad_()
    loss = ext.aggregate(leaf, to_device(b["response"]), **options)
    wanted = reference.aggregate(wide, b["response"], **options)
    compare_loss(loss, wanted, leaf, wide, 4.0 * summed_tokens(b, options))
