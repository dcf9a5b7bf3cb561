"""Masks given as floats hold 0 and 1 only, in every op that takes a mask."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import entropy_rl_ext as ext
from losses import DTYPES

ROWS, COLUMNS = 3, 5


def tokens(device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(ROWS, COLUMNS, generator=generator).to(device)


def policy(name: str, **options: Any) -> Callable[[Tensor], list[Tensor]]:
    def call(mask: Tensor) -> list[Tensor]:
        log_prob, old, advantages = (tokens(mask.device, seed) for seed in range(3))
        log_prob.requires_grad_()
        masks = {"response_mask": torch.ones_like(mask, dtype=torch.bool), name: mask}
        loss, metrics = ext.policy_loss(log_prob, old, advantages, **masks, **options)
        # A sum, since the gradient of a clipped or masked token is 0.
        return [loss, *metrics.values(), torch.autograd.grad(loss, log_prob)[0].sum()]

    return call


def of_values(op: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], list[Tensor]]:
    def call(mask: Tensor) -> list[Tensor]:
        values = tokens(mask.device, 0).requires_grad_()
        loss = op(values, mask)
        return [loss, torch.autograd.grad(loss, values)[0].sum()]

    return call


# name of the op, and of the argument -> the results that are NaN where a value of the mask is wrong
LOSSES = {
    ("policy_loss", "response_mask"): policy("response_mask"),
    ("policy_loss", "entropy_mask"): policy("entropy_mask"),
    ("policy_loss token-sum", "response_mask"): policy("response_mask", loss_agg_mode="token-sum"),
    ("policy_loss kl_cov", "covariance_mask"): policy("covariance_mask", loss_mode="kl_cov"),
    ("policy_loss geo_mean", "response_mask"): policy("response_mask", loss_mode="geo_mean"),
    ("kl_loss", "response_mask"): of_values(lambda x, mask: ext.kl_loss(x, tokens(x.device, 1), mask)),
    ("aggregate", "mask"): of_values(ext.aggregate),
}


def logits_and_targets(mask: Tensor) -> tuple[Tensor, Tensor]:
    logits = torch.randn(*mask.shape, 11, generator=torch.Generator().manual_seed(0)).to(mask.device)
    return logits, torch.ones_like(mask, dtype=torch.int64)


def linear(mask: Tensor, **options: Any) -> list[Tensor]:
    hidden, targets = logits_and_targets(mask)
    return list(ext.linear_logprob_entropy(hidden, torch.eye(11, device=mask.device), targets, mask=mask, **options))


# The results whose own row alone is NaN.
OVER_LOGITS = {
    ("token_entropy", "mask"): lambda mask: [ext.token_entropy(logits_and_targets(mask)[0], mask=mask)],
    ("token_entropy row temperature", "mask"): lambda mask: [
        ext.token_entropy(logits_and_targets(mask)[0], mask=mask, temperature=torch.ones(COLUMNS, device=mask.device))
    ],
    ("logprob_entropy", "mask"): lambda mask: list(ext.logprob_entropy(*logits_and_targets(mask), mask=mask)),
    ("linear_logprob_entropy", "mask"): linear,
    ("linear_logprob_entropy bounded", "mask"): lambda mask: linear(mask, max_mask_rows=ROWS * COLUMNS),
}
SELECTIONS = {
    ("global_top_mask", "response_mask"): lambda mask: ext.global_top_mask(-tokens(mask.device, 0), mask),
    ("global_top_mask threshold", "response_mask"): lambda mask: ext.global_top_mask(
        -tokens(mask.device, 0), mask, return_threshold=True
    )[0],
    ("get_global_entropy_top_mask", "response_mask"): lambda mask: ext.get_global_entropy_top_mask(
        -tokens(mask.device, 0), mask
    ),
    **{
        (f"covariance_mask {mode}", "response_mask"): lambda mask, mode=mode: ext.covariance_mask(
            *(tokens(mask.device, seed) for seed in range(3)), mask, mode, clip_cov_lb=-9.0, clip_cov_ub=9.0
        )
        for mode in ("clip_cov", "kl_cov")
    },
}
WRONG = [0.5, 2.0, -1.0, -math.inf, math.inf, math.nan]


def mask_with(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    mask = torch.ones(ROWS, COLUMNS, dtype=dtype, device=device)
    mask[0, 2], mask[1, 2] = 0, value  # flat index 7
    return mask


def assert_refused(call: Callable[[Tensor], Any], argument: str, mask: Tensor) -> None:
    value = f"{float(mask[1, 2]):g}"
    message = rf"^{argument}\[7\] \(flat index\) is {value}; a floating-point mask must hold 0 and 1 only$"
    for laid_out in (mask, mask.t().contiguous().t()):
        with pytest.raises(ValueError, match=message):
            call(laid_out)


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("case", LOSSES, ids=" ".join)
def test_a_loss_with_a_wrong_mask(device, case, value):
    mask = mask_with(value, torch.float32, device)
    if device.type == "cpu":
        assert_refused(LOSSES[case], case[1], mask)
        return
    for result in LOSSES[case](mask):
        assert result.isnan().all()


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("case", OVER_LOGITS, ids=" ".join)
def test_a_row_with_a_wrong_mask(device, case, value):
    mask = mask_with(value, torch.float32, device)
    if device.type == "cpu":
        assert_refused(OVER_LOGITS[case], case[1], mask)
        return
    expected = OVER_LOGITS[case](mask_with(1, mask.dtype, device))
    for result, right in zip(OVER_LOGITS[case](mask), expected, strict=True):
        assert result[1, 2].isnan()
        result[1, 2] = right[1, 2]
        assert torch.equal(result, right)


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("case", SELECTIONS, ids=" ".join)
def test_a_selection_with_a_wrong_mask(device, case, value):
    """A selection cannot be NaN: it is empty, and a threshold is NaN."""
    mask = mask_with(value, torch.float32, device)
    if device.type == "cpu":
        assert_refused(SELECTIONS[case], case[1], mask)
        return
    assert not SELECTIONS[case](mask).any()
    assert ext.global_top_mask(-tokens(device, 0), mask, return_threshold=True)[1].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LOSSES | OVER_LOGITS | SELECTIONS, ids=" ".join)
def test_zeros_and_ones_of_any_dtype(device, case, dtype):
    call = (LOSSES | OVER_LOGITS | SELECTIONS)[case]
    results, expected = (call(mask_with(-0.0, kind, device)) for kind in (dtype, torch.bool))
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_value_of_any_dtype(device, dtype):
    mask = mask_with(0.5, dtype, device)
    if device.type == "cpu":
        assert_refused(LOSSES["aggregate", "mask"], "mask", mask)
    else:
        assert ext.aggregate(tokens(device, 0), mask).isnan()


def test_integers_that_are_not_zero_are_in(device):
    mask = mask_with(255, torch.uint8, device)
    assert torch.equal(
        ext.global_top_mask(-tokens(device, 0), mask), ext.global_top_mask(-tokens(device, 0), mask != 0)
    )
