"""On a GPU alone: no op waits for the device, and each can be captured in a CUDA graph and replayed."""

import pytest
import torch

import entropy_rl_ext as ext

LOSS_MODES = ["vanilla", "gpg", "clip_cov", "kl_cov", "gspo", "geo_mean", "cispo"]


def make_step(name):
    """(inputs, function of the inputs) whose forward and backward use one op."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(shape, device="cuda", generator=generator)

    logits, targets = random(8, 64, 1000), torch.randint(0, 1000, (8, 64), device="cuda", generator=generator)
    entropy, mask = random(8, 64).abs(), random(8, 64) > -1
    log_prob, old, advantages = -random(8, 64).abs(), -random(8, 64).abs(), random(8, 64)

    def loss_step(loss_mode):
        def step(log_prob, old, advantages):
            chosen = ext.global_top_mask(entropy, mask)
            leaf = log_prob.detach().requires_grad_()
            loss, metrics = ext.policy_loss(leaf, old, advantages, mask, loss_mode=loss_mode, entropy_mask=chosen)
            return [loss, *torch.autograd.grad(loss, leaf), *metrics.values()]

        return (log_prob, old, advantages), step

    def entropy_step(logits, targets):
        leaf = logits.detach().requires_grad_()
        log_prob, entropy = ext.logprob_entropy(leaf, targets, mask=mask, entropy_grad=True)
        return [log_prob, entropy, *torch.autograd.grad(log_prob.sum() + entropy.sum(), leaf)]

    hidden, weight = random(8, 64, 32), random(1000, 32)

    def linear_step(hidden, weight):
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        log_prob, entropy = ext.linear_logprob_entropy(
            *leaves, targets, mask=mask, max_mask_rows=512, max_grad_rows=200, entropy_grad=True, chunk_rows=128
        )
        chosen = ext.global_top_mask(entropy.detach(), mask)
        loss = ((log_prob + entropy) * chosen).sum()
        return [log_prob, entropy, *torch.autograd.grad(loss, leaves)]

    def kl_step(log_prob, old):
        leaf = log_prob.detach().requires_grad_()
        loss = ext.kl_loss(leaf, old, mask)
        return [loss, *torch.autograd.grad(loss, leaf)]

    group_ids = torch.arange(8, device="cuda") // 2
    steps = {
        "token_entropy": ((logits,), lambda x: [ext.token_entropy(x)]),
        "logprob_entropy": ((logits, targets), entropy_step),
        "linear_logprob_entropy": ((hidden, weight), linear_step),
        "kl_loss": ((log_prob, old), kl_step),
        "aggregate": ((entropy,), lambda x: [ext.aggregate(x, mask)]),
        **{
            f"global_top_mask {rule} {scope}": (
                (entropy,),
                lambda x, rule=rule, scope=scope: [
                    ext.global_top_mask(
                        x, mask, rule=rule, scope=scope, group_ids=group_ids if scope == "group" else None
                    )
                ],
            )
            for rule in ("topk", "threshold", "quantile")
            for scope in ("batch", "sequence", "group")
        },
        **{f"policy_loss {mode}": loss_step(mode) for mode in LOSS_MODES},
    }
    return steps[name]


STEPS = [
    "token_entropy",
    "logprob_entropy",
    "linear_logprob_entropy",
    "kl_loss",
    "aggregate",
    *(
        f"global_top_mask {rule} {scope}"
        for rule in ("topk", "threshold", "quantile")
        for scope in ("batch", "sequence", "group")
    ),
    *(f"policy_loss {mode}" for mode in LOSS_MODES),
]


@pytest.mark.parametrize("name", STEPS)
def test_no_host_sync(name):
    inputs, step = make_step(name)
    step(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", STEPS)
def test_graph_replay_with_new_data(name):
    inputs, step = make_step(name)
    static = [tensor.clone() for tensor in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*static)
    for tensor in static:
        tensor.copy_(tensor.flip(0))
    graph.replay()
    expected = step(*(tensor.flip(0) for tensor in inputs))
    for actual, wanted in zip(captured, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("name", STEPS)
def test_same_bits_in_every_run(name):
    inputs, step = make_step(name)
    first = step(*inputs)
    for _ in range(100):
        for actual, wanted in zip(step(*inputs), first, strict=True):
            assert torch.equal(actual, wanted)
