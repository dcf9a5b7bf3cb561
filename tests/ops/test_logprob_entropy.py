"""logprob_entropy and token_entropy: parity, gradients, compile, properties, bad input.

The two ops share their kernels; test_token_entropy.py tests what token_entropy alone has.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled import compile_counting
from entropy_rl_ext import logprob_entropy, reference, token_entropy

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

VOCABULARIES = [
    1,  # nothing to choose: entropy 0, log-prob 0
    2,  # the smallest choice
    17,  # below one warp, and not a multiple of a 16-byte pack
    2048,  # exactly one chunk of the CPU kernel
    2055,  # a chunk and a tail
    50257,  # GPT-2: odd, so rows begin at every alignment
]


def make_logits(shape, dtype, device, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)


def make_targets(logits, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=generator).to(logits.device)


def value_tolerance(dtype):
    """Logits are widened exactly, so 16-bit input has float32's bound (DESIGN: 1e-5 absolute)."""
    return 1e-12 if dtype == torch.float64 else 1e-5


def assert_gradient_close(actual, expected, grad_scale):
    """1e-6 |g| of arithmetic, then one rounding to the gradient's own dtype."""
    expected = expected.double()
    eps = torch.finfo(actual.dtype).eps
    arithmetic = (1e-13 if actual.dtype == torch.float64 else 1e-6) * max(grad_scale, 1.0)
    bound = arithmetic + eps * expected.abs() + torch.finfo(actual.dtype).smallest_normal
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"largest excess {(error - bound).max().item()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_parity_with_reference(device, dtype, vocab, temperature):
    logits = make_logits((3, 5, vocab), dtype, device).requires_grad_()
    targets = make_targets(logits)
    log_prob, entropy = logprob_entropy(logits, targets, temperature=temperature, entropy_grad=True)
    wide = logits.detach().double().requires_grad_()
    expected = reference.logprob_entropy(wide, targets, temperature=temperature, entropy_grad=True)

    assert log_prob.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = value_tolerance(dtype)
    torch.testing.assert_close(log_prob.double(), expected[0], atol=tolerance, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), expected[1], atol=tolerance, rtol=1e-6)

    grads = [torch.randn(log_prob.shape, dtype=log_prob.dtype, device=device) for _ in range(2)]
    (actual,) = torch.autograd.grad([log_prob, entropy], logits, grads)
    (wanted,) = torch.autograd.grad(expected, wide, [g.double() for g in grads])
    scale = sum(g.abs().max().item() for g in grads) * (1 + math.log(vocab)) / temperature
    assert actual.dtype == dtype
    assert_gradient_close(actual, wanted, scale)

    alone = token_entropy(logits, temperature=temperature)
    assert torch.equal(alone, entropy)
    torch.testing.assert_close(
        alone.double(), reference.token_entropy(wide, temperature=temperature), atol=tolerance, rtol=1e-6
    )
    (of_alone,) = torch.autograd.grad(alone, logits, grads[1])
    _, entropy = logprob_entropy(logits, targets, temperature=temperature, entropy_grad=True)
    assert torch.equal(of_alone, torch.autograd.grad(entropy, logits, grads[1])[0])


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_shifted_logits_lose_no_digits(device, shift):
    # Multiples of 1/64 below 1e4 survive the shift exactly, so the answer must not move at all.
    logits = (make_logits((64, 4099), torch.float64, device) * 64).round() / 64
    shifted = (logits + shift).float()
    targets = make_targets(logits)
    log_prob, entropy = logprob_entropy(shifted, targets)
    expected = reference.logprob_entropy(logits, targets)
    torch.testing.assert_close(log_prob.double(), expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), expected[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_hot_rows(device, dtype):
    logits = torch.full((4, 1000), -1e4, dtype=dtype, device=device)
    targets = torch.tensor([0, 1, 500, 999], device=device)
    logits[torch.arange(4), targets] = 1e4
    log_prob, entropy = logprob_entropy(logits, targets)
    assert torch.equal(log_prob, torch.zeros_like(log_prob))
    assert torch.equal(entropy, torch.zeros_like(entropy))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_entries_have_no_weight(device, dtype):
    logits = make_logits((6, 2124), dtype, device)
    logits[:, ::3] = -torch.inf
    logits[0, 1:] = -torch.inf  # one choice left
    logits[0, 0] = 2.0
    logits[1, :2074] = -torch.inf  # the whole first chunk
    targets = torch.tensor([0, 2075, 1, 4, 7, 10], device=device)
    logits.requires_grad_()
    log_prob, entropy = logprob_entropy(logits, targets, entropy_grad=True)
    wide = logits.detach().double().requires_grad_()
    expected = reference.logprob_entropy(wide, targets, entropy_grad=True)
    tolerance = value_tolerance(dtype)
    torch.testing.assert_close(log_prob.double(), expected[0], atol=tolerance, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), expected[1], atol=tolerance, rtol=1e-6)
    (log_prob.sum() + entropy.sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, ::3][1:] == 0).all()


def test_target_of_probability_zero(device):
    logits = torch.zeros(1, 8, device=device)
    logits[0, 3] = -torch.inf
    log_prob, entropy = logprob_entropy(logits, torch.tensor([3], device=device))
    assert log_prob.item() == -torch.inf
    assert entropy.item() == pytest.approx(math.log(7), abs=1e-6)


@pytest.mark.parametrize("temperature", [2.0**-126, 2.0**126])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_has_no_weight_at_any_temperature(device, dtype, temperature):
    logits = torch.full((1, 40), -torch.inf, dtype=dtype, device=device)
    logits[0, 7] = logits[0, 30] = 3.0
    log_prob, entropy = logprob_entropy(logits, torch.tensor([7], device=device), temperature=temperature)
    assert entropy.item() == pytest.approx(math.log(2)) and log_prob.item() == pytest.approx(-math.log(2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, "all -inf"])
def test_bad_logits_give_nan_in_their_own_row_alone(device, bad):
    logits = make_logits((5, 2000), torch.float32, device)
    clean = logprob_entropy(logits, make_targets(logits))
    logits[2] = -torch.inf if bad == "all -inf" else logits[2]
    if bad != "all -inf":
        logits[2, 1500] = bad
    logits.requires_grad_()
    log_prob, entropy = logprob_entropy(logits, make_targets(logits), entropy_grad=True)
    (log_prob.sum() + entropy.sum()).backward()
    others = [0, 1, 3, 4]
    assert log_prob[2].isnan() and entropy[2].isnan()
    assert torch.equal(log_prob[others], clean[0][others])
    assert torch.equal(entropy[others], clean[1][others])
    assert logits.grad[2].isnan().any() and torch.isfinite(logits.grad[others]).all()


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16], ids=str)
def test_masked_rows_are_not_read(device, mask_dtype):
    logits = make_logits((4, 6, 300), torch.float32, device)
    targets = make_targets(logits)
    mask = (torch.arange(24, device=device).reshape(4, 6) % 3 != 0).to(mask_dtype)
    expected = [torch.where(mask != 0, value, 0) for value in logprob_entropy(logits, targets)]
    logits[mask == 0] = torch.nan
    targets[mask == 0] = -100
    logits.requires_grad_()
    log_prob, entropy = logprob_entropy(logits, targets, mask=mask, entropy_grad=True)
    assert torch.equal(log_prob, expected[0]) and torch.equal(entropy, expected[1])
    assert torch.equal(token_entropy(logits, mask=mask), entropy)
    (log_prob.sum() + entropy.sum()).backward()
    assert (logits.grad[mask == 0] == 0).all()
    assert torch.isfinite(logits.grad).all() and (logits.grad[mask != 0] != 0).any(-1).all()


def test_all_rows_masked(device):
    logits = torch.full((2, 3, 50), torch.nan, device=device, requires_grad=True)
    targets = torch.full((2, 3), -1, device=device)
    log_prob, entropy = logprob_entropy(logits, targets, mask=torch.zeros(2, 3, device=device))
    log_prob.sum().backward()
    assert (log_prob == 0).all() and (entropy == 0).all() and (logits.grad == 0).all()


def test_rows_without_gradient_are_not_read_in_the_backward(device):
    logits = make_logits((4, 500), torch.float32, device).requires_grad_()
    log_prob, entropy = logprob_entropy(logits, make_targets(logits), entropy_grad=True)
    logits.data[1] = torch.nan  # behind autograd's back, which refuses a saved tensor that changed
    grad = torch.tensor([1.0, 0.0, -2.0, 1.0], device=device)
    (gradient,) = torch.autograd.grad([log_prob, entropy], logits, [grad, grad])
    assert (gradient[1] == 0).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    "rows",
    [
        160,  # float32: below the 32 MiB from which the CPU maps the gradient's memory itself
        170,  # above
    ],
)
@pytest.mark.parametrize(
    ("stride", "without"),
    [(1, slice(0)), (1, slice(1, None, 3)), (2, slice(0)), (9, slice(0))],
    ids=["every row", "most rows", "half the rows", "few rows"],
)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_large_gradient_equals_that_of_each_row_alone(device, rows, stride, without, layout):
    """50257 is odd: rows begin and end within pages, beside rows that stay zero."""
    vocab = 50257
    logits = make_logits((rows, vocab + 3), torch.float32, device)[:, :vocab]
    logits = (logits if layout == "strided" else logits.contiguous()).requires_grad_()
    targets = make_targets(logits)
    grad = torch.zeros(rows, device=device)
    grad[::stride] = torch.arange(1, len(grad[::stride]) + 1, device=device)
    grad[without] = 0
    for _ in range(2):
        torch.full((rows, vocab), torch.nan, device=device)  # memory that the gradient may be given next
        (gradient,) = torch.autograd.grad(logprob_entropy(logits, targets)[0], logits, grad)
        assert gradient.is_contiguous() and gradient.count_nonzero(-1).bool().equal(grad != 0)
        for row in (0, stride, rows - 1 - (rows - 1) % stride):
            one = logits[row : row + 1].detach().requires_grad_()
            log_prob, _ = logprob_entropy(one, targets[row : row + 1])
            (expected,) = torch.autograd.grad(log_prob, one, grad[row : row + 1])
            assert gradient[row].equal(expected[0])
        gradient.fill_(torch.nan)  # it is the caller's, zeros and all


def test_large_gradients_that_live_at_once_share_no_memory(device):
    """The CPU gives the memory of a dropped gradient to the next, of the same size or a smaller one, once."""
    logits = make_logits((340, 50257), torch.float32, device)
    targets = make_targets(logits)

    def gradient(rows, scale):
        leaf = logits[:rows].detach().requires_grad_()
        log_prob, _ = logprob_entropy(leaf, targets[:rows])
        return torch.autograd.grad(log_prob, leaf, torch.full_like(log_prob, scale))[0]

    expected = gradient(340, 1.0).clone()  # whose memory is free for the next
    alive = [gradient(340, 2.0), gradient(340, 3.0), gradient(200, 4.0)]
    for scale, each in zip([2.0, 3.0, 4.0], alive, strict=True):
        assert torch.allclose(each, scale * expected[: len(each)], rtol=1e-6)


def test_temperature_per_row(device):
    logits = make_logits((3, 4, 700), torch.float32, device).requires_grad_()
    targets = make_targets(logits)
    temperature = torch.tensor([[0.5], [1.0], [2.0]], device=device)
    log_prob, entropy = logprob_entropy(logits, targets, temperature=temperature)
    for i, value in enumerate([0.5, 1.0, 2.0]):
        expected = logprob_entropy(logits[i], targets[i], temperature=value)
        assert torch.equal(log_prob[i], expected[0]) and torch.equal(entropy[i], expected[1])


LAYOUTS = {
    "transposed rows": lambda x: x.transpose(0, 1),
    "sliced rows": lambda x: x[:, 1:-1],  # verl's logits[:, -response_length - 1 : -1]
    "sliced vocabulary": lambda x: x[..., 1:],  # rows not 16-byte aligned
    "strided vocabulary": lambda x: x[..., ::2],  # the one layout that is copied
    "expanded rows": lambda x: x[:1].expand(5, -1, -1),
    "expanded vocabulary": lambda x: x[..., :1].expand(-1, -1, 9),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_logits_equal_contiguous_ones(device, layout, dtype):
    view = LAYOUTS[layout](make_logits((4, 7, 135), dtype, device))
    contiguous = view.clone(memory_format=torch.contiguous_format).requires_grad_()
    view = view.detach().requires_grad_()
    targets = make_targets(view).transpose(0, 1).contiguous().transpose(0, 1)
    actual = logprob_entropy(view, targets, entropy_grad=True)
    expected = logprob_entropy(contiguous, targets, entropy_grad=True)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    grads = [torch.randn_like(value) for value in expected]
    assert torch.equal(torch.autograd.grad(actual, view, grads)[0], torch.autograd.grad(expected, contiguous, grads)[0])


def test_many_leading_dimensions(device):
    logits = make_logits((2, 3, 2, 3, 2, 3, 11), torch.float32, device).permute(5, 3, 1, 0, 2, 4, 6)
    targets = make_targets(logits)
    actual = logprob_entropy(logits, targets)
    expected = logprob_entropy(logits.contiguous(), targets)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5), (5,)])
def test_no_rows_and_a_single_row(device, shape):
    logits = make_logits(shape, torch.float32, device).requires_grad_()
    log_prob, entropy = logprob_entropy(logits, make_targets(logits))
    assert log_prob.shape == entropy.shape == shape[:-1]
    log_prob.sum().backward()
    assert logits.grad.shape == shape


def test_same_bits_for_any_number_of_threads():
    logits = make_logits((37, 5003), torch.float32, "cpu")
    targets = make_targets(logits)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(logprob_entropy(logits, targets))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_entropy_carries_a_gradient_only_when_asked(device):
    logits = make_logits((2, 10), torch.float32, device).requires_grad_()
    targets = make_targets(logits)
    assert not logprob_entropy(logits, targets)[1].requires_grad
    assert logprob_entropy(logits, targets, entropy_grad=True)[1].requires_grad


def test_gradcheck(device):
    logits = make_logits((3, 4, 6), torch.float64, device, scale=1.0).requires_grad_()
    targets = make_targets(logits)
    mask = torch.tensor([[1, 0, 1, 1]], device=device).expand(3, 4)
    temperature = torch.rand(3, 4, dtype=torch.float64, device=device) + 0.5

    def function(x):
        return logprob_entropy(x, targets, mask=mask, temperature=temperature, entropy_grad=True)

    assert torch.autograd.gradcheck(function, (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, dtype):
    logits = make_logits((3, 4, 6), dtype, device).requires_grad_()
    targets = make_targets(logits)
    mask = torch.ones(3, 4, dtype=torch.bool, device=device)
    temperature = torch.ones(3, 4, device=device)
    number = torch.tensor(0.7, dtype=torch.float64)
    op = torch.ops.entropy_rl
    torch.library.opcheck(op.logprob_entropy, (logits, targets, mask, 1.0, temperature, True))
    torch.library.opcheck(op.logprob_entropy_forward, (logits, targets, None, number))
    torch.library.opcheck(op.logprob_entropy_forward, (logits, None, mask, number))
    outputs = op.logprob_entropy_forward(logits.detach(), targets, mask, number)
    grad = torch.ones(3, 4, device=device)
    for grads, given_targets in [((grad, None), targets), ((None, grad), None)]:
        arguments = (*grads, logits.detach(), given_targets, mask, number, *outputs[1:])
        torch.library.opcheck(op.logprob_entropy_backward, arguments)


def test_forward_op_without_targets(device):
    logits = make_logits((3, 6), torch.float32, device)
    number = torch.tensor(0.7, dtype=torch.float64)
    log_prob, entropy, max_log_sum = torch.ops.entropy_rl.logprob_entropy_forward(logits, None, None, number)
    assert log_prob.shape == (0,)
    expected = torch.ops.entropy_rl.logprob_entropy_forward(logits, make_targets(logits), None, number)
    assert torch.equal(entropy, expected[1]) and torch.equal(max_log_sum, expected[2])


def test_backward_op_checks_its_inputs(device):
    """The backward op is public too: shapes that do not fit must raise, never read outside a tensor."""
    logits = make_logits((3, 6), torch.float32, device)
    rows, max_log_sum = torch.zeros(3, device=device), torch.zeros(3, 2, device=device)
    number = torch.tensor(1.0, dtype=torch.float64)
    targets = make_targets(logits)

    def backward(grad_log_prob=None, grad_entropy=rows, targets=targets, entropy=rows, max_log_sum=max_log_sum):
        return torch.ops.entropy_rl.logprob_entropy_backward(
            grad_log_prob, grad_entropy, logits, targets, None, number, entropy, max_log_sum
        )

    with pytest.raises(ValueError, match=r"max_log_sum has shape \[3\]"):
        backward(max_log_sum=rows)
    with pytest.raises(ValueError, match=r"entropy has shape \[2\]"):
        backward(entropy=rows[:2])
    with pytest.raises(ValueError, match=r"grad_entropy has shape \[1\]"):
        backward(grad_entropy=rows[:1])
    with pytest.raises(ValueError, match=r"grad_log_prob has shape \[1\]"):
        backward(grad_log_prob=rows[:1])
    with pytest.raises(ValueError, match="grad_log_prob is given and targets is None"):
        backward(grad_log_prob=rows, targets=None)


def test_compile_fullgraph_and_no_recompile(device):
    def step(logits, targets, temperature):
        log_prob, entropy = logprob_entropy(logits, targets, temperature=temperature, entropy_grad=True)
        return log_prob.sum() + entropy.sum()

    compiled, counter = compile_counting(step, dynamic=True)
    for rows, temperature in [(4, 1.0), (7, 0.9), (12, 0.6), (5, 1.3)]:
        logits = make_logits((rows, 33), torch.float32, device).requires_grad_()
        targets = make_targets(logits)
        actual, expected = compiled(logits, targets, temperature), step(logits, targets, temperature)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits))
    assert counter.graphs == 1


def test_compile_through_aot_autograd(device):
    def step(logits, targets):
        log_prob, entropy = logprob_entropy(logits, targets, entropy_grad=True)
        return (log_prob * 2 + entropy).sum()

    torch._dynamo.reset()
    logits = make_logits((4, 33), torch.float32, device).requires_grad_()
    targets = make_targets(logits)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(logits, targets), logits)
    torch.testing.assert_close(torch.autograd.grad(compiled(logits, targets), logits), expected)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_properties(device, data):
    rows = data.draw(st.integers(1, 4))
    vocab = data.draw(st.integers(1, 3000))
    scale = data.draw(st.sampled_from([0.0, 0.1, 3.0, 50.0]))
    logits = make_logits((rows, vocab), torch.float32, device, scale, data.draw(st.integers(0, 2**31)))
    targets = make_targets(logits)
    log_prob, entropy = logprob_entropy(logits, targets)
    assert (log_prob <= 1e-6).all()
    assert (entropy >= 0).all() and (entropy <= math.log(vocab) + 1e-5).all()
    # Raising every logit by the same power of two changes nothing but rounding of the logits themselves.
    order = torch.randperm(vocab, device=device)
    permuted = logprob_entropy(logits[:, order], targets)[1]
    torch.testing.assert_close(permuted, entropy, atol=1e-5, rtol=0)


L = torch.zeros(2, 3, 5)
Y = torch.zeros(2, 3, dtype=torch.int64)
BAD_INPUT = {
    "targets of another shape": (dict(logits=L, targets=Y[:1]), r"targets has shape \[1, 3\].*\[2, 3\]"),
    "floating targets": (dict(logits=L, targets=Y.float()), "targets is float32.*integer"),
    "integer logits": (
        dict(logits=Y, targets=Y[0]),
        "logits is int64.*float32, float64",
    ),
    "no dimension": (dict(logits=torch.tensor(1.0), targets=torch.tensor(0)), r"logits has no dimension"),
    "empty vocabulary": (dict(logits=L[..., :0], targets=Y), "at least one entry"),
    "mask of another shape": (dict(logits=L, targets=Y, mask=Y[0]), r"mask has shape \[3\].*\[2, 3\]"),
    "temperature 0": (dict(logits=L, targets=Y, temperature=0.0), "temperature is 0.*above 0"),
    "temperature below 0": (dict(logits=L, targets=Y, temperature=-1), "temperature is -1.*above 0"),
    "temperature NaN": (dict(logits=L, targets=Y, temperature=math.nan), "temperature is nan.*above 0"),
    "temperature infinite": (dict(logits=L, targets=Y, temperature=math.inf), "temperature is inf.*finite"),
    "temperature of another shape": (
        dict(logits=L, targets=Y, temperature=torch.ones(7)),
        r"temperature has shape \[7\].*\[2, 3\]",
    ),
    "mask on another device": (
        dict(logits=L, targets=Y, mask=torch.zeros(2, 3, device="meta")),
        "mask is on.*(meta|another device).*same device",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(device, case):
    arguments, message = BAD_INPUT[case]
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        logprob_entropy(moved.pop("logits"), moved.pop("targets"), **moved)


@pytest.mark.parametrize("target", [5, -1, 2**40])
def test_target_outside_the_vocabulary(device, target):
    logits = make_logits((3, 5), torch.float32, device).requires_grad_()
    targets = torch.tensor([0, target, 4], device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=rf"targets\[1\].* is {target};.*\[0, 5\)"):
            logprob_entropy(logits, targets)
        return
    log_prob, _ = logprob_entropy(logits, targets)
    assert log_prob.isnan().tolist() == [False, True, False]
    log_prob.sum().backward()
    assert logits.grad.isnan().any(-1).tolist() == [False, True, False]


def test_row_temperature_that_is_not_positive(device):
    logits = make_logits((3, 5), torch.float32, device)
    targets = make_targets(logits)
    temperature = torch.tensor([1.0, 0.0, 1.0], device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"temperature\[1\] \(flat index\) is 0.*above 0"):
            logprob_entropy(logits, targets, temperature=temperature)
        return
    log_prob, entropy = logprob_entropy(logits, targets, temperature=temperature)
    assert log_prob.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


def test_a_second_derivative_raises(device):
    logits = make_logits((3, 5), torch.float32, device).requires_grad_()
    log_prob, _ = logprob_entropy(logits, make_targets(logits))
    (grad,) = torch.autograd.grad((log_prob**2).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="logprob_entropy_backward has no derivative"):
        grad.sum().backward()
