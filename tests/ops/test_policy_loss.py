"""policy_loss: parity, gradients, compile, properties, bad input."""

import itertools
import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compiled import compile_counting
from entropy_rl_ext import policy_loss, reference
from entropy_rl_ext.ops.policy_loss import _warn_not_applied
from losses import AGGREGATIONS, DTYPES, SHAPES, assert_within, make_batch, with_batch_numbers

MODES = [
    "vanilla",
    "gpg",
    "clip_cov",
    "kl_cov",
    "gspo",
    "geo_mean",
    "dppo_tv",
    "dppo_kl",
    "sapo",
    "dro",
    "cispo",
]
SEQUENCE_MODES = ("gspo", "geo_mean")
COVARIANCE_MODES = ("clip_cov", "kl_cov")
# Numbers at which every branch of every loss is taken by the batches of make_batch.
NUMBERS = {
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.28,
    "clip_ratio_c": 1.5,
    "clip_cov_ratio": 0.2,
    "clip_cov_lb": -0.5,
    "clip_cov_ub": 1.0,
    "kl_cov_ratio": 0.2,
    "ppo_kl_coef": 0.7,
    "dro_beta": 0.3,
    "seed": 11,
}
# Token losses of make_batch, weights included, are below this.
LARGEST_LOSS = 32.0


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="entropy_mask is not applied")
        yield


def run(function, batch, mode, *, entropy=False, weights=False, **options):
    """(loss, metrics, gradient) of a batch."""
    log_prob = batch["log_prob"].detach().requires_grad_()
    loss, metrics = function(
        log_prob,
        batch["old_log_prob"],
        batch["advantages"],
        batch["response_mask"],
        loss_mode=mode,
        entropy_mask=batch["entropy_mask"] if entropy else None,
        rollout_is_weights=batch["weights"] if weights else None,
        **{**NUMBERS, **options},
    )
    (gradient,) = torch.autograd.grad(loss, log_prob)
    return loss.detach(), metrics, gradient


def widened(batch):
    return {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}


def assert_equal_to_reference(batch, mode, loss_scale, **options):
    loss, metrics, gradient = run(policy_loss, batch, mode, **options)
    expected_loss, expected_metrics, expected_gradient = run(reference.policy_loss, widened(batch), mode, **options)
    dtype = batch["log_prob"].dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == () and gradient.dtype == dtype
    assert_within(loss, expected_loss, loss_scale)
    assert_within(gradient, expected_gradient, gradient_scale(batch, mode, expected_gradient))
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        assert value.dtype == loss.dtype and value.device == loss.device and not value.requires_grad
        assert_within(value, expected_metrics[name], 1.0)


def gradient_scale(batch, mode, gradient):
    """The largest gradient; in geo_mean, what it would be if the advantages that a row sums had one sign."""
    size = gradient.abs()
    if mode == "geo_mean":
        advantages = torch.where(batch["response_mask"], batch["advantages"].double(), 0.0)
        total, sizes = advantages.sum(1).abs(), advantages.abs().sum(1)
        size = torch.where(total > 0, size.amax(1) * sizes / total, 0.0)
    return size.max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_with_reference(device, mode, shape, dtype):
    batch = make_batch(shape, dtype, device)
    assert_equal_to_reference(batch, mode, LARGEST_LOSS)
    assert_equal_to_reference(batch, mode, LARGEST_LOSS, entropy=True, weights=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize", ["selected", "response"])
def test_parity_over_aggregations(device, mode, normalize):
    batch = make_batch((5, 300), torch.float64, device)
    for entropy, weights, aggregation in itertools.product([False, True], [False, True], with_batch_numbers()):
        options = {"entropy": entropy, "weights": weights, "normalize": normalize, **aggregation}
        assert_equal_to_reference(batch, mode, LARGEST_LOSS * batch["log_prob"].numel(), **options)


@pytest.mark.parametrize("mode", COVARIANCE_MODES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_covariance_mask_stands_in_for_the_choice(device, mode, dtype, shape):
    """Its values outside the response are ignored."""
    batch = make_batch(shape, torch.float32, device)
    largest = 1 if dtype.is_floating_point else 2  # of integers, any nonzero value is in
    chosen = torch.rand(shape[::-1], generator=torch.Generator().manual_seed(3)).T.to(device) < 0.4
    for entropy in (False, True):
        options = {"entropy": entropy, "weights": True, "covariance_mask": chosen.to(dtype) * largest}
        assert_equal_to_reference(batch, mode, LARGEST_LOSS, **options)


# ---- Clip ratios of each token ---------------------------------------------------------------------------

CLIPPING_MODES = ["vanilla", "clip_cov", "gspo", "geo_mean", "dppo_tv", "dppo_kl", "cispo"]


# Two values of each clip ratio, as a step with selected and other tokens has them.
TWO_RATIOS = {"clip_ratio_low": (0.1, 0.3), "clip_ratio_high": (0.2, 0.5)}


def scale_of(mode):
    """The ratios of gspo are means over a sequence, which are near 1."""
    return 0.1 if mode == "gspo" else 1.0


def clip_ratios(batch, mode="vanilla"):
    """The clip ratios of each token, NaN outside the response."""
    inside, chosen = batch["response_mask"], batch["entropy_mask"]
    own = {name: torch.where(chosen, high, low) * scale_of(mode) for name, (low, high) in TWO_RATIOS.items()}
    return {name: torch.where(inside, value.to(batch["log_prob"]), math.nan) for name, value in own.items()}


def both_clip_ratios(batch, mode, **options):
    ratios = clip_ratios(batch, mode)
    wide = widened(ratios)
    actual = run(policy_loss, batch, mode, **options, **ratios)
    return actual, run(reference.policy_loss, widened(batch), mode, **options, **wide)


@pytest.mark.parametrize("mode", CLIPPING_MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_with_clip_ratios_of_each_token(device, mode, shape, dtype):
    batch = make_batch(shape, dtype, device)
    for options in ({}, {"entropy": True, "weights": True}):
        (loss, metrics, gradient), (expected_loss, expected_metrics, expected_gradient) = both_clip_ratios(
            batch, mode, **options
        )
        assert_within(loss, expected_loss, LARGEST_LOSS)
        assert_within(gradient, expected_gradient, expected_gradient.abs().max())
        assert metrics.keys() == expected_metrics.keys()
        for name, value in metrics.items():
            assert_within(value, expected_metrics[name], 1.0)


@pytest.mark.parametrize("mode", CLIPPING_MODES)
def test_clip_ratios_of_each_token_matter(device, mode):
    """What the parity tests compare is not what one number gives."""
    batch = make_batch((5, 300), torch.float64, device)
    own = run(policy_loss, batch, mode, **clip_ratios(batch, mode))
    for place in (0, 1):
        numbers = {name: values[place] * scale_of(mode) for name, values in TWO_RATIOS.items()}
        one = run(policy_loss, batch, mode, **numbers)
        assert own[0] != one[0] and not torch.equal(own[2], one[2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["clip_ratio_low", "clip_ratio_high"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5000), (70, 33)], ids=str)
def test_one_clip_ratio_for_all_tokens_is_that_number(device, mode, name, shape):
    """To the bit in float64, where 1 - 0.2 is the same number however it is computed; the other ratio is a number.

    On CUDA the two are kernels of their own, in which the compiler may fuse other products.
    """

    same = partial(torch.testing.assert_close, rtol=0 if device.type == "cpu" else 1e-13, atol=0)
    batch = make_batch(shape, torch.float64, device)
    full = torch.full(shape, NUMBERS[name], dtype=torch.float64, device=device)
    expected = run(policy_loss, batch, mode, entropy=True, weights=True)
    for value in (full, full[:, :1].expand(shape)):
        actual = run(policy_loss, batch, mode, entropy=True, weights=True, **{name: value})
        same(actual, expected)
    one = run(policy_loss, {k: v[0] for k, v in batch.items()}, mode, **{name: full[0]})
    row = run(policy_loss, {k: v[:1] for k, v in batch.items()}, mode)
    same(one, (*row[:2], row[2][0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_ratios_of_any_dtype(device, dtype):
    batch = make_batch((4, 300), torch.float32, device)
    ratios = {name: value.to(dtype) for name, value in clip_ratios(batch).items()}
    loss, _, gradient = run(policy_loss, batch, "vanilla", **ratios)
    expected = run(reference.policy_loss, widened(batch), "vanilla", **widened(ratios))
    assert_within(loss, expected[0], LARGEST_LOSS)
    assert_within(gradient, expected[2], expected[2].abs().max())


@pytest.mark.parametrize("mode", CLIPPING_MODES)
def test_opcheck_with_clip_ratios(device, mode):
    batch = make_batch((3, 9), torch.float32, device)
    names = ("log_prob", "old_log_prob", "advantages", "response_mask")
    tensors = [batch[name] for name in names] + [None] * 5
    seed = torch.tensor(3, device=device)
    tensors[0].requires_grad_()
    ratios = [value.nan_to_num(0.2) for value in clip_ratios(batch).values()]
    for op in (torch.ops.entropy_rl.policy_loss, torch.ops.entropy_rl.policy_loss_forward):
        torch.library.opcheck(op, (*tensors, seed, *ratios), {"loss_mode": mode})


@pytest.mark.parametrize("mode", ["vanilla", "geo_mean"])
def test_compile_with_clip_ratios(device, mode):
    def step(batch, low, high):
        tensors = [batch[name] for name in ("log_prob", "old_log_prob", "advantages", "response_mask")]
        return policy_loss(*tensors, loss_mode=mode, clip_ratio_low=low, clip_ratio_high=high)[0]

    compiled, counter = compile_counting(step, dynamic=True)
    for rows in (4, 7, 12):
        batch = make_batch((rows, 17), torch.float32, device)
        ratios = [value.nan_to_num(0.2) for value in clip_ratios(batch).values()]
        assert torch.equal(compiled(batch, *ratios), step(batch, *ratios))
    assert counter.graphs == 1


def test_clip_ratios_are_constants(device):
    batch = make_batch((3, 9), torch.float32, device)
    ratio = torch.full((3, 9), 0.2, device=device, requires_grad=True)
    tensors = [batch[name] for name in ("log_prob", "old_log_prob", "advantages", "response_mask")]
    tensors[0].requires_grad_()
    policy_loss(*tensors, clip_ratio_low=ratio)[0].backward()
    assert tensors[0].grad is not None and ratio.grad is None


@pytest.mark.parametrize("mode", CLIPPING_MODES)
@pytest.mark.parametrize("name", ["clip_ratio_low", "clip_ratio_high"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_wrong_clip_ratio_of_a_token(device, mode, name, value):
    """An error on the CPU, and NaN on CUDA; outside the response it may be anything."""
    batch = make_batch((3, 9), torch.float32, device)
    batch["response_mask"][:, :2] = torch.tensor([True, False], device=device)
    ratios = torch.full((3, 9), 0.2, device=device)
    ratios[1, 1] = value  # outside
    expected = run(policy_loss, batch, mode, **{name: torch.full_like(ratios, 0.2)})
    actual = run(policy_loss, batch, mode, **{name: ratios})
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[2], expected[2])
    ratios[1, 0] = value
    if device.type == "cuda":
        loss, _, gradient = run(policy_loss, batch, mode, **{name: ratios})
        assert loss.isnan() and gradient[1, 0].isnan() and not gradient[0].isnan().any()
    else:
        with pytest.raises(
            ValueError, match=rf"{name}\[9\] \(flat index\) is .*; it must be a finite number, 0 or above"
        ):
            run(policy_loss, batch, mode, **{name: ratios})


@pytest.mark.parametrize("name", ["clip_ratio_low", "clip_ratio_high"])
def test_clip_ratios_that_do_not_fit(device, name):
    batch = make_batch((3, 9), torch.float32, device)
    for shape in ((), (1,), (3, 1), (9,), (2, 9)):
        with pytest.raises(ValueError, match=rf"{name} has shape .*; it must be \[3, 9\], the shape of log_prob"):
            run(policy_loss, batch, "vanilla", **{name: torch.ones(shape, device=device)})
    with pytest.raises(ValueError, match=f"{name} is int64; it must be float32, float64, bfloat16 or float16"):
        run(policy_loss, batch, "vanilla", **{name: torch.ones(3, 9, dtype=torch.int64, device=device)})
    with pytest.raises(ValueError, match=f"{name} is .*on .*meta.* must be on the same device|{name} is on"):
        run(policy_loss, batch, "vanilla", **{name: torch.ones(3, 9, device="meta")})
    with pytest.raises(TypeError, match=f"{name} is of type list and length 9; it must be a number or a torch.Tensor"):
        run(policy_loss, batch, "vanilla", **{name: [0.2] * 9})
    with pytest.raises(ValueError, match="a clip ratio is given as a number and as a tensor"):
        tensors = [batch[key] for key in ("log_prob", "old_log_prob", "advantages", "response_mask")]
        ratios = {f"token_{name}": torch.ones(3, 9, device=device), name: 0.2}
        torch.ops.entropy_rl.policy_loss(*tensors, **ratios)


# ---- The gradient ----------------------------------------------------------------------------------------

# The other modes detach a factor of the loss; the parity tests compare their gradients with the reference.
DIFFERENTIABLE = [mode for mode in MODES if mode not in ("gspo", "dppo_tv", "dppo_kl", "cispo")]


@pytest.mark.parametrize("mode", DIFFERENTIABLE)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradcheck(device, mode, aggregation):
    batch = make_batch((3, 9), torch.float64, device)

    def loss(log_prob):
        tensors = (batch["old_log_prob"], batch["advantages"], batch["response_mask"])
        options = {"loss_mode": mode, "loss_agg_mode": aggregation, **NUMBERS}
        return policy_loss(
            log_prob, *tensors, entropy_mask=batch["entropy_mask"], rollout_is_weights=batch["weights"], **options
        )[0]

    assert torch.autograd.gradcheck(loss, (batch["log_prob"].requires_grad_(),))


def test_gradient_flows_to_log_prob_alone(device):
    batch = make_batch((3, 9), torch.float32, device)
    tensors = [batch[name].requires_grad_() for name in ("log_prob", "old_log_prob", "advantages")]
    loss, _ = policy_loss(*tensors, batch["response_mask"], rollout_is_weights=batch["weights"].requires_grad_())
    loss.backward()
    assert tensors[0].grad is not None
    assert tensors[1].grad is None and tensors[2].grad is None and batch["weights"].grad is None


def test_gradient_scales_with_the_incoming_one(device):
    batch = make_batch((3, 9), torch.float32, device)
    _, _, once = run(policy_loss, batch, "vanilla")
    log_prob = batch["log_prob"].requires_grad_()
    loss, _ = policy_loss(log_prob, batch["old_log_prob"], batch["advantages"], batch["response_mask"], **NUMBERS)
    (twice,) = torch.autograd.grad(loss * 2, log_prob)
    assert torch.equal(twice, 2 * once)


def test_a_second_derivative_raises(device):
    batch = make_batch((3, 9), torch.float64, device)
    log_prob = batch["log_prob"].requires_grad_()
    loss, _ = policy_loss(log_prob, batch["old_log_prob"], batch["advantages"], batch["response_mask"])
    (gradient,) = torch.autograd.grad(loss, log_prob, create_graph=True)
    with pytest.raises(RuntimeError, match="policy_loss_backward has no derivative"):
        gradient.sum().backward()


# ---- Registration and compilation ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(device, mode):
    batch = make_batch((3, 9), torch.float32, device)
    tensors = (
        batch["log_prob"].requires_grad_(),
        batch["old_log_prob"],
        batch["advantages"],
        batch["response_mask"],
        batch["entropy_mask"],
        batch["entropy_mask"] if mode in COVARIANCE_MODES else None,
        batch["weights"],
        torch.tensor(20.0, dtype=torch.float64, device=device),
        None,
        torch.tensor(3, device=device),
    )
    options = {"loss_mode": mode, "dro_beta": 0.3}
    torch.library.opcheck(torch.ops.entropy_rl.policy_loss, tensors, options)
    torch.library.opcheck(torch.ops.entropy_rl.policy_loss_forward, tensors, options)


def test_opcheck_of_the_backward(device):
    batch = make_batch((3, 9), torch.bfloat16, device)
    tensors = [batch[name] for name in ("log_prob", "old_log_prob", "advantages", "response_mask")]
    loss, _, gradient, row_scale = torch.ops.entropy_rl.policy_loss_forward(*tensors)
    arguments = (torch.ones_like(loss), gradient, row_scale, tensors[0])
    torch.library.opcheck(torch.ops.entropy_rl.policy_loss_backward, arguments)


def test_backward_op_refuses_what_the_forward_did_not_make(device):
    """The backward op is public, so shapes that do not fit must raise instead of reading outside a tensor."""
    one, rows, tokens = (torch.ones(shape, device=device) for shape in ((), (3,), (3, 9)))
    backward = torch.ops.entropy_rl.policy_loss_backward
    with pytest.raises(ValueError, match=r"gradient has shape \[3\]"):
        backward(one, rows, rows, tokens)
    with pytest.raises(ValueError, match=r"row_scale has shape \[2\]"):
        backward(one, tokens, rows[:2], tokens)
    with pytest.raises(ValueError, match=r"grad_loss has shape \[3\]"):
        backward(rows, tokens, rows, tokens)


def test_the_op_alone(device):
    batch = make_batch((3, 9), torch.float32, device)
    tensors = [batch[name] for name in ("log_prob", "old_log_prob", "advantages", "response_mask")]
    loss, metrics = torch.ops.entropy_rl.policy_loss(*tensors)
    expected, named = policy_loss(*tensors)
    assert torch.equal(loss, expected) and torch.equal(metrics[:3], torch.stack(list(named.values())))


@pytest.mark.parametrize("mode", ["vanilla", "clip_cov", "gspo"])
def test_compile_fullgraph_and_no_recompile(device, mode):
    def step(batch, tokens, seed):
        loss, metrics = policy_loss(
            batch["log_prob"],
            batch["old_log_prob"],
            batch["advantages"],
            batch["response_mask"],
            loss_mode=mode,
            entropy_mask=batch["entropy_mask"],
            batch_num_tokens=tokens,
            **{**NUMBERS, "seed": seed},
        )
        return loss, metrics["actor/ppo_kl"]

    compiled, counter = compile_counting(step, dynamic=True)
    for rows, tokens, seed in [(4, 30, 2), (7, 55, 3), (12, 71, 4)]:
        batch = make_batch((rows, 17), torch.float32, device)
        assert torch.equal(torch.stack(compiled(batch, tokens, seed)), torch.stack(step(batch, tokens, seed)))
    assert counter.graphs == 1


def test_compile_through_aot_autograd(device):
    batch = make_batch((4, 17), torch.float32, device)
    _, _, expected = run(policy_loss, batch, "vanilla", entropy=True)
    torch._dynamo.reset()
    compiled = torch.compile(policy_loss, backend="aot_eager", fullgraph=True)
    _, _, gradient = run(compiled, batch, "vanilla", entropy=True)
    assert torch.equal(gradient, expected)


# ---- Masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_tokens_outside_the_response_have_no_influence(device, mode, garbage):
    batch = make_batch((5, 300), torch.float32, device)
    expected_loss, expected_metrics, expected_gradient = run(policy_loss, batch, mode, weights=True)
    for name in ("log_prob", "old_log_prob", "advantages", "weights"):
        batch[name] = torch.where(batch["response_mask"], batch[name], garbage)
    loss, metrics, gradient = run(policy_loss, batch, mode, weights=True)
    assert torch.equal(loss, expected_loss) and torch.equal(gradient, expected_gradient)
    assert metrics == expected_metrics
    assert (gradient[~batch["response_mask"]] == 0).all()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in SEQUENCE_MODES])
def test_unselected_tokens_have_no_gradient_and_count_in_the_metrics(device, mode):
    batch = make_batch((5, 300), torch.float32, device)
    _, narrow, gradient = run(policy_loss, batch, mode, entropy=True)
    _, full, full_gradient = run(policy_loss, batch, mode)
    assert (gradient[~batch["entropy_mask"]] == 0).all()
    assert all(torch.equal(narrow[name], value) for name, value in full.items())
    selected = batch["entropy_mask"] & batch["response_mask"]
    ratio = selected.sum() / batch["response_mask"].sum()
    torch.testing.assert_close(narrow["actor/entropy_token_ratio"], ratio)
    # Selection changes only the divisor of a token's gradient.
    factor = 1 / ratio
    if mode == "sapo":  # it divides by the tokens of each row, and by the rows
        rows = selected.any(1).sum() / batch["response_mask"].any(1).sum()
        factor = batch["response_mask"].sum(1, keepdim=True) / selected.sum(1, keepdim=True).clamp(min=1) / rows
    expected = torch.where(selected, full_gradient * factor, 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_selected_and_response_differ_by_the_ratio(device):
    batch = make_batch((5, 300), torch.float64, device)
    selected, metrics, _ = run(policy_loss, batch, "vanilla", entropy=True)
    response, _, _ = run(policy_loss, batch, "vanilla", entropy=True, normalize="response")
    torch.testing.assert_close(selected * metrics["actor/entropy_token_ratio"], response)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("aggregation", with_batch_numbers(), ids=str)
@pytest.mark.parametrize("normalize", ["selected", "response"])
def test_nothing_selected_gives_zero(device, mode, aggregation, normalize):
    batch = make_batch((4, 20), torch.float32, device)
    for masked in ("response_mask", "entropy_mask"):
        if masked == "entropy_mask" and mode in SEQUENCE_MODES:
            continue
        empty = {**batch, masked: torch.zeros_like(batch[masked])}
        loss, metrics, gradient = run(policy_loss, empty, mode, entropy=True, normalize=normalize, **aggregation)
        assert loss.item() == 0 and (gradient == 0).all()
        assert metrics["actor/entropy_token_ratio"].item() == 0
        if masked == "response_mask":
            assert all(value.item() == 0 for value in metrics.values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_no_tokens(device, mode, shape):
    batch = make_batch(shape, torch.float32, device)
    for aggregation in AGGREGATIONS:
        loss, metrics, gradient = run(policy_loss, batch, mode, entropy=True, loss_agg_mode=aggregation)
        assert loss.item() == 0 and gradient.shape == shape
        assert all(value.item() == 0 for value in metrics.values())


@pytest.mark.parametrize("mode", MODES)
def test_nan_in_a_selected_token_is_seen(device, mode):
    batch = make_batch((4, 20), torch.float32, device)
    batch["response_mask"][0, 3] = True
    batch["advantages"][0, 3] = math.nan
    assert run(policy_loss, batch, mode)[0].isnan()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, *DTYPES], ids=str)
def test_masks_of_any_dtype(device, dtype):
    batch = make_batch((4, 77), torch.float32, device)
    expected = run(policy_loss, batch, "vanilla", entropy=True)
    for name in ("response_mask", "entropy_mask"):
        # Of integers, any nonzero value is in.
        batch[name] = batch[name].to(dtype) * (1 if dtype.is_floating_point else 2)
    actual = run(policy_loss, batch, "vanilla", entropy=True)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[2], expected[2])


@pytest.mark.parametrize("mode", SEQUENCE_MODES)
def test_sequence_losses_accept_the_mask_and_say_once_that_they_do_not_apply_it(device, mode):
    batch = make_batch((4, 20), torch.float32, device)
    _warn_not_applied.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masked = run(policy_loss, batch, mode, entropy=True)
        run(policy_loss, batch, mode, entropy=True)
    assert [str(w.message) for w in caught] == [
        f"entropy_mask is not applied: loss_mode '{mode}' has one ratio a sequence"
    ]
    whole = run(policy_loss, batch, mode)
    assert torch.equal(masked[0], whole[0]) and torch.equal(masked[2], whole[2])
    assert masked[1].pop("actor/entropy_token_ratio").item() == 1
    assert masked[1] == whole[1]


# ---- Aggregation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["vanilla", "gspo", "sapo"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_the_batch(device, mode, aggregation):
    batch = make_batch((8, 50), torch.float64, device)
    whole, _, gradient = run(policy_loss, batch, mode, entropy=True, loss_agg_mode=aggregation)
    selected = batch["response_mask"] & (batch["entropy_mask"] | (mode in SEQUENCE_MODES))
    divisors = {
        "batch_num_tokens": selected.sum(),
        "global_batch_size": selected.any(1).sum(),
        "loss_agg_mode": aggregation,
    }
    parts = [
        run(policy_loss, {k: v[rows] for k, v in batch.items()}, mode, entropy=True, **divisors)
        for rows in (slice(0, 3), slice(3, 4), slice(4, 8))
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), whole)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), gradient)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_tokens_are_one_row(device, mode, aggregation):
    batch = make_batch((1, 5000), torch.float32, device)
    packed = {name: tensor[0] for name, tensor in batch.items()}
    options = {"entropy": True, "weights": True, "loss_agg_mode": aggregation}
    loss, metrics, gradient = run(policy_loss, batch, mode, **options)
    packed_loss, packed_metrics, packed_gradient = run(policy_loss, packed, mode, **options)
    assert torch.equal(packed_loss, loss) and torch.equal(packed_gradient, gradient[0])
    assert packed_metrics == metrics


def test_given_divisors_may_be_numbers_or_tensors(device):
    batch = make_batch((4, 50), torch.float32, device)
    for name, aggregation in (("batch_num_tokens", "token-mean"), ("global_batch_size", "seq-mean-token-mean")):
        results = [
            run(policy_loss, batch, "vanilla", loss_agg_mode=aggregation, **{name: number})[0]
            for number in (30, 30.0, torch.tensor(30, device=device), torch.tensor(30.0, device=device))
        ]
        assert all(torch.equal(result, results[0]) for result in results)


# ---- Choice by covariance --------------------------------------------------------------------------------


def test_clip_cov_draws_alike_for_one_seed_and_differently_for_others(device):
    batch = make_batch((5, 300), torch.float32, device)
    first, again, other = (run(policy_loss, batch, "clip_cov", seed=seed)[2] for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    as_tensor = run(policy_loss, batch, "clip_cov", seed=torch.tensor(5, device=device))[2]
    assert torch.equal(as_tensor, first)


def test_clip_cov_draws_every_eligible_token_equally_often(device):
    batch = make_batch((4, 64), torch.float32, device)
    batch["old_log_prob"] = batch["log_prob"].clone()  # nothing is clipped by its ratio
    batch["response_mask"][:] = True
    options = {"clip_cov_lb": -math.inf, "clip_cov_ub": math.inf, "clip_cov_ratio": 0.25}
    draws = 400
    dropped = torch.zeros(4, 64, device=device)
    for seed in range(draws):
        gradient = run(policy_loss, batch, "clip_cov", seed=seed, **options)[2]
        assert (gradient == 0).sum() == 64
        dropped += gradient == 0
    # Counts are binomial(400, 1/4), standard deviation 8.7; none of 256 deviates by five of them.
    assert ((dropped - draws / 4).abs() < 5 * math.sqrt(draws * 3 / 16)).all()


def test_clip_cov_drops_all_eligible_tokens_where_the_ratio_allows_it(device):
    batch = make_batch((5, 300), torch.float64, device)
    _, _, gradient = run(policy_loss, batch, "clip_cov", clip_cov_ratio=1.0)
    mask = batch["response_mask"]
    advantage, log_prob = (torch.where(mask, batch[name], 0.0) for name in ("advantages", "log_prob"))
    covariance = (advantage - advantage.sum() / mask.sum()) * (log_prob - log_prob.sum() / mask.sum())
    eligible = mask & (covariance > NUMBERS["clip_cov_lb"]) & (covariance < NUMBERS["clip_cov_ub"])
    assert (gradient[eligible] == 0).all() and (gradient[mask & ~eligible] != 0).any()


def test_kl_cov_takes_the_first_of_equal_covariances(device):
    ones = torch.ones(2, 4, device=device)
    log_prob = -ones.clone().requires_grad_()
    loss, _ = policy_loss(log_prob, -2 * ones, ones, ones, loss_mode="kl_cov", kl_cov_ratio=0.375, ppo_kl_coef=1.0)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    pushed = gradient != gradient[1, 3]
    assert pushed.flatten().tolist() == [True] * 3 + [False] * 5


# ---- Properties ------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**31)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 40))


@settings(deadline=None, max_examples=60)
@example((1, 17), 1, "geo_mean", "token-mean", False)  # the advantages nearly cancel
@given(shapes, seeds, st.sampled_from(MODES), st.sampled_from(AGGREGATIONS), st.booleans())
def test_equals_reference_for_any_masks(device, shape, seed, mode, aggregation, weights):
    batch = make_batch(shape, torch.float64, device, seed)
    options = {"entropy": True, "weights": weights, "loss_agg_mode": aggregation}
    assert_equal_to_reference(batch, mode, LARGEST_LOSS * shape[0] * shape[1], **options)


@settings(deadline=None, max_examples=60)
@given(shapes, seeds, st.sampled_from([mode for mode in MODES if mode not in COVARIANCE_MODES]))
def test_order_of_rows_and_tokens_does_not_matter(device, shape, seed, mode):
    """Except for clip_cov, whose draw depends on the position, and kl_cov, whose ties do."""
    batch = make_batch(shape, torch.float64, device, seed)
    rows = torch.randperm(shape[0], device=device).unsqueeze(1)
    columns = torch.randperm(shape[1], device=device)
    shuffled = {name: t[rows, columns] for name, t in batch.items()}
    loss, metrics, gradient = run(policy_loss, batch, mode, entropy=True)
    other_loss, other_metrics, other_gradient = run(policy_loss, shuffled, mode, entropy=True)
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other_gradient, gradient[rows, columns])
    torch.testing.assert_close(other_metrics, metrics)


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_for_any_number_of_threads(mode):
    batch = make_batch((9, 5000), torch.float32, "cpu")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(policy_loss, batch, mode, entropy=True, weights=True))
    finally:
        torch.set_num_threads(before)
    for loss, metrics, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][2])
        assert metrics == results[0][1]


@pytest.mark.parametrize("mode", MODES)
def test_strided_and_broadcast_tensors_equal_contiguous_ones(device, mode):
    batch = make_batch((6, 40), torch.float32, device)
    batch["advantages"] = batch["advantages"][:, :1].expand(6, 40)
    contiguous = run(policy_loss, {k: v.contiguous() for k, v in batch.items()}, mode, entropy=True, weights=True)
    strided = {k: v if k == "advantages" else v.T.contiguous().T for k, v in batch.items()}
    actual = run(policy_loss, strided, mode, entropy=True, weights=True)
    assert torch.equal(actual[0], contiguous[0]) and torch.equal(actual[2], contiguous[2])


def test_mixed_dtypes(device):
    batch = make_batch((4, 30), torch.float32, device)
    for name, dtype in (("old_log_prob", torch.bfloat16), ("advantages", torch.float64), ("weights", torch.half)):
        batch[name] = batch[name].to(dtype)
    assert_equal_to_reference(batch, "vanilla", LARGEST_LOSS, weights=True)


@pytest.mark.parametrize("mode", MODES)
def test_extreme_log_probs_stay_finite_where_verl_clamps(device, mode):
    batch = make_batch((4, 30), torch.float32, device)
    batch["log_prob"][0, :5] = -200.0
    batch["old_log_prob"][0, 5:10] = -200.0
    loss, _, gradient = run(policy_loss, batch, mode)
    unclamped = mode in COVARIANCE_MODES  # as in verl, where they overflow too
    assert unclamped or (loss.isfinite() and gradient.isfinite().all())


# ---- Bad input -------------------------------------------------------------------------------------------

BAD = {
    "mode": ({"loss_mode": "ppo"}, "loss_mode is 'ppo'; it must be one of 'vanilla', 'gpg', .*'cispo'"),
    "aggregation": ({"loss_agg_mode": "mean"}, "loss_agg_mode is 'mean'; it must be one of 'token-mean', .*"),
    "normalize": ({"normalize": "all"}, "normalize is 'all'; it must be one of 'selected', 'response'"),
    "clip_ratio": ({"clip_ratio": -0.1}, "clip_ratio is -0.1; it must be a finite number, 0 or above"),
    "clip_ratio_low": ({"clip_ratio_low": math.nan}, "clip_ratio_low is nan"),
    "clip_ratio_high": ({"clip_ratio_high": -1.0}, "clip_ratio_high is -1"),
    "clip_ratio_c": ({"clip_ratio_c": 1.0}, "clip_ratio_c is 1; it must be a finite number above 1"),
    "clip_cov_ratio": ({"loss_mode": "clip_cov", "clip_cov_ratio": 0.0}, "clip_cov_ratio is 0; .* above 0"),
    "clip_cov bounds": (
        {"loss_mode": "clip_cov", "clip_cov_lb": 5.0, "clip_cov_ub": 1.0},
        "clip_cov_lb is 5; it must be below clip_cov_ub, 1",
    ),
    "kl_cov_ratio": ({"loss_mode": "kl_cov", "kl_cov_ratio": 1.5}, r"kl_cov_ratio is 1.5; .* \(0, 1\]"),
    "covariance_mask": (
        {"covariance_mask": torch.ones(3, 9)},
        "covariance_mask is given and loss_mode is 'vanilla'; it must be clip_cov or kl_cov",
    ),
    "covariance_mask shape": (
        {"loss_mode": "kl_cov", "covariance_mask": torch.ones(2, 4)},
        r"covariance_mask has shape \[2, 4\]; it must be \[3, 9\]",
    ),
    "ppo_kl_coef": ({"loss_mode": "kl_cov", "ppo_kl_coef": math.inf}, "ppo_kl_coef is inf"),
    "tau_pos": ({"loss_mode": "sapo", "tau_pos": 0.0}, "tau_pos is 0"),
    "tau_neg": ({"loss_mode": "sapo", "tau_neg": -1.0}, "tau_neg is -1"),
    "dro_beta missing": ({"loss_mode": "dro"}, "dro_beta is None; loss_mode 'dro' needs it"),
    "dro_beta": ({"loss_mode": "dro", "dro_beta": 0.0}, "dro_beta is 0"),
    "dp_size": ({"dp_size": 0}, "dp_size is 0; it must be 1 or above"),
    "no batch_num_tokens": ({"dp_size": 2}, "batch_num_tokens is None and dp_size is 2"),
    "no global_batch_size": (
        {"dp_size": 2, "loss_agg_mode": "seq-mean-token-sum"},
        "global_batch_size is None and dp_size is 2",
    ),
    "batch_num_tokens": ({"batch_num_tokens": -3}, "batch_num_tokens is -3; it must be 0 or above"),
    "divisor shape": ({"batch_num_tokens": torch.ones(2)}, r"batch_num_tokens has shape \[2\]; .* one number"),
    "loss_scale_factor": ({"loss_scale_factor": 0.0}, "loss_scale_factor is 0"),
    "seed": ({"loss_mode": "clip_cov", "seed": torch.tensor(0.5)}, "seed is a float32 tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(device, case):
    batch = make_batch((3, 9), torch.float32, device)
    options, message = BAD[case]
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    tensors = [batch[name] for name in ("log_prob", "old_log_prob", "advantages", "response_mask")]
    with pytest.raises(ValueError, match=message):
        policy_loss(*tensors, **options)


@pytest.mark.parametrize("name", ["old_log_prob", "advantages", "response_mask", "entropy_mask", "weights"])
@pytest.mark.parametrize("shape", [(2, 9), (3, 1), (9,), (3, 9, 1)], ids=str)
def test_shapes_that_do_not_match(device, name, shape):
    batch = make_batch((3, 9), torch.float32, device)
    batch[name] = torch.ones(shape, device=device)
    argument = "rollout_is_weights" if name == "weights" else name
    with pytest.raises(ValueError, match=rf"{argument} has shape .*; it must be \[3, 9\], the shape of log_prob"):
        run(policy_loss, batch, "vanilla", entropy=True, weights=True)


@pytest.mark.parametrize("name", ["log_prob", "old_log_prob", "advantages", "weights"])
def test_wrong_dtype(device, name):
    batch = make_batch((3, 9), torch.float32, device)
    batch[name] = batch[name].to(torch.int64)
    tensors = [batch[n] for n in ("log_prob", "old_log_prob", "advantages", "response_mask")]
    with pytest.raises(ValueError, match="is int64; it must be float32, float64, bfloat16 or float16"):
        policy_loss(*tensors, rollout_is_weights=batch["weights"])


def test_wrong_number_of_dimensions(device):
    for shape in ((), (1, 3, 9)):
        tokens = torch.zeros(shape, device=device)
        with pytest.raises(
            ValueError, match=r"log_prob has shape .*; it must be \[rows, tokens\], or \[tokens\] for one row"
        ):
            policy_loss(tokens, tokens, tokens, tokens)


def test_wrong_device(device):
    here = torch.zeros(3, 9, device=device)
    with pytest.raises(ValueError, match="must be on the same device"):
        policy_loss(here, here, here, torch.ones(3, 9, device="meta"))


# ---- The backward, which on the CPU gives or scales the gradient that the forward made ----------------------


def _backward(batch, factor, *, twice):
    log_prob = batch["log_prob"].detach().requires_grad_()
    names = ("old_log_prob", "advantages", "response_mask")
    loss = policy_loss(log_prob, *(batch[name] for name in names), loss_agg_mode="seq-mean-token-mean")[0] * factor
    gradients = [torch.autograd.grad(loss, log_prob, retain_graph=True)[0] for _ in range(2 if twice else 0)]
    return [*gradients, torch.autograd.grad(loss, log_prob)[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 9), (9, 8192), (1 << 16,)], ids=str)
@pytest.mark.parametrize("factor", [1, 0.5])
def test_gradients_are_the_same_however_often_they_are_computed(device, dtype, shape, factor):
    """The first two keep the graph, so that they may not write to what the last one reads."""
    batch = {name: value.view(shape) for name, value in make_batch((1, math.prod(shape)), dtype, device).items()}
    first, second, last = _backward(batch, factor, twice=True)
    (only,) = _backward(batch, factor, twice=False)
    assert first.abs().max() > 0
    for other in (second, last, only):
        assert torch.equal(first, other)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_factor_that_is_not_finite_leaves_masked_tokens_at_zero(device, factor):
    batch = make_batch((9, 300), torch.float32, device)
    (gradient,) = _backward(batch, factor, twice=False)
    assert (gradient[~batch["response_mask"]] == 0).all()
    assert not gradient[batch["response_mask"]].isfinite().all()


@pytest.mark.parametrize("factor", [1, 0.5])
def test_the_backward_leaves_the_gradient_that_the_op_returned(device, factor):
    batch = make_batch((3, 9), torch.float32, device)
    log_prob = batch["log_prob"].detach().requires_grad_()
    names = ("old_log_prob", "advantages", "response_mask")
    loss, _, gradient, _ = torch.ops.entropy_rl.policy_loss_forward(log_prob, *(batch[name] for name in names))
    before = gradient.clone()
    (loss * factor).backward()
    log_prob.grad.zero_()
    assert before.any() and torch.equal(gradient, before)


def test_a_batch_of_incoming_gradients(device):
    batch = make_batch((3, 9), torch.float32, device)
    log_prob = batch["log_prob"].detach().requires_grad_()
    names = ("old_log_prob", "advantages", "response_mask")
    loss = policy_loss(log_prob, *(batch[name] for name in names))[0]
    factors = torch.tensor([1.0, 0.5], device=device)
    one, half = torch.autograd.grad(loss, log_prob, factors, is_grads_batched=True)[0]
    assert one.any() and torch.equal(half, one * 0.5)
