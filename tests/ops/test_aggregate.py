"""aggregate: the five aggregations against their formulas, gradient, compile and bad input."""

import math

import pytest
import torch

from compiled import compile_counting
from entropy_rl_ext import aggregate, reference
from losses import AGGREGATIONS, DTYPES, SHAPES, assert_within, make_batch, with_batch_numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_with_reference(device, dtype, shape):
    batch = make_batch(shape, dtype, device)
    values, mask = batch["advantages"].requires_grad_(), batch["response_mask"]
    wide = values.detach().double().requires_grad_()
    for aggregation in with_batch_numbers():
        actual, expected = aggregate(values, mask, **aggregation), reference.aggregate(wide, mask, **aggregation)
        assert_within(actual, expected, 4.0 * reference.aggregate(torch.ones_like(wide), mask, **aggregation).detach())
        (gradient,) = torch.autograd.grad(actual, values)
        (wanted,) = torch.autograd.grad(expected, wide)
        assert gradient.dtype == dtype
        assert_within(gradient, wanted, wanted.abs().max())


def test_each_aggregation_as_it_is_documented(device):
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], device=device)
    mask = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]], device=device)
    expected = {
        "token-mean": 9 / 3,
        "token-sum": 9,
        "seq-mean-token-sum": (3 + 6) / 2,
        "seq-mean-token-sum-norm": (3 + 6) / 2 / 3,
        "seq-mean-token-mean": (1.5 + 6) / 2,
    }
    for mode in AGGREGATIONS:
        assert aggregate(values, mask, loss_agg_mode=mode).item() == pytest.approx(expected[mode])
        doubled = aggregate(values, mask, loss_agg_mode=mode, dp_size=2, batch_num_tokens=3, global_batch_size=2)
        assert doubled.item() == pytest.approx(2 * expected[mode])


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_values_outside_the_mask_have_no_influence(device, mode):
    batch = make_batch((5, 300), torch.float32, device)
    mask = batch["response_mask"]
    values = torch.where(mask, batch["advantages"], math.nan).requires_grad_()
    loss = aggregate(values, mask, loss_agg_mode=mode)
    assert torch.equal(loss, aggregate(batch["advantages"], mask, loss_agg_mode=mode))
    (gradient,) = torch.autograd.grad(loss, values)
    assert (gradient[~mask] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(3, 9), (0, 5), (5, 0)], ids=str)
def test_nothing_in_the_mask_gives_zero(device, mode, shape):
    values = torch.randn(shape, device=device, requires_grad=True)
    loss = aggregate(values, torch.zeros(shape, device=device), loss_agg_mode=mode)
    (gradient,) = torch.autograd.grad(loss, values)
    assert loss.item() == 0 and (gradient == 0).all()


def test_entropy_bonus_reaches_the_entropy(device):
    entropy = torch.rand(3, 9, device=device, requires_grad=True)
    mask = torch.ones(3, 9, device=device)
    (gradient,) = torch.autograd.grad(0.01 * aggregate(entropy, mask), entropy)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 0.01 / 27))


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_gradcheck(device, mode):
    batch = make_batch((3, 9), torch.float64, device)
    values, mask = batch["advantages"].requires_grad_(), batch["response_mask"]
    assert torch.autograd.gradcheck(lambda x: aggregate(x, mask, loss_agg_mode=mode), (values,))


def test_long_sums_keep_their_digits(device):
    values = torch.full((1, 3_000_000), 0.1, device=device)
    loss = aggregate(values, torch.ones_like(values), loss_agg_mode="token-sum")
    torch.testing.assert_close(loss, values.double().sum().float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_packed_tokens_are_one_row(device, mode):
    batch = make_batch((1, 300), torch.float32, device)
    row = batch["advantages"].requires_grad_()
    packed = row.detach()[0].requires_grad_()
    losses = [
        aggregate(values, mask, loss_agg_mode=mode)
        for values, mask in ((row, batch["response_mask"]), (packed, batch["response_mask"][0]))
    ]
    assert torch.equal(*losses)
    assert torch.equal(torch.autograd.grad(losses[0], row)[0][0], torch.autograd.grad(losses[1], packed)[0])


def test_opcheck(device):
    batch = make_batch((3, 9), torch.float32, device)
    tensors = (batch["advantages"].requires_grad_(), batch["response_mask"])
    for op in (torch.ops.entropy_rl.aggregate, torch.ops.entropy_rl.aggregate_forward):
        torch.library.opcheck(op, tensors, {"loss_agg_mode": "seq-mean-token-mean"})
        torch.library.opcheck(op, (tensors[0].detach()[0].requires_grad_(), tensors[1][0]))


def test_compile_fullgraph_and_no_recompile(device):
    compiled, counter = compile_counting(aggregate, dynamic=True)
    for rows, size in [(4, 30), (7, 55), (12, 71)]:
        batch = make_batch((rows, 17), torch.float32, device)
        arguments = (batch["advantages"], batch["response_mask"])
        options = {"loss_agg_mode": "seq-mean-token-sum", "global_batch_size": size}
        assert torch.equal(compiled(*arguments, **options), aggregate(*arguments, **options))
    assert counter.graphs == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("mode", "name"), [("token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "global_batch_size")]
)
def test_divisor_in_a_tensor(device, mode, name, dtype):
    values, mask = torch.rand(3, 9, device=device), torch.ones(3, 9, device=device)

    def divided(number):
        return aggregate(values, mask, loss_agg_mode=mode, **{name: number})

    # 2**30 + 1 shows a divisor that passes through float32, in which it rounds.
    for number in (0, 1, 5) if dtype == torch.float32 else (0, 1, 5, 2**30 + 1):
        assert torch.equal(divided(torch.tensor(number, dtype=dtype, device=device)), divided(number))
    negative = torch.tensor(-2, dtype=dtype, device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=rf"{name} is -2(\.0)?; it must be 0 or above"):
            divided(negative)
    else:
        assert divided(negative).isnan()


def test_bad_input(device):
    values, mask = torch.zeros(3, 9, device=device), torch.ones(3, 9, device=device)
    with pytest.raises(ValueError, match="loss_agg_mode is 'mean'; it must be one of 'token-mean', 'token-sum'"):
        aggregate(values, mask, loss_agg_mode="mean")
    with pytest.raises(ValueError, match=r"mask has shape \[3, 8\]; it must be \[3, 9\]"):
        aggregate(values, mask[:, 1:])
    with pytest.raises(ValueError, match="values is int64"):
        aggregate(values.long(), mask)
    with pytest.raises(ValueError, match=r"values has shape \[1, 3, 9\]; it must be \[rows, tokens\], or \[tokens\]"):
        aggregate(values[None], mask[None])
    with pytest.raises(ValueError, match="batch_num_tokens is None and dp_size is 2"):
        aggregate(values, mask, dp_size=2)
    with pytest.raises(ValueError, match=r"mask is on meta and values on .*; all tensors of one call must be"):
        aggregate(values, mask.to("meta"))
