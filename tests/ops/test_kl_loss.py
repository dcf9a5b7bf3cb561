"""kl_loss: parity, gradient, compile and bad input."""

import math

import pytest
import torch

from compiled import compile_counting
from entropy_rl_ext import kl_loss, reference
from losses import DTYPES, SHAPES, assert_within, make_batch, with_batch_numbers

BASE = ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
TYPES = BASE + [name + "+" for name in BASE]
NAMES = ("log_prob", "old_log_prob", "response_mask")


def run(function, batch, **options):
    log_prob, *others = (batch[name] for name in NAMES)
    log_prob = log_prob.detach().requires_grad_()
    loss = function(log_prob, *others, **options)
    return loss.detach(), torch.autograd.grad(loss, log_prob)[0]


def assert_equal_to_reference(batch, scale, **options):
    loss, gradient = run(kl_loss, batch, **options)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
    expected_loss, expected_gradient = run(reference.kl_loss, wide, **options)
    assert gradient.dtype == batch["log_prob"].dtype
    assert_within(loss, expected_loss, scale)
    assert_within(gradient, expected_gradient, scale / max(1, batch["response_mask"].sum().item()))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_with_reference(device, kind, shape, dtype):
    assert_equal_to_reference(make_batch(shape, dtype, device), 4.0, kl_loss_type=kind)


@pytest.mark.parametrize("kind", TYPES)
def test_parity_over_aggregations(device, kind):
    batch = make_batch((5, 300), torch.float64, device)
    for aggregation in with_batch_numbers():
        assert_equal_to_reference(batch, 4.0 * 1500, kl_loss_type=kind, **aggregation)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights(device, kind, dtype):
    """A factor of each token's estimate, in every aggregation; the divisors stay. NaN outside the mask is ignored."""
    batch = make_batch((5, 300), dtype, device)
    weights = torch.where(batch["response_mask"], batch["weights"], math.nan)
    for aggregation in with_batch_numbers():
        loss, gradient = run(kl_loss, batch, kl_loss_type=kind, weights=weights, **aggregation)
        wide = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
        expected = run(reference.kl_loss, wide, kl_loss_type=kind, weights=weights.double(), **aggregation)
        assert_within(loss, expected[0], 8.0 * 1500)
        assert_within(gradient, expected[1], 8.0 * 1500 / batch["response_mask"].sum().item())
    ones = torch.ones_like(weights)
    assert torch.equal(run(kl_loss, batch, weights=ones)[1], run(kl_loss, batch)[1])


def test_aliases(device):
    batch = make_batch((3, 9), torch.float32, device)
    for alias, name in (("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl")):
        for suffix in ("", "+"):
            actual = run(kl_loss, batch, kl_loss_type=alias + suffix)
            expected = run(kl_loss, batch, kl_loss_type=name + suffix)
            assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("kind", BASE)
def test_straight_through_keeps_the_value_and_takes_the_gradient_of_k2(device, kind):
    batch = make_batch((3, 9), torch.float32, device)
    value, gradient = run(kl_loss, batch, kl_loss_type=kind + "+")
    assert torch.equal(value, run(kl_loss, batch, kl_loss_type=kind)[0])
    assert torch.equal(gradient, run(kl_loss, batch, kl_loss_type="k2")[1])


@pytest.mark.parametrize("kind", BASE)
def test_gradcheck(device, kind):
    batch = make_batch((3, 9), torch.float64, device)
    log_prob, *others = (batch[name] for name in NAMES)
    assert torch.autograd.gradcheck(lambda x: kl_loss(x, *others, kl_loss_type=kind), (log_prob.requires_grad_(),))


@pytest.mark.parametrize("kind", TYPES)
def test_tokens_outside_the_response_have_no_influence(device, kind):
    batch = make_batch((3, 300), torch.float32, device)
    expected = run(kl_loss, batch, kl_loss_type=kind)
    for name in ("log_prob", "old_log_prob"):
        batch[name] = torch.where(batch["response_mask"], batch[name], math.nan)
    actual = run(kl_loss, batch, kl_loss_type=kind)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_far_policies_are_clamped(device):
    log_prob = torch.tensor([[-100.0, 0.0, -5.0]], device=device)
    ref_log_prob = torch.tensor([[0.0, -100.0, -1.0]], device=device)
    mask = torch.ones(1, 3, device=device)
    each = [kl_loss(log_prob[:, i : i + 1], ref_log_prob[:, i : i + 1], mask[:, :1]).item() for i in range(3)]
    assert each == pytest.approx([10, 10, 10])  # 4.85e8, 19 and e^4 - 5 before the clamp


def test_nothing_in_the_mask_gives_zero(device):
    batch = make_batch((3, 9), torch.float32, device)
    batch["response_mask"] = torch.zeros(3, 9, dtype=torch.int64, device=device)
    loss, gradient = run(kl_loss, batch)
    assert loss.item() == 0 and (gradient == 0).all()


def test_packed_tokens_are_one_row(device):
    batch = make_batch((1, 300), torch.float32, device)
    loss, gradient = run(kl_loss, batch)
    packed_loss, packed_gradient = run(kl_loss, {name: tensor[0] for name, tensor in batch.items()})
    assert torch.equal(packed_loss, loss) and torch.equal(packed_gradient, gradient[0])


def test_opcheck(device):
    batch = make_batch((3, 9), torch.float32, device)
    tensors = (*(batch[name] for name in NAMES), None, None, batch["weights"])
    tensors[0].requires_grad_()
    for op in (torch.ops.entropy_rl.kl_loss, torch.ops.entropy_rl.kl_loss_forward):
        torch.library.opcheck(op, tensors, {"kl_loss_type": "k3+"})


def test_compile_fullgraph_and_no_recompile(device):
    compiled, counter = compile_counting(kl_loss, dynamic=True)
    for rows, tokens in [(4, 30), (7, 55), (12, 71)]:
        tensors = [make_batch((rows, 17), torch.float32, device)[name] for name in NAMES]
        actual = compiled(*tensors, batch_num_tokens=tokens)
        assert torch.equal(actual, kl_loss(*tensors, batch_num_tokens=tokens))
    assert counter.graphs == 1


def test_bad_input(device):
    batch = make_batch((3, 9), torch.float32, device)
    log_prob, ref_log_prob, mask = (batch[name] for name in NAMES)
    with pytest.raises(ValueError, match=r"kl_loss_type is 'full'; it must be one of 'kl', 'k1', .*'k3\+'"):
        kl_loss(log_prob, ref_log_prob, mask, kl_loss_type="full")
    with pytest.raises(ValueError, match="loss_agg_mode is 'mean'"):
        kl_loss(log_prob, ref_log_prob, mask, loss_agg_mode="mean")
    with pytest.raises(ValueError, match=r"ref_log_prob has shape \[3, 8\]; it must be \[3, 9\]"):
        kl_loss(log_prob, ref_log_prob[:, 1:], mask)
    with pytest.raises(ValueError, match="ref_log_prob is int64"):
        kl_loss(log_prob, ref_log_prob.long(), mask)
    with pytest.raises(ValueError, match=r"weights has shape \[3\]; it must be \[3, 9\], the shape of log_prob"):
        kl_loss(log_prob, ref_log_prob, mask, weights=torch.ones(3, device=device))
    with pytest.raises(ValueError, match="must be on the same device"):
        kl_loss(log_prob, ref_log_prob, mask.to("meta"))
