"""On a GPU alone: how many kernels and memsets an op takes. Each is a node of a CUDA graph and costs a launch, which is
most of the time of an op over few tokens."""

import ctypes

import pytest
import torch

import entropy_rl_ext as ext

ops = torch.ops.entropy_rl
PASSES = {torch.float32: 3, torch.bfloat16: 3, torch.float64: 6}  # 11 bits of the key each


def nodes(step):
    """Nodes of a CUDA graph of `step`."""
    step()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        step()
    count = ctypes.c_size_t()
    handle = ctypes.c_void_p(graph.raw_cuda_graph())
    assert ctypes.CDLL(None).cudaGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    return count.value


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)


def selection_nodes(x, rule, scope):
    mask, ratio = x > -1, torch.tensor(0.2, dtype=torch.float64)
    return nodes(lambda: ops.global_top_mask_forward(x, mask, ratio, rule, scope, None, "radix"))


@pytest.mark.parametrize("dtype", PASSES, ids=str)
@pytest.mark.parametrize("rule", ["topk", "threshold", "quantile"])
def test_a_selection_over_the_batch_is_a_memset_a_kernel_a_pass_and_the_mask(rule, dtype):
    assert selection_nodes(random(4, 20_000, dtype=dtype), rule, "batch") == 1 + PASSES[dtype] + 1


@pytest.mark.parametrize("rule", ["topk", "threshold", "quantile"])
def test_a_selection_of_few_tokens_or_by_row_is_one_kernel(rule):
    assert selection_nodes(random(4, 1000), rule, "batch") == 1
    assert selection_nodes(random(200, 9000), rule, "sequence") == 1


def test_the_mask_of_one_of_several_processes_is_two_kernels():
    x = random(3, 20_011).abs()
    mask = x > 0.1
    key, k, ties = torch.tensor(3 * 2**30, device="cuda"), torch.tensor(7, device="cuda"), (x == 2).sum(1)
    assert nodes(lambda: ops.global_top_mask_at_key(x[1], mask[1], key, k, ties, 1)) == 2


@pytest.mark.parametrize(("rows", "kernels"), [(4, 2), (1000, 1)])
def test_rows_of_logits_are_one_kernel_and_few_rows_another_that_merges_their_parts(rows, kernels):
    logits = random(rows, 40_000)
    assert nodes(lambda: ext.token_entropy(logits)) == kernels


def test_a_policy_loss_is_a_kernel_over_tokens_and_one_over_rows():
    log_prob, old, advantages = random(8, 64), random(8, 64), random(8, 64)
    mask = log_prob > -1
    assert nodes(lambda: ext.policy_loss(log_prob, old, advantages, mask)) == 2
    loss, grad = random(1)[0], random(8, 64)
    scale = random(8)
    assert nodes(lambda: ops.policy_loss_backward(loss, grad, scale, log_prob)) == 1
