"""On a GPU alone: no op waits for the device, and each can be captured in a CUDA graph and replayed."""

import itertools

import pytest
import torch

import entropy_rl_ext as ext

LOSS_MODES = ["vanilla", "gpg", "clip_cov", "kl_cov", "gspo", "geo_mean", "cispo"]
RULES = ["topk", "threshold", "quantile"]
RUNS = 100  # of a step, which may differ in the order of threads
SELECTIONS = list(itertools.product(RULES, ["batch", "sequence", "group"], ["auto", "sort", "radix"]))


def make_step(name):
    """(inputs, function of the inputs) whose forward and backward use one op."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(shape, device="cuda", generator=generator)

    targets = torch.randint(0, 1000, (8, 64), device="cuda", generator=generator)
    steps = softmax_steps(random, targets) | selection_steps(random) | loss_steps(random)
    return steps[name]


def softmax_steps(random, targets):
    logits, mask = random(8, 64, 1000), random(8, 64) > -1
    hidden, head = random(8, 64, 32), random(1000, 32)
    # Rows that several blocks share, and rows of one block each.
    few_rows, many_rows = random(4, 40_000), random(1000, 40_000)

    def entropy_step(logits):
        leaf = logits.detach().requires_grad_()
        entropy = ext.token_entropy(leaf)
        return [entropy, *torch.autograd.grad(entropy.sum(), leaf)]

    def logprob_step(logits, targets, mask=mask):
        leaf = logits.detach().requires_grad_()
        log_prob, entropy = ext.logprob_entropy(leaf, targets, mask=mask, entropy_grad=True)
        return [log_prob, entropy, *torch.autograd.grad(log_prob.sum() + entropy.sum(), leaf)]

    def linear_step(hidden, head, temperature=1.0, mask=mask):
        leaves = hidden.detach().requires_grad_(), head.detach().requires_grad_()
        log_prob, entropy = ext.linear_logprob_entropy(
            *leaves, targets, mask=mask, max_mask_rows=512, max_grad_rows=200, entropy_grad=True, chunk_rows=128,
            temperature=temperature,
        )  # fmt: skip
        chosen = ext.global_top_mask(entropy.detach(), mask)
        loss = ((log_prob + entropy) * chosen).sum()
        return [log_prob, entropy, *torch.autograd.grad(loss, leaves)]

    return {
        "token_entropy": ((logits,), entropy_step),
        "token_entropy few rows": ((few_rows,), entropy_step),
        "token_entropy many rows": ((many_rows,), entropy_step),
        "logprob_entropy": ((logits, targets), logprob_step),
        "logprob_entropy float mask": ((logits, targets), lambda *inputs: logprob_step(*inputs, mask.float())),
        "linear_logprob_entropy": ((hidden, head), linear_step),
        "linear_logprob_entropy float mask": ((hidden, head), lambda *inputs: linear_step(*inputs, mask=mask.float())),
        "linear_logprob_entropy row temperature": ((hidden, head, random(8, 64).exp()), linear_step),
    }


def selection_steps(random):
    tokens, rows = random(3, 20_011).abs(), random(1000, 3000)
    key, kept_ties = torch.tensor(3 * 2**30, device="cuda"), torch.tensor(7, device="cuda")  # the key of 2.0

    def select(x, mask, rule, scope, algorithm):
        ids = torch.arange(len(x), device="cuda") // 2 if scope == "group" else None
        ratio = torch.tensor(0.2, dtype=torch.float64)
        return [torch.ops.entropy_rl.global_top_mask_forward(x, mask, ratio, rule, scope, ids, algorithm)]

    def second_of_three_processes(x):
        x = (4 * x).round() / 4
        ties = (x == 2).sum(1)
        return torch.ops.entropy_rl.global_top_mask_at_key(x[1], x[1] > 0.1, key, kept_ties, ties, 1)

    steps = {
        f"global_top_mask {rule} {scope} {algorithm}": (
            (tokens,),
            lambda x, case=(rule, scope, algorithm): select(x, x > 0.1, *case),
        )
        for rule, scope, algorithm in SELECTIONS
    }
    for rule in RULES:
        steps[f"global_top_mask threshold of {rule}"] = (
            (tokens,),
            lambda x, rule=rule: ext.global_top_mask(x, x > 0.1, rule=rule, return_threshold=True),
        )
    steps["global_top_mask float mask"] = (
        (tokens,),
        lambda x: ext.global_top_mask(x, (x > 0.1).float(), return_threshold=True),
    )
    steps["global_top_mask segments"] = ((rows,), lambda x: select(x, x > -1, "topk", "sequence", "radix"))
    steps["global_top_mask second of three processes"] = ((tokens,), second_of_three_processes)
    return steps


def loss_steps(random):
    log_prob, old, advantages = -random(8, 64).abs(), -random(8, 64).abs(), random(8, 64)
    entropy, mask = random(8, 64).abs(), random(8, 64) > -1
    tokens = torch.tensor(300, device="cuda")

    def policy_step(log_prob, old, advantages, loss_mode, mask=mask, **options):
        chosen = ext.global_top_mask(entropy, mask)
        leaf = log_prob.detach().requires_grad_()
        loss, metrics = ext.policy_loss(
            leaf, old, advantages, mask, loss_mode=loss_mode, entropy_mask=chosen, batch_num_tokens=tokens, **options
        )
        return [loss, *torch.autograd.grad(loss, leaf), *metrics.values()]

    def kl_step(log_prob, old):
        leaf = log_prob.detach().requires_grad_()
        loss = ext.kl_loss(leaf, old, mask)
        return [loss, *torch.autograd.grad(loss, leaf)]

    steps = {
        "kl_loss": ((log_prob, old), kl_step),
        "aggregate": ((entropy,), lambda x: [ext.aggregate(x, mask)]),
    }
    for mode in LOSS_MODES:
        steps[f"policy_loss {mode}"] = (
            (log_prob, old, advantages),
            lambda *batch, mode=mode: policy_step(*batch, mode),
        )
    steps["policy_loss float mask"] = (
        (log_prob, old, advantages),
        lambda *batch: policy_step(*batch, "vanilla", mask.float()),
    )
    ratios = torch.full_like(log_prob, 0.3)
    steps["policy_loss clip ratios"] = (
        (log_prob, old, advantages),
        lambda *batch: policy_step(*batch, "clip_cov", clip_ratio_low=ratios, clip_ratio_high=0.4),
    )
    steps["covariance_mask clip ratios"] = (
        (log_prob, old, advantages),
        lambda *batch: [ext.covariance_mask(*batch, mask, "clip_cov", clip_ratio_high=ratios)],
    )
    for mode in ("clip_cov", "kl_cov"):
        steps[f"covariance_mask {mode}"] = (
            (log_prob, old, advantages),
            lambda *batch, mode=mode: [ext.covariance_mask(*batch, mask, mode)],
        )
    return steps


STEPS = [
    "token_entropy",
    "logprob_entropy",
    "logprob_entropy float mask",
    "linear_logprob_entropy",
    "linear_logprob_entropy float mask",
    "linear_logprob_entropy row temperature",
    "kl_loss",
    "aggregate",
    "token_entropy few rows",
    "token_entropy many rows",
    *(f"global_top_mask {rule} {scope} {algorithm}" for rule, scope, algorithm in SELECTIONS),
    "global_top_mask float mask",
    "global_top_mask segments",
    *(f"global_top_mask threshold of {rule}" for rule in RULES),
    "global_top_mask second of three processes",
    "covariance_mask clip_cov",
    "covariance_mask kl_cov",
    *(f"policy_loss {mode}" for mode in LOSS_MODES),
    "policy_loss float mask",
    "policy_loss clip ratios",
    "covariance_mask clip ratios",
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
    for _ in range(RUNS):
        for actual, wanted in zip(step(*inputs), first, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("rule", ["topk", "threshold", "quantile"])
@pytest.mark.parametrize("scope", ["batch", "sequence", "group"])
@pytest.mark.parametrize("shape", [(3, 70), (2, 100_003), (1024, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_both_selections_give_the_same_bits(rule, scope, shape, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    entropy = torch.randn(shape, device="cuda", generator=generator).abs().to(dtype)
    entropy[torch.rand(shape, device="cuda", generator=generator) < 0.01] = float("nan")
    if dtype == torch.float32:
        entropy = (entropy * 16).round() / 16  # ties on both sides of every tile's edge
    mask = torch.rand(shape, device="cuda", generator=generator) < 0.7
    ids = torch.arange(shape[0], device="cuda") % 3 if scope == "group" else None
    ratio = torch.tensor(0.2, dtype=torch.float64)
    select = torch.ops.entropy_rl.global_top_mask_forward
    radix, sort = (select(entropy, mask, ratio, rule, scope, ids, algorithm) for algorithm in ("radix", "sort"))
    assert torch.equal(radix, sort)
    on_cpu = select(entropy.cpu(), mask.cpu(), ratio, rule, scope, None if ids is None else ids.cpu())
    assert torch.equal(radix.cpu(), on_cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gives_the_same_bits_in_every_batch(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(900, 50_257, device="cuda", generator=generator).to(dtype)
    entropy = ext.token_entropy(logits)
    assert torch.equal(ext.token_entropy(logits[:7]), entropy[:7])  # a block a part, at other alignments
    assert torch.equal(ext.token_entropy(logits[501:503].contiguous()), entropy[501:503])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [0, 3, 500, 1100])
def test_a_gradient_has_the_same_bits_at_every_alignment(dtype, target):
    """The vocabulary is odd, so a target lies before, in or after the 16-byte packs of its row."""
    generator = torch.Generator("cuda").manual_seed(0)
    row = torch.randn(1101, device="cuda", generator=generator).to(dtype)
    logits = row.repeat(17, 1).requires_grad_()
    log_prob, entropy = ext.logprob_entropy(logits, torch.full((17,), target, device="cuda"), entropy_grad=True)
    (1.7 * log_prob + 0.3 * entropy).sum().backward()
    assert torch.equal(logits.grad, logits.grad[:1].expand_as(logits.grad))
