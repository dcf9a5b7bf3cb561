"""linear_logprob_entropy: parity, gradients, rows without mask or gradient, shards, compile, properties, bad input."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from compiled import compile_counting
from entropy_rl_ext import linear_logprob_entropy, logprob_entropy, reference
from entropy_rl_ext.ops import _linear_tiles as tiles
from entropy_rl_ext.ops._bfloat16_products import bfloat16_products, processor_has_amx
from entropy_rl_ext.ops._row_index import bounded_index
from selections import GROUPS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},  # below the largest logits, so that it has an effect
    "scale": {"logit_scale": 0.25},
    "all of them": {"bias": True, "softcap": 6.0, "logit_scale": 0.7, "temperature": 1.3},
}

VOCABULARIES = [
    1,  # one entry
    17,  # a small part of a tile
    2048,  # one tile on the CPU
    2055,  # a tile and a tail
    9001,  # more than one tile on CUDA, and an odd row length
]


def make_case(dtype, device, vocab, *, rows=(3, 5), width=24, bias=False, seed=0):
    """(hidden, weight, targets, bias or None); logits have a standard deviation of 3."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = random(*rows, width).to(dtype).to(device).requires_grad_()
    weight = (random(vocab, width) * 3 / math.sqrt(width)).to(dtype).to(device).requires_grad_()
    targets = torch.randint(0, vocab, rows, generator=generator).to(device)
    return hidden, weight, targets, random(vocab).to(dtype).to(device).requires_grad_() if bias else None


def gradients(outputs, grads, inputs):
    return torch.autograd.grad(outputs, [i for i in inputs if i is not None], grads)


def sparse_grads(shape, dtype, device, seed=5, density=0.4):
    generator = torch.Generator().manual_seed(seed)

    def one():
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values * (torch.rand(shape, generator=generator) < density)

    return [one().to(dtype).to(device) for _ in range(2)]


def dtypes_of_products(device: torch.device) -> set[torch.dtype]:
    """The 16-bit dtypes that the matrix products of the op take as they are."""
    if device.type == "cuda":
        return {torch.bfloat16, torch.float16}
    return {torch.bfloat16} if processor_has_amx() else set()


def assert_gradient_close(actual, expected, grad_scale, other):
    """A gradient is a sum of products of dlogits and the rows of `other`.

    dlogits are within 1e-6 |g| of the exact ones, so the sum is within sum |other| times that. Then the gradient is
    rounded to its dtype. Where the GEMM takes 16-bit factors, dlogits are rounded, too.
    """
    expected, other = expected.double(), other.double().abs()
    unit = 1e-13 if actual.dtype == torch.float64 else 1e-6
    eps = torch.finfo(actual.dtype).eps
    if actual.dtype in dtypes_of_products(actual.device):
        unit += eps
    bound = unit * grad_scale * other.sum(0).max() + eps * expected.abs() + torch.finfo(actual.dtype).smallest_normal
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"largest excess {(error - bound).max().item()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("head", HEADS)
def test_parity_with_reference(device, dtype, vocab, head):
    options = dict(HEADS[head])
    hidden, weight, targets, bias = make_case(dtype, device, vocab, bias=options.pop("bias", False))
    wide = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    # Two rows a tile: 15 rows are seven full tiles and one that is not.
    actual = linear_logprob_entropy(
        hidden, weight, targets, bias=bias, chunk_rows=2, entropy_grad=True, token_statistics=True, **options
    )
    expected = reference.linear_logprob_entropy(
        wide[0], wide[1], targets, bias=wide[2], entropy_grad=True, token_statistics=True, **options
    )
    result = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for i in (0, 1, 3):
        assert actual[i].dtype == result
        torch.testing.assert_close(actual[i].double(), expected[i], atol=tolerance, rtol=1e-6)
    assert torch.equal(actual[2], expected[2])

    grads = sparse_grads(targets.shape, result, device)
    got = gradients(actual[:2], grads, (hidden, weight, bias))
    wanted = gradients(expected[:2], [g.double() for g in grads], wide)
    scale = sum(g.abs().max().item() for g in grads) * (1 + math.log(vocab))
    scale *= options.get("logit_scale", 1) / options.get("temperature", 1)
    factors = [weight, hidden.flatten(0, 1), torch.ones(15, 1)]
    for a, w, factor in zip(got, wanted, factors, strict=False):
        assert a.dtype == dtype
        assert_gradient_close(a, w, max(scale, 1.0), factor.detach().to(device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_logprob_entropy_of_the_logits(device, dtype):
    hidden, weight, targets, _ = make_case(dtype, device, 5003)
    exact = hidden.detach().double() @ weight.detach().double().t()
    log_prob, entropy = linear_logprob_entropy(hidden, weight, targets)
    expected = logprob_entropy(exact, targets)
    torch.testing.assert_close(log_prob.double(), expected[0], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), expected[1], atol=1e-5, rtol=1e-6)


def test_gradcheck(device):
    hidden, weight, targets, bias = make_case(torch.float64, device, 7, rows=(5,), width=3, bias=True)
    mask = torch.tensor([1, 0, 1, 1, 1], device=device)
    temperature = torch.rand(5, dtype=torch.float64, device=device) + 0.5

    def function(hidden, weight, bias):
        return linear_logprob_entropy(
            hidden, weight, targets, bias=bias, mask=mask, temperature=temperature, softcap=2.0, logit_scale=0.8,
            entropy_grad=True, chunk_rows=2,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.fixture
def precision():
    """Sets the precision of float32 products on the CPU for one test."""
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    yield lambda value: setattr(products, "fp32_precision", value)
    products.fp32_precision = before


@pytest.mark.parametrize("share", [1.0, 0.2])
@pytest.mark.parametrize("setting", ["none", "ieee"])
def test_16_bit_gradients_are_the_exact_ones_rounded(device, share, setting, precision):
    """With several tiles of rows and vocabulary, no tile's part is rounded before it is summed.

    The error is at most 1.1 times that of the float64 gradient rounded to bfloat16, and at most twice it where GEMMs
    take dlogits in bfloat16. The error of autograd through bfloat16 logits is several times as large.
    """
    precision(setting)
    hidden, weight, targets, _ = make_case(torch.bfloat16, device, 9001, rows=(96,), width=64)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(96, generator=generator) * (torch.rand(96, generator=generator) < share)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = torch.autograd.grad(reference.linear_logprob_entropy(*wide, targets)[0], wide, grad.double().to(device))
    log_prob, _ = linear_logprob_entropy(hidden, weight, targets, chunk_rows=16)
    got = torch.autograd.grad(log_prob, [hidden, weight], grad.to(device))
    dense = torch.autograd.grad(logprob_entropy(hidden @ weight.t(), targets)[0], [hidden, weight], grad.to(device))
    for found, plain, wanted in zip(got, dense, exact, strict=True):
        error, rounded, of_dense = ((x.double() - wanted).norm() for x in (found, wanted.bfloat16(), plain))
        rounds = torch.bfloat16 in dtypes_of_products(device) and (device.type == "cuda" or setting == "none")
        assert error <= (2.0 if rounds else 1.1) * rounded
        assert error < of_dense


@pytest.mark.parametrize("before", ["none", "tf32", "ieee"])
def test_the_precision_of_products_is_put_back(before, precision):
    """Also after an error, and by the last of several threads."""
    products = torch.backends.mkldnn.matmul
    precision(before)
    within = "bf16" if processor_has_amx() and before != "ieee" else before
    inside, leave = threading.Barrier(2), threading.Event()

    def other_thread():
        with bfloat16_products():
            inside.wait()
            leave.wait()

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ZeroDivisionError), bfloat16_products():
            thread = pool.submit(other_thread)
            inside.wait()
            assert products.fp32_precision == within
            raise ZeroDivisionError
        assert products.fp32_precision == within
        leave.set()
        thread.result()
    assert products.fp32_precision == before


def test_only_bfloat16_is_multiplied_in_bfloat16():
    """By the results of the products: 1 + 2^-10 is 1 in bfloat16. Without AMX nothing is rounded."""
    factor = torch.full((64, 64), 1 + 2.0**-10)
    out = torch.empty(64, 64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounds = dtype == torch.bfloat16 and processor_has_amx()
        expected = 64 * (1 if rounds else 1 + 2.0**-10)
        tiles.gemm(out, factor, torch.ones(64, 64), dtype=dtype)
        assert (out == expected).all()
        tiles.gemm(out, factor, torch.ones(64, 64), accumulate=True, dtype=dtype)
        assert (out == 2 * expected).all()


# ---- Rows without mask or gradient


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.bfloat16], ids=str)
def test_masked_rows_are_not_read(device, mask_dtype):
    hidden, weight, targets, _ = make_case(torch.float32, device, 300, rows=(4, 6))
    mask = (torch.arange(24, device=device).view(4, 6) % 3 != 0).to(mask_dtype)
    expected = [torch.where(mask != 0, x, 0) for x in linear_logprob_entropy(hidden, weight, targets)]
    hidden.data[mask == 0] = torch.nan
    targets[mask == 0] = -100
    log_prob, entropy = linear_logprob_entropy(hidden, weight, targets, mask=mask, entropy_grad=True)
    torch.testing.assert_close([log_prob, entropy], expected, atol=1e-5, rtol=0)
    assert (log_prob[mask == 0] == 0).all() and (entropy[mask == 0] == 0).all()
    (log_prob.sum() + entropy.sum()).backward()
    assert (hidden.grad[mask == 0] == 0).all() and (hidden.grad[mask != 0] != 0).any(-1).all()
    assert weight.grad.isfinite().all()


def test_rows_without_gradient_never_meet_the_backward(device, monkeypatch):
    hidden, weight, targets, _ = make_case(torch.float32, device, 300, rows=(40,))
    log_prob, entropy = linear_logprob_entropy(hidden, weight, targets, entropy_grad=True)
    multiplied = []
    gemm = tiles.gemm
    monkeypatch.setattr(
        tiles, "gemm", lambda out, a, b, **k: (multiplied.append((*a.shape, b.shape[1])), gemm(out, a, b, **k))
    )
    grad = torch.zeros(40, device=device)
    grad[::5] = 1.0
    hidden.data[1] = torch.nan  # through .data: autograd refuses a saved tensor that changed
    got = torch.autograd.grad([log_prob, entropy], [hidden, weight], [grad, torch.zeros_like(grad)])
    assert all(g.isfinite().all() for g in got)
    # The logits, the gradient of hidden and that of weight, each with eight of the forty rows.
    assert multiplied == [(8, 24, 300), (8, 300, 24), (300, 8, 24)]


@pytest.mark.parametrize("mask", [None, "none", "some"])
def test_no_row_has_a_gradient(device, mask):
    hidden, weight, targets, bias = make_case(torch.float32, device, 50, bias=True)
    rows = None if mask is None else torch.zeros(3, 5, device=device)
    if mask == "some":
        rows[1] = 1
    log_prob, entropy = linear_logprob_entropy(hidden, weight, targets, bias=bias, mask=rows, entropy_grad=True)
    got = torch.autograd.grad((log_prob + entropy).sum() * 0.0, [hidden, weight, bias])
    assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(got, (hidden, weight, bias), strict=True))
    if mask == "none":
        assert (log_prob == 0).all() and (entropy == 0).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_no_rows_and_a_single_row(device, shape):
    hidden, weight, targets, _ = make_case(torch.float32, device, 50, rows=shape)
    log_prob, entropy = linear_logprob_entropy(hidden, weight, targets)
    assert log_prob.shape == entropy.shape == shape
    log_prob.sum().backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.isfinite().all()


def test_a_gradient_that_is_nan_reaches_the_result(device):
    hidden, weight, targets, _ = make_case(torch.float32, device, 50, rows=(4,))
    log_prob, _ = linear_logprob_entropy(hidden, weight, targets)
    grad = torch.tensor([0.0, torch.nan, 1.0, 0.0], device=device)
    got = torch.autograd.grad(log_prob, [hidden, weight], grad)
    assert got[0][1].isnan().all() and got[0][[0, 2, 3]].isfinite().all() and got[1].isnan().all()


@pytest.mark.parametrize(
    "bounds", [{"max_grad_rows": 6}, {"max_grad_rows": 40}, {"max_mask_rows": 30, "max_grad_rows": 9}]
)
def test_bounds_change_nothing(device, bounds):
    hidden, weight, targets, _ = make_case(torch.float32, device, 2055, rows=(40,))
    mask = torch.arange(40, device=device) % 4 != 3
    grad = (torch.arange(40, device=device) % 8 == 0).float()
    results = []
    for options in ({}, bounds):
        log_prob, _ = linear_logprob_entropy(hidden, weight, targets, mask=mask, **options)
        results.append([log_prob, *torch.autograd.grad(log_prob, [hidden, weight], grad)])
    for plain, bounded in zip(*results, strict=True):
        torch.testing.assert_close(bounded, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bound", [0, 7, 19])
def test_max_grad_rows_too_small(device, bound):
    """The call with too many rows reports it, and no other call does."""
    hidden, weight, targets, bias = make_case(torch.float32, device, 50, rows=(20,), bias=True)

    def step(**options):
        log_prob, _ = linear_logprob_entropy(hidden, weight, targets, bias=bias, **options)
        return torch.autograd.grad(log_prob.sum(), [hidden, weight, bias])

    if device.type == "cpu":
        with pytest.raises(ValueError, match=f"max_grad_rows is {bound}, but 20 rows have a non-zero gradient"):
            step(max_grad_rows=bound)
    else:
        assert all(gradient.isnan().all() for gradient in step(max_grad_rows=bound))
        torch.cuda.synchronize()
    assert all(gradient.isfinite().all() for gradient in step())


@pytest.mark.parametrize("bound", [0, 7, 19])
def test_max_mask_rows_too_small(device, bound):
    hidden, weight, targets, _ = make_case(torch.float32, device, 50, rows=(20,))
    mask = torch.ones(20, device=device)
    options = {"mask": mask, "max_mask_rows": bound, "max_grad_rows": 20, "token_statistics": True}
    if device.type == "cpu":
        with pytest.raises(ValueError, match=f"max_mask_rows is {bound}, but 20 rows are in the mask"):
            linear_logprob_entropy(hidden, weight, targets, **options)
    else:
        log_prob, entropy, is_top1, squared = linear_logprob_entropy(hidden, weight, targets, **options)
        assert log_prob.isnan().all() and entropy.isnan().all() and squared.isnan().all() and not is_top1.any()
        assert all(g.isnan().all() for g in torch.autograd.grad(log_prob.sum(), [hidden, weight]))
        torch.cuda.synchronize()
    assert linear_logprob_entropy(hidden, weight, targets)[0].isfinite().all()


@pytest.mark.parametrize("total", [20, 1, 0])
@pytest.mark.parametrize("bound", [0, 5, 8, 40])
def test_bounded_rows_as_on_a_device(bound, total):
    """The bounded index of CUDA, on CPU tensors: empty places take 0 and put nothing, an overflow gives NaN."""
    for count in range(total + 1):
        active = torch.zeros(total, dtype=torch.bool)
        active[torch.randperm(total, generator=torch.Generator().manual_seed(count))[:count]] = True
        rows = bounded_index(active, bound)
        assert rows.count == min(max(bound, 1), total)
        values = torch.where(active, torch.arange(1.0, total + 1), torch.nan)
        taken = rows.take(values)
        kept = min(count, rows.count)
        assert torch.equal(taken[:kept], values[active][:kept]) and (taken[kept:] == 0).all()
        back, marked = rows.put(taken), rows.put(taken != 0)
        if count > bound:
            assert back.isnan().all() and not marked.any()
        else:
            assert torch.equal(back, torch.where(active, values, 0.0)) and torch.equal(marked, active)


def test_an_empty_place_does_not_read_a_masked_row(device):
    """Rows outside the mask hold NaN, also the last one."""
    hidden, weight, targets, _ = make_case(torch.float32, device, 50, rows=(20,))
    mask = torch.arange(20, device=device) % 3 == 0
    hidden.data[~mask] = torch.nan
    log_prob, _ = linear_logprob_entropy(hidden, weight, targets, mask=mask, max_mask_rows=15, max_grad_rows=10)
    got = torch.autograd.grad(log_prob[3] + log_prob[6], [hidden, weight])
    assert all(gradient.isfinite().all() for gradient in got)


# ---- Uses in training


def test_chunk_rows_does_not_change_the_result(device):
    hidden, weight, targets, _ = make_case(torch.float32, device, 2055, rows=(37,))
    results = []
    for chunk_rows in (1, 7, 37, 1000, None):
        log_prob, entropy = linear_logprob_entropy(hidden, weight, targets, chunk_rows=chunk_rows)
        results.append((log_prob, entropy, *torch.autograd.grad(log_prob.sum(), [hidden, weight])))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows, is_summed", [(8192, False), (8193, True)])
def test_the_weights_gradient_is_summed_in_float32_only_over_several_chunks(rows, is_summed, monkeypatch):
    """On a GPU, by shapes alone: 8192 rows are one chunk of the backward."""
    monkeypatch.setitem(tiles._BACKWARD_TILE, "cpu", tiles._BACKWARD_TILE["cuda"])
    outputs = []
    monkeypatch.setattr(tiles, "gemm", lambda out, *_, accumulate=False, **__: outputs.append((out, accumulate)))
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, 16, dtype=torch.bfloat16) for n in (rows, 20_000))
        head = tiles.Head.of(hidden, weight, None, tiles.Options(), backward=True)
        head = replace(head, dtype=torch.bfloat16)  # as on a GPU
        values = torch.empty(rows)
        row_values = [values, None, values, torch.empty(rows, 2), values.long(), torch.ones((), dtype=torch.float64)]
        tiles.backward_tiles(head, hidden, row_values, weight, [False, True, False])
    of_weight = [(out.dtype, accumulate) for out, accumulate in outputs if out.shape[1] == 16]
    vocab_tiles = 3
    if is_summed:
        assert of_weight == [(torch.float32, False), (torch.float32, True)] * vocab_tiles
    else:
        assert of_weight == [(torch.bfloat16, False)] * vocab_tiles


def test_frozen_weight_or_hidden(device):
    hidden, weight, targets, bias = make_case(torch.float32, device, 2055, bias=True)
    log_prob, _ = linear_logprob_entropy(hidden, weight, targets, bias=bias)
    expected = torch.autograd.grad(log_prob.sum(), [hidden, weight, bias])
    for frozen in range(3):
        inputs = [x.detach().requires_grad_(i != frozen) for i, x in enumerate((hidden, weight, bias))]
        log_prob, _ = linear_logprob_entropy(inputs[0], inputs[1], targets, bias=inputs[2])
        log_prob.sum().backward()
        assert inputs[frozen].grad is None
        for i in {0, 1, 2} - {frozen}:
            assert torch.equal(inputs[i].grad, expected[i])


def test_tied_weight_gathers_both_gradients(device):
    _, weight, targets, _ = make_case(torch.float32, device, 60)
    ids = targets.roll(1, 0)

    def embedded(weight):
        return torch.nn.functional.embedding(ids, weight).tanh()

    linear_logprob_entropy(embedded(weight), weight, targets)[0].sum().backward()
    wide = weight.detach().double().requires_grad_()
    reference.linear_logprob_entropy(embedded(wide), wide, targets)[0].sum().backward()
    torch.testing.assert_close(weight.grad.double(), wide.grad, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing(device):
    hidden, weight, targets, _ = make_case(torch.float32, device, 60)

    def loss(hidden, weight):
        return linear_logprob_entropy(hidden, weight, targets)[0].sum()

    expected = torch.autograd.grad(loss(hidden, weight), [hidden, weight])
    kept = torch.utils.checkpoint.checkpoint(loss, hidden, weight, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(kept, [hidden, weight]), expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_takes_its_dtype(device):
    hidden, weight, targets, _ = make_case(torch.float32, device, 2055)
    rounded = [x.detach().bfloat16().float() for x in (hidden, weight)]
    expected = reference.linear_logprob_entropy(rounded[0], rounded[1], targets)
    with torch.autocast(device.type, torch.bfloat16):
        log_prob, entropy = linear_logprob_entropy(hidden, weight, targets)
        # A backbone under autocast returns bfloat16.
        mixed, _ = linear_logprob_entropy(hidden.bfloat16(), weight, targets)
    torch.testing.assert_close(log_prob, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, expected[1], atol=1e-5, rtol=1e-5)
    (log_prob.sum() + mixed.sum()).backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    with pytest.raises(ValueError, match="weight is float32 and hidden bfloat16; outside autocast"):
        linear_logprob_entropy(hidden.bfloat16(), weight, targets)


def test_strided_inputs_equal_contiguous_ones(device):
    hidden, weight, targets, _ = make_case(torch.float32, device, 301, rows=(4, 7))
    views = hidden[:, 1:-1], weight.detach()[::2], targets[:, 1:-1] // 2
    actual = linear_logprob_entropy(*views)
    expected = linear_logprob_entropy(*(x.clone(memory_format=torch.contiguous_format) for x in views))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_padding_of_the_vocabulary_is_not_read(device):
    hidden, weight, targets, bias = make_case(torch.float32, device, 100, bias=True)
    padded = [torch.cat([x.detach(), torch.full_like(x[:28], torch.nan)]).requires_grad_() for x in (weight, bias)]
    actual = linear_logprob_entropy(hidden, padded[0], targets, bias=padded[1], vocab_size=100)
    expected = linear_logprob_entropy(hidden, weight, targets, bias=bias)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    actual[0].sum().backward()
    expected[0].sum().backward()
    for got, wanted in zip(padded, (weight, bias), strict=True):
        assert torch.equal(got.grad[:100], wanted.grad) and (got.grad[100:] == 0).all()


def test_minus_infinity_in_the_bias_takes_an_entry_out(device):
    hidden, weight, targets, bias = make_case(torch.float32, device, 3000, bias=True)
    bias.data[100:] = -torch.inf  # includes all of a tile
    targets %= 100
    log_prob, entropy = linear_logprob_entropy(hidden, weight, targets, bias=bias, entropy_grad=True)
    expected = reference.linear_logprob_entropy(hidden, weight[:100], targets, bias=bias[:100])
    torch.testing.assert_close(log_prob, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, expected[1], atol=1e-5, rtol=0)
    (log_prob.sum() + entropy.sum()).backward()
    assert weight.grad.isfinite().all() and (weight.grad[100:] == 0).all()


def test_is_top1_at_ties(device):
    # Logits 0 1 1 0: argmax returns the first of the largest.
    weight = torch.tensor([[0.0], [1.0], [1.0], [0.0]], device=device)
    hidden, targets = torch.ones(4, 1, device=device), torch.arange(4, device=device)
    *_, is_top1, squared = linear_logprob_entropy(hidden, weight, targets, token_statistics=True)
    assert is_top1.tolist() == [False, True, False, False]
    torch.testing.assert_close(squared, (weight[:, 0].softmax(0) ** 2).sum().expand(4))


# ---- The vocabulary over a process group


def sharded_equals_unsharded(world):
    """On each of the first `world` ranks, which hold a part of the vocabulary each."""
    rank = dist.get_rank()
    if rank >= world:
        return
    for sizes, padding in SHARDS[world]:
        vocab = sum(sizes)
        start, stop = sum(sizes[:rank]), sum(sizes[: rank + 1])
        hidden, weight, targets, bias = make_case(torch.float32, "cpu", vocab, rows=(40,), bias=True)
        grads = sparse_grads((40,), torch.float32, "cpu")
        mask = torch.arange(40) % 5 != 0
        options = dict(mask=mask, temperature=0.7, softcap=6.0, entropy_grad=True, token_statistics=True)
        expected = linear_logprob_entropy(hidden, weight, targets, bias=bias, chunk_rows=16, **options)
        wanted = gradients(expected[:2], grads, (hidden, weight, bias))
        # Padding holds NaN, which shows in the results if it is read.
        shard = [
            torch.cat([x.detach()[start:stop], torch.full_like(x[:padding], torch.nan)]).requires_grad_()
            for x in (weight, bias)
        ]
        # Only the end of the vocabulary has padding.
        assert not padding or stop == vocab or world == 1 or rank < world - 1
        real = slice(0, stop - start)
        if rank < world - 1:
            shard = [x.detach()[real].requires_grad_() for x in shard]
        actual = linear_logprob_entropy(
            hidden, shard[0], targets, bias=shard[1], vocab_start=start, vocab_size=vocab,
            group=GROUPS[world - 1], chunk_rows=16, **options,
        )  # fmt: skip
        for a, b in zip(actual[:2], expected[:2], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        assert torch.equal(actual[2], expected[2])
        torch.testing.assert_close(actual[3], expected[3])
        got = gradients(actual[:2], grads, (hidden, *shard))
        torch.testing.assert_close(got[0], wanted[0], atol=1e-5, rtol=1e-5)
        for a, b in zip(got[1:], wanted[1:], strict=True):
            torch.testing.assert_close(a[real], b[start:stop], atol=1e-5, rtol=1e-5)
            assert (a[stop - start :] == 0).all()


SHARDS = {
    1: [((103,), 0), ((103,), 25)],
    2: [((64, 64), 0), ((2055, 98), 7), ((1, 102), 0), ((103, 0), 0), ((103, 0), 5)],
    4: [((26, 26, 26, 25), 1), ((5, 0, 2100, 3), 0), ((1, 1, 1, 1), 0)],
}


@pytest.mark.parametrize("world", SHARDS)
def test_sharded_vocabulary_equals_the_unsharded_one(world, eight):
    eight.run(sharded_equals_unsharded, world)


# ---- Registration, compilation, autograd


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, dtype):
    hidden, weight, targets, bias = make_case(dtype, device, 60, bias=True)
    mask = torch.arange(15, device=device).view(3, 5) % 3 != 0
    number = torch.tensor(0.7, dtype=torch.float64)
    op = torch.ops.entropy_rl
    torch.library.opcheck(op.linear_logprob_entropy, (hidden, weight, targets, bias, mask, 0.7, None, True))
    options = {"chunk_rows": 4, "max_grad_rows": 12, "softcap": 5.0}
    arguments = (hidden, weight, targets, bias, mask, number)
    torch.library.opcheck(op.linear_logprob_entropy_forward, arguments, options)
    torch.library.opcheck(op.linear_logprob_entropy_forward, arguments, {"token_statistics": True})
    plain = [x.detach() if x.is_floating_point() else x for x in arguments]
    _, entropy, _, _, max_log_sum = op.linear_logprob_entropy_forward(*plain, **options)
    grad = torch.ones(3, 5, device=device)
    for needs in ([True, True, True], [False, True, False]):
        torch.library.opcheck(
            op.linear_logprob_entropy_backward, (grad, None, *plain, entropy, max_log_sum, needs), options
        )


def test_opcheck_of_the_tile_ops(device):
    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(4, 33, generator=generator).to(device)
    targets, number = torch.tensor([3, 40, 9, 10], device=device), torch.tensor(0.7, dtype=torch.float64)
    state = torch.tensor([-math.inf, 0, 0, 0, -math.inf, 0], dtype=torch.float64, device=device).repeat(4, 1)
    op = torch.ops.entropy_rl
    torch.library.opcheck(
        op.linear_logprob_entropy_tile_forward, (tile, targets, number, None, 0, 1.0, 0.0, True, state)
    )
    row, pair = torch.ones(4, device=device), torch.ones(4, 2, device=device)
    narrow = torch.empty(4, 33, dtype=torch.bfloat16, device=device)
    for out in (None, narrow):
        torch.library.opcheck(
            op.linear_logprob_entropy_tile_backward,
            (row, None, row, pair, targets, number, None, 0, 1.0, 0.0, tile, out),
        )
    with pytest.raises(RuntimeError, match="tile_forward has no derivative"):
        op.linear_logprob_entropy_tile_forward(tile.requires_grad_(), targets, number, None, 0, 1.0, 0.0, False, state)


def test_compile_fullgraph_and_no_recompile(device):
    def step(hidden, weight, targets, temperature, rows):
        log_prob, entropy = linear_logprob_entropy(
            hidden, weight, targets, temperature=temperature, entropy_grad=True, max_grad_rows=rows
        )
        return log_prob.sum() + entropy.sum()

    compiled, counter = compile_counting(step, dynamic=True)
    for rows, temperature in [(4, 1.0), (7, 0.9), (12, 0.6), (5, 1.3)]:
        hidden, weight, targets, _ = make_case(torch.float32, device, 33, rows=(rows,))
        actual = compiled(hidden, weight, targets, temperature, rows + 3)
        expected = step(hidden, weight, targets, temperature, rows + 3)
        torch.testing.assert_close(actual, expected)
        for a, b in zip(*(torch.autograd.grad(x, [hidden, weight]) for x in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.graphs == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_through_aot_autograd(device, autocast):
    def step(hidden, weight, targets):
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=autocast):
            log_prob, entropy = linear_logprob_entropy(hidden * 2, weight, targets, entropy_grad=True)
        return (log_prob * 2 + entropy).sum()

    torch._dynamo.reset()
    hidden, weight, targets, _ = make_case(torch.float32, device, 33)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(hidden, weight, targets), [hidden, weight])
    for a, b in zip(torch.autograd.grad(compiled(hidden, weight, targets), [hidden, weight]), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_derivative_raises(device):
    hidden, weight, targets, _ = make_case(torch.float32, device, 33)
    log_prob, _ = linear_logprob_entropy(hidden, weight, targets)
    (grad,) = torch.autograd.grad((log_prob**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob_entropy_backward has no derivative"):
        grad.sum().backward()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_properties(device, data):
    rows, vocab = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5000))
    hidden, weight, targets, _ = make_case(
        torch.float32,
        device,
        vocab,
        rows=(rows,),
        width=data.draw(st.integers(1, 40)),
        seed=data.draw(st.integers(0, 999)),
    )
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), device=device)
    log_prob, entropy = linear_logprob_entropy(
        hidden, weight, targets, chunk_rows=data.draw(st.integers(1, 10)), max_grad_rows=rows
    )
    assert (log_prob <= 1e-5).all() and (entropy >= 0).all() and (entropy <= math.log(vocab) + 1e-5).all()
    # With gradients on the chosen rows only, the result is that of a call with only those rows.
    sparse = torch.autograd.grad(log_prob, [hidden, weight], chosen.float())
    few = hidden.detach()[chosen].requires_grad_()
    alone = torch.autograd.grad(linear_logprob_entropy(few, weight, targets[chosen])[0].sum(), [few, weight])
    torch.testing.assert_close(sparse[0][chosen], alone[0], atol=1e-5, rtol=1e-4)
    assert (sparse[0][~chosen] == 0).all()
    torch.testing.assert_close(sparse[1], alone[1], atol=1e-5, rtol=1e-4)


# ---- Bad input

X, W, Y = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)
BAD_INPUT = {
    "weight of another width": (dict(weight=W[:, :3]), r"weight has shape \[5, 3\]; it must be \[V, 4\]"),
    "weight of one dimension": (dict(weight=W[0]), r"weight has shape \[4\]; it must be \[V, 4\]"),
    "empty vocabulary": (dict(weight=W[:0]), "at least one entry"),
    "weight of another dtype": (dict(weight=W.double()), "weight is float64 and hidden float32"),
    "integer hidden": (dict(hidden=X.long()), "hidden is int64; it must be float32"),
    "no dimension": (dict(hidden=torch.tensor(1.0)), "hidden has no dimension"),
    "targets of another shape": (dict(targets=Y[:1]), r"targets has shape \[1, 3\].*\[2, 3\]"),
    "floating targets": (dict(targets=Y.float()), "targets is float32.*integer"),
    "mask of another shape": (dict(mask=Y[0]), r"mask has shape \[3\].*\[2, 3\]"),
    "bias of another shape": (dict(bias=torch.zeros(4)), r"bias has shape \[4\]; it must be \[5\]"),
    "integer bias": (dict(bias=torch.zeros(5, dtype=torch.int32)), "bias is int32"),
    "temperature 0": (dict(temperature=0.0), "temperature is 0.*above 0"),
    "temperature NaN": (dict(temperature=math.nan), "temperature is nan.*above 0"),
    "temperature of another shape": (dict(temperature=torch.ones(7)), r"temperature has shape \[7\].*\[2, 3\]"),
    "chunk_rows 0": (dict(chunk_rows=0), "chunk_rows is 0; it must be 1 or above"),
    "max_grad_rows below 0": (dict(max_grad_rows=-1), "max_grad_rows is -1; it must be 0 or above"),
    "max_mask_rows below 0": (dict(max_mask_rows=-1), "max_mask_rows is -1; it must be 0 or above"),
    "logit_scale 0": (dict(logit_scale=0.0), "logit_scale is 0.*above 0"),
    "softcap below 0": (dict(softcap=-30.0), "softcap is -30.*above 0"),
    "vocab_size beyond weight": (dict(vocab_size=6), r"vocab_size is 6; it must be in \[1, 5\]"),
    "vocab_start without group": (dict(vocab_start=5), "vocab_start is 5; it must be 0"),
    "mask on another device": (dict(mask=torch.zeros(2, 3, device="meta")), "mask is on meta.*same device"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(device, case):
    arguments, message = BAD_INPUT[case]
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in {"hidden": X, "weight": W, "targets": Y, **arguments}.items()
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob_entropy(moved.pop("hidden"), moved.pop("weight"), moved.pop("targets"), **moved)


@pytest.mark.parametrize("target", [5, -1, 2**40])
def test_target_outside_the_vocabulary(device, target):
    hidden, weight, targets, _ = make_case(torch.float32, device, 5, rows=(3,))
    targets[1] = target
    if device.type == "cpu":
        with pytest.raises(ValueError, match=rf"targets\[1\].* is {target};.*\[0, 5\)"):
            linear_logprob_entropy(hidden, weight, targets)
        return
    log_prob, _ = linear_logprob_entropy(hidden, weight, targets)
    assert log_prob.isnan().tolist() == [False, True, False]


def test_row_temperature_that_is_not_positive(device):
    hidden, weight, targets, _ = make_case(torch.float32, device, 5, rows=(3,))
    temperature = torch.tensor([1.0, 0.0, 1.0], device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"temperature\[1\] \(flat index\) is 0.*above 0"):
            linear_logprob_entropy(hidden, weight, targets, temperature=temperature)
        return
    log_prob, _ = linear_logprob_entropy(hidden, weight, targets, temperature=temperature)
    assert log_prob.isnan().tolist() == [False, True, False]
