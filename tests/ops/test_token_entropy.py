"""token_entropy: parity, gradient, compile and bad input; test_logprob_entropy.py has the rest."""

import math

import pytest
import torch

from compiled import compile_counting
from entropy_rl_ext import logprob_entropy, reference, token_entropy
from test_logprob_entropy import (
    DTYPES,
    VOCABULARIES,
    assert_gradient_close,
    make_logits,
    make_targets,
    value_tolerance,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_parity_with_reference(device, dtype, vocab):
    logits = make_logits((7, vocab), dtype, device).requires_grad_()
    entropy = token_entropy(logits, temperature=0.8)
    wide = logits.detach().double().requires_grad_()
    expected = reference.token_entropy(wide, temperature=0.8)
    torch.testing.assert_close(entropy.double(), expected, atol=value_tolerance(dtype), rtol=1e-6)
    grad = torch.randn(7, dtype=entropy.dtype, device=device)
    (actual,) = torch.autograd.grad(entropy, logits, grad)
    (wanted,) = torch.autograd.grad(expected, wide, grad.double())
    assert_gradient_close(actual, wanted, grad.abs().max().item() * (1 + math.log(vocab)) / 0.8)


def test_equals_the_entropy_of_logprob_entropy(device):
    logits = make_logits((4, 9, 1500), torch.bfloat16, device)
    mask = torch.rand(4, 9, device=device) < 0.7
    entropy = token_entropy(logits, mask=mask, temperature=1.2)
    assert torch.equal(entropy, logprob_entropy(logits, make_targets(logits), mask=mask, temperature=1.2)[1])


def test_uniform_logits_reach_the_maximum(device):
    entropy = token_entropy(torch.zeros(2, 151936, device=device))  # Qwen3's vocabulary
    assert entropy.tolist() == pytest.approx([math.log(151936)] * 2, abs=1e-5)


def test_bfloat16_entropy_has_float32_resolution(device):
    """Entropy in bfloat16 arithmetic is up to 0.1 nat off and ties at the threshold; this must not be."""
    logits = make_logits((256, 32000), torch.bfloat16, device)
    entropy = token_entropy(logits)
    expected = reference.token_entropy(logits.double())
    torch.testing.assert_close(entropy.double(), expected, atol=1e-5, rtol=0)
    assert entropy.unique().numel() > 250


def test_the_op_alone(device):
    logits = make_logits((3, 20), torch.float32, device)
    assert torch.equal(torch.ops.entropy_rl.token_entropy(logits), token_entropy(logits))


def test_gradcheck(device):
    logits = make_logits((3, 6), torch.float64, device, scale=1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_entropy(x, temperature=0.7), (logits,))


def test_opcheck(device):
    logits = make_logits((3, 6), torch.float32, device).requires_grad_()
    mask = torch.tensor([True, False, True], device=device)
    number = torch.tensor(0.7, dtype=torch.float64)
    op = torch.ops.entropy_rl
    torch.library.opcheck(op.token_entropy, (logits, mask, 0.7, None))
    torch.library.opcheck(op.token_entropy_forward, (logits, mask, number))
    entropy, statistics = op.token_entropy_forward(logits.detach(), mask, number)
    arguments = (torch.ones_like(entropy), logits.detach(), mask, number, entropy, statistics)
    torch.library.opcheck(op.token_entropy_backward, arguments)


def test_compile_fullgraph_and_no_recompile(device):
    def step(logits, temperature):
        return token_entropy(logits, temperature=temperature).sum()

    compiled, counter = compile_counting(step, dynamic=True)
    for rows, temperature in [(4, 1.0), (7, 0.9), (12, 0.6)]:
        logits = make_logits((rows, 33), torch.float32, device)
        torch.testing.assert_close(compiled(logits, temperature), step(logits, temperature))
    assert counter.graphs == 1


def test_bad_input(device):
    with pytest.raises(ValueError, match="logits is int64"):
        token_entropy(torch.zeros(3, 4, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="temperature is 0"):
        token_entropy(torch.zeros(3, 4, device=device), temperature=0)
    with pytest.raises(ValueError, match=r"mask has shape \[4\]"):
        token_entropy(torch.zeros(3, 4, device=device), mask=torch.ones(4, device=device))


def test_backward_op_refuses_what_the_forward_did_not_make(device):
    """The backward op is public too: shapes that do not fit must raise, never read outside a tensor."""
    logits = make_logits((3, 6), torch.float32, device)
    rows, statistics = torch.zeros(3, device=device), torch.zeros(3, 2, device=device)
    number = torch.tensor(1.0, dtype=torch.float64)
    backward = torch.ops.entropy_rl.token_entropy_backward
    with pytest.raises(ValueError, match=r"statistics has shape \[3\]"):
        backward(rows, logits, None, number, rows, rows)
    with pytest.raises(ValueError, match=r"entropy has shape \[2\]"):
        backward(rows, logits, None, number, rows[:2], statistics)
    with pytest.raises(ValueError, match=r"grad_entropy has shape \[1\]"):
        backward(rows[:1], logits, None, number, rows, statistics)
