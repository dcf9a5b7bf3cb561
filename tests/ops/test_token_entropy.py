"""What token_entropy alone has; test_logprob_entropy.py holds it to logprob_entropy and to the reference."""

import math

import pytest
import torch

from compiled import compile_counting
from entropy_rl_ext import reference, token_entropy
from test_logprob_entropy import make_logits


def test_uniform_logits_reach_the_maximum(device):
    entropy = token_entropy(torch.zeros(2, 151936, device=device))  # Qwen3's vocabulary
    assert entropy.tolist() == pytest.approx([math.log(151936)] * 2, abs=1e-5)


def test_bfloat16_entropy_has_float32_resolution(device):
    """Entropies computed in bfloat16 are up to 0.1 nat off and tie at the threshold; these must not."""
    logits = make_logits((256, 32000), torch.bfloat16, device)
    entropy = token_entropy(logits)
    expected = reference.token_entropy(logits.double())
    torch.testing.assert_close(entropy.double(), expected, atol=1e-5, rtol=0)
    assert entropy.unique().numel() > 250


def test_op_without_options(device):
    logits = make_logits((3, 20), torch.float32, device)
    assert torch.equal(torch.ops.entropy_rl.token_entropy(logits), token_entropy(logits))


def test_gradcheck(device):
    logits = make_logits((3, 6), torch.float64, device, scale=1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_entropy(x, temperature=0.7), (logits,))


def test_opcheck(device):
    logits = make_logits((3, 6), torch.float32, device).requires_grad_()
    mask = torch.tensor([True, False, True], device=device)
    torch.library.opcheck(torch.ops.entropy_rl.token_entropy, (logits, mask, 0.7, None))


def test_compile_fullgraph_and_no_recompile(device):
    def step(logits, temperature):
        return token_entropy(logits, temperature=temperature).sum()

    compiled, counter = compile_counting(step, dynamic=True)
    for rows, temperature in [(4, 1.0), (7, 0.9), (12, 0.6)]:
        logits = make_logits((rows, 33), torch.float32, device).requires_grad_()
        actual, expected = compiled(logits, temperature), step(logits, temperature)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits))
    assert counter.graphs == 1


def test_bad_input(device):
    with pytest.raises(ValueError, match="logits is int64"):
        token_entropy(torch.zeros(3, 4, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="temperature is 0"):
        token_entropy(torch.zeros(3, 4, device=device), temperature=0)
    with pytest.raises(ValueError, match=r"mask has shape \[4\]"):
        token_entropy(torch.zeros(3, 4, device=device), mask=torch.ones(4, device=device))
