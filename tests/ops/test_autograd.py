"""Derivatives that the ops do not have raise."""

import pytest
import torch
from torch.autograd import forward_ad

import entropy_rl_ext as ext

OPS = {
    "token_entropy": lambda x, other, ids: ext.token_entropy(x),
    "logprob_entropy": lambda x, other, ids: ext.logprob_entropy(x, ids),
    "linear_logprob_entropy": lambda x, other, ids: ext.linear_logprob_entropy(x, other, ids),
    "linear_logprob_entropy, the weight": lambda x, other, ids: ext.linear_logprob_entropy(other, x, ids),
    "policy_loss": lambda x, other, ids: ext.policy_loss(x, other, other, other)[0],
    "kl_loss": lambda x, other, ids: ext.kl_loss(x, other, other),
    "aggregate": lambda x, other, ids: ext.aggregate(x, other),
}


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_raises(op, device):
    x, other, ids = torch.rand(3, 5, device=device), torch.ones(3, 5, device=device), torch.arange(3, device=device)
    with pytest.raises(RuntimeError, match="_forward has no forward-mode derivative; use reverse mode"):
        torch.func.jvp(lambda x: OPS[op](x, other, ids), (x,), (other,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, other)
        with pytest.raises(RuntimeError, match="_forward has no forward-mode derivative"):
            OPS[op](dual, other, ids)
        OPS[op](x, other, ids)  # without a tangent


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_over_reverse_mode_raises(op, device):
    x, other, ids = torch.rand(3, 5, device=device), torch.ones(3, 5, device=device), torch.arange(3, device=device)
    leaf = x.clone().requires_grad_()
    outputs = OPS[op](leaf, other, ids)
    output = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(output), torch.ones_like(output))
        with pytest.raises(RuntimeError, match="_backward has no forward-mode derivative"):
            torch.autograd.grad(output, leaf, grad)


def test_forward_mode_takes_a_selection_as_constant(device):
    entropy, mask = torch.rand(3, 5, device=device), torch.ones(3, 5, device=device)
    chosen = ext.global_top_mask(entropy, mask)
    _, tangent = torch.func.jvp(lambda x: (x * ext.global_top_mask(x, mask)).sum(), (entropy,), (mask,))
    assert tangent == chosen.sum()


def test_constants_carry_no_gradient(device):
    """A loss whose log-probs need no gradient needs none, whatever its other arguments say."""
    values, other = torch.rand(3, 5, device=device), torch.rand(3, 5, device=device, requires_grad=True)
    assert not ext.policy_loss(values, other, other, torch.ones_like(values))[0].requires_grad


class Stop(torch.autograd.Function):
    """Returns its input, and no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("op", ["policy_loss", "kl_loss", "aggregate"])
def test_a_loss_without_an_incoming_gradient_gives_none(op, device):
    x, other = torch.rand(3, 5, device=device, requires_grad=True), torch.ones(3, 5, device=device)
    Stop.apply(OPS[op](x, other, None)).backward()
    assert x.grad is None
