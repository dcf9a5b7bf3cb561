"""Inputs and tolerances that the tests of policy_loss, kl_loss and aggregate share."""

import itertools

import torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
AGGREGATIONS = [
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
]

SHAPES = [
    (1, 1),  # one token
    (3, 7),  # rows shorter than one vector of the CPU loop
    (5, 300),  # more than one chunk of the CPU loop, the last one ragged
    (2, 2048),  # a row is exactly one tile
    (3, 5000),  # rows of several tiles, the last one ragged
    (70, 33),  # many short rows: several tasks of the CPU's threads
]


def make_batch(shape, dtype, device, seed=0):
    """log_prob, old_log_prob, advantages, weights; response and entropy mask with an empty row each."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        values = torch.rand(shape, generator=generator, dtype=torch.float64)
        return (values * (high - low) + low).to(dtype).to(device)

    log_prob = uniform(-3, 0)
    old_log_prob = (log_prob + uniform(-1, 1)).clamp(max=0)
    response = torch.rand(shape, generator=generator) < 0.8
    entropy = torch.rand(shape, generator=generator) < 0.3
    if shape[0] > 2:
        response[1] = False
        entropy[2] = False
    return {
        "log_prob": log_prob,
        "old_log_prob": old_log_prob,
        "advantages": uniform(-2, 2),
        "weights": uniform(0, 2),
        "response_mask": response.to(device),
        "entropy_mask": entropy.to(device),
    }


def assert_within(actual, expected, scale, rounding=1):
    """Within `rounding` roundings of the result's dtype at `scale`, arithmetic being at least float32."""
    eps = torch.finfo(actual.dtype).eps
    arithmetic = 32 * min(eps, torch.finfo(torch.float32).eps)
    error = (actual.double() - expected.double()).abs()
    bound = arithmetic * scale + rounding * eps * expected.double().abs()
    bound = bound + torch.finfo(actual.dtype).smallest_normal
    assert (error <= bound).all(), f"largest excess {(error - bound).max().item()} at scale {scale}"


def with_batch_numbers():
    """Every aggregation, with this batch's divisors and with given ones."""
    given = {"dp_size": 2, "batch_num_tokens": 700, "global_batch_size": 12, "loss_scale_factor": 50.0}
    return [{"loss_agg_mode": mode, **batch} for mode, batch in itertools.product(AGGREGATIONS, [{}, given])]
