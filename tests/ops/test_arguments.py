"""What all ops do alike with arguments that do not fit: types, temperatures, targets, and garbage in the inner ops."""

import math
import re
from array import array

import numpy as np
import pytest
import torch

import entropy_rl_ext as ext

OPS = torch.ops.entropy_rl


def over_logits(device):
    """name -> a call of (targets, mask, temperature) over the same [2, 3, 5] logits: (log_prob, entropy)."""
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.eye(5, device=device)
    return {
        "logprob_entropy": lambda targets, **rest: ext.logprob_entropy(logits, targets, **rest),
        "linear_logprob_entropy": lambda targets, **rest: ext.linear_logprob_entropy(logits, weight, targets, **rest),
    }


NAMES = ["logprob_entropy", "linear_logprob_entropy"]

# ---- Types


def arguments_of_every_op():
    x, ids, mask, weight = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.ones(2), torch.zeros(4, 3)
    batch = {"log_prob": x, "old_log_prob": x, "advantages": x, "response_mask": x}
    selection = {"entropy": x, "response_mask": x}
    return {
        "token_entropy": {"logits": x, "mask": mask},
        "logprob_entropy": {"logits": x, "targets": ids, "mask": mask},
        "linear_logprob_entropy": {"hidden": x, "weight": weight, "targets": ids, "bias": weight[:, 0], "mask": mask},
        "global_top_mask": selection | {"group_ids": None},
        "get_global_entropy_top_mask": selection,
        "covariance_mask": batch,
        "policy_loss": batch | {"entropy_mask": x, "covariance_mask": None, "rollout_is_weights": x},
        "kl_loss": {"log_prob": x, "ref_log_prob": x, "response_mask": x, "weights": x},
        "aggregate": {"values": x, "mask": x},
    }


TENSORS = [(op, name) for op, arguments in arguments_of_every_op().items() for name in arguments]


@pytest.mark.parametrize(("op", "name"), TENSORS)
@pytest.mark.parametrize(
    ("value", "of"), [([0.0] * 10**5, "list"), (array("d", [0.0] * 10**5), "array.array")], ids=["list", "array"]
)
def test_a_list_or_an_array_in_place_of_a_tensor_is_named(op, name, value, of):
    """PyTorch's own message holds all of the data."""
    options = {"loss_mode": "kl_cov"} if op == "covariance_mask" else {}
    with pytest.raises(TypeError) as error:
        getattr(ext, op)(**arguments_of_every_op()[op] | {name: value}, **options)
    assert str(error.value) == f"{name} is of type {of} and length 100000; it must be a torch.Tensor"


@pytest.mark.parametrize("op", arguments_of_every_op())
def test_none_in_place_of_a_tensor_is_named(op):
    name = next(iter(arguments_of_every_op()[op]))
    options = {"loss_mode": "kl_cov"} if op == "covariance_mask" else {}
    with pytest.raises(TypeError, match=f"^{name} is of type NoneType; it must be a torch.Tensor$"):
        getattr(ext, op)(**arguments_of_every_op()[op] | {name: None}, **options)


@pytest.mark.parametrize("name", ["temperature", "batch_num_tokens", "global_batch_size", "seed"])
def test_a_list_in_place_of_a_number_is_named(name):
    arguments = arguments_of_every_op()
    with pytest.raises(TypeError) as error:
        if name == "temperature":
            ext.token_entropy(**arguments["token_entropy"], temperature=[1.0] * 10**5)
        else:
            options = {"loss_mode": "clip_cov", name: [1.0] * 10**5}
            ext.policy_loss(**arguments["policy_loss"], **options)
    assert str(error.value) == f"{name} is of type list and length 100000; it must be a number or a torch.Tensor"


NUMBER, INTEGER, TEXT, FLAG = "a number", "an integer", "a text", "True or False"
AGGREGATION = {"loss_agg_mode": TEXT, "dp_size": INTEGER, "loss_scale_factor": f"{NUMBER} or None"}
COVARIANCE = {name: NUMBER for name in ("clip_ratio", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio")}
LOSS = {name: NUMBER for name in ("clip_ratio_c", "ppo_kl_coef", "tau_pos", "tau_neg")}
OPTIONS = {
    "logprob_entropy": {"entropy_grad": FLAG},
    "linear_logprob_entropy": {"entropy_grad": FLAG, "token_statistics": FLAG, "logit_scale": NUMBER}
    | {"softcap": f"{NUMBER} or None", "vocab_start": INTEGER}
    | {name: f"{INTEGER} or None" for name in ("chunk_rows", "max_grad_rows", "max_mask_rows", "vocab_size")},
    "global_top_mask": {"top_ratio": NUMBER, "rule": TEXT, "scope": TEXT, "return_threshold": FLAG},
    "get_global_entropy_top_mask": {"top_ratio": NUMBER},
    "covariance_mask": COVARIANCE | {"loss_mode": TEXT, "seed": INTEGER},
    "policy_loss": COVARIANCE
    | LOSS
    | AGGREGATION
    | {"loss_mode": TEXT, "normalize": TEXT, "dro_beta": f"{NUMBER} or None"},
    "kl_loss": AGGREGATION | {"kl_loss_type": TEXT},
    "aggregate": AGGREGATION,
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, options in OPTIONS.items() for name in options])
@pytest.mark.parametrize(
    ("value", "what"),
    [
        ([0.5] * 10**5, "list and length 100000"),
        (np.full((300, 400), 0.5), "numpy.ndarray and shape [300, 400]"),
        (torch.full((300, 400), 0.5), "torch.Tensor and shape [300, 400]"),
        ({}, "dict and length 0"),
    ],
    ids=["list", "array", "tensor", "dict"],
)
def test_another_type_of_an_option_is_named(op, name, value, what):
    """PyTorch's own message has several lines, and holds all data of a list."""
    options = {"loss_mode": "kl_cov"} if op == "covariance_mask" else {}
    with pytest.raises(TypeError) as error:
        getattr(ext, op)(**arguments_of_every_op()[op] | options | {name: value})
    assert str(error.value) == f"{name} is of type {what}; it must be {OPTIONS[op][name]}"


@pytest.mark.parametrize("value", [np.float32(0.25), np.float64(0.25), np.float16(0.25)], ids=["32", "64", "16"])
def test_numbers_of_numpy_are_numbers(value):
    entropy, mask = torch.rand(4, 5), torch.ones(4, 5)
    assert torch.equal(ext.global_top_mask(entropy, mask, value), ext.global_top_mask(entropy, mask, 0.25))
    actual, expected = (ext.policy_loss(entropy, -entropy, mask, mask, clip_ratio=clip)[0] for clip in (value, 0.25))
    assert torch.equal(actual, expected)


# ---- Temperatures

FIT = [2.0**-126, 1e-30, 1e30, 2.0**126]
DO_NOT_FIT = [1e-39, 1e300, 1e39, 0.0, -1.0, math.nan, math.inf]


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("value", DO_NOT_FIT, ids=str)
def test_a_temperature_that_float32_cannot_invert_is_refused(device, op, value):
    targets = torch.zeros(2, 3, dtype=torch.int64, device=device)
    call = over_logits(device)[op]
    message = re.escape(f"temperature is {value:g}; it must be a finite number above 0 that float32 can invert")
    with pytest.raises(ValueError, match=message):
        call(targets, temperature=value)
    for dtype in (torch.float64, torch.float32):  # beyond its range, a value is inf in float32
        rows = torch.ones(2, 3, dtype=torch.float64, device=device)
        rows[1, 1] = value
        rows = rows.to(dtype)
        if device.type == "cpu":
            with pytest.raises(ValueError, match=r"temperature\[4\] \(flat index\) is .*; it must be a finite number"):
                call(targets, temperature=rows)
        else:
            for result in call(targets, temperature=rows):
                assert result.isnan().flatten().tolist() == [False, False, False, False, True, False]


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("value", FIT, ids=str)
def test_extreme_temperatures_give_the_limits(device, op, value):
    """The most probable entry alone, or all alike."""
    targets = torch.zeros(2, 3, dtype=torch.int64, device=device)
    for temperature in (value, torch.full((2, 3), value, device=device)):
        log_prob, entropy = over_logits(device)[op](targets, temperature=temperature)
        limit = 0.0 if value < 1 else math.log(5)
        torch.testing.assert_close(entropy, torch.full_like(entropy, limit), atol=1e-5, rtol=0)
        assert not log_prob.isnan().any()


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("value", [0.0, math.nan, 1e-39])
def test_the_temperature_of_a_masked_row_may_be_anything(device, op, value):
    targets = torch.zeros(2, 3, dtype=torch.int64, device=device)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]], device=device)
    temperature = torch.where(mask == 0, value, 0.7)
    call = over_logits(device)[op]
    for actual, expected in zip(
        call(targets, mask=mask, temperature=temperature), call(targets, mask=mask, temperature=0.7), strict=True
    ):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
        assert (actual[mask == 0] == 0).all()


# ---- Integers


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8], ids=str)
def test_targets_of_any_integer_dtype(device, op, dtype):
    call = over_logits(device)[op]
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]], device=device)
    for actual, expected in zip(call(targets.to(dtype)), call(targets), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("op", NAMES)
def test_targets_of_no_integer_dtype(device, op, dtype):
    with pytest.raises(ValueError, match=r"targets is .*; it must be an integer dtype"):
        over_logits(device)[op](torch.zeros(2, 3, dtype=dtype, device=device))


# ---- Garbage in the inner ops, which are public: an error, or numbers; never an overflow or a crash

EXTREMES = [-(2**63), -1, 0, 4, 2**31, 2**63 - 1]


@pytest.mark.parametrize("target", EXTREMES)
@pytest.mark.parametrize("vocab_start", EXTREMES)
@pytest.mark.parametrize("token_statistics", [False, True])
def test_any_target_and_start_of_a_tile(device, target, vocab_start, token_statistics):
    tile = torch.randn(1, 3, generator=torch.Generator().manual_seed(0)).to(device)
    targets = torch.tensor([target], device=device)
    state = torch.zeros(1, 6, dtype=torch.float64, device=device)
    state[:, [0, 4, 5]] = -torch.inf
    number = torch.tensor(1.0, dtype=torch.float64)
    options = (None, vocab_start, 1.0, 0.0)
    forward, backward = OPS.linear_logprob_entropy_tile_forward, OPS.linear_logprob_entropy_tile_backward
    row = torch.ones(1, device=device)
    gradient = tile.clone()
    if vocab_start < 0:
        with pytest.raises(ValueError, match=f"vocab_start is {vocab_start}; it must be 0 or above"):
            forward(tile, targets, number, *options, token_statistics, state)
        with pytest.raises(ValueError, match=f"vocab_start is {vocab_start}; it must be 0 or above"):
            backward(row, row, row, row.expand(1, 2), targets, number, *options, gradient, None)
        return
    forward(tile, targets, number, *options, token_statistics, state)
    column = target - vocab_start
    assert state[0, 5] == (tile[0, column] if 0 <= column < 3 else -torch.inf)
    if token_statistics:
        before = tile[0, : min(max(column, 0), 3)]
        assert state[0, 4] == (before.max() if len(before) else -torch.inf)
    backward(row, row, row, row.expand(1, 2), targets, number, *options, gradient, None)
    assert gradient.isfinite().all()


def good_backward(device):
    rows, hidden, weight = (
        torch.ones(2, device=device),
        torch.ones(2, 3, device=device),
        torch.ones(4, 3, device=device),
    )
    return {
        "grad_log_prob": rows,
        "grad_entropy": rows,
        "hidden": hidden,
        "weight": weight,
        "targets": torch.zeros(2, dtype=torch.int64, device=device),
        "bias": None,
        "mask": None,
        "temperature": torch.tensor(1.0, dtype=torch.float64),
        "entropy": rows,
        "max_log_sum": torch.ones(2, 2, device=device),
        "needs": [True, True, True],
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grad_log_prob", torch.ones(3), r"grad_log_prob is float32 of shape \[3\].*\[2\]"),
        ("grad_entropy", torch.ones(2, dtype=torch.int64), "grad_entropy is int64 of shape"),
        ("weight", torch.ones(4, 5), r"weight has shape \[4, 5\]; it must be \[V, 3\]"),
        ("targets", torch.zeros(1, dtype=torch.int64), r"targets has shape \[1\]; it must be \[2\]"),
        ("bias", torch.ones(5), r"bias has shape \[5\]; it must be \[4\]"),
        ("mask", torch.ones(3), r"mask has shape \[3\]; it must be \[2\]"),
        ("temperature", torch.ones(3), r"temperature has shape|temperature is float32 of shape \[3\]"),
        ("entropy", torch.ones(1), r"entropy is float32 of shape \[1\]"),
        ("max_log_sum", torch.ones(2), r"max_log_sum is float32 of shape \[2\].*\[2, 2\]"),
    ],
)
def test_the_backward_of_the_head_checks_its_arguments(device, name, value, message):
    arguments = good_backward(device)
    OPS.linear_logprob_entropy_backward(**arguments)
    arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=message):
        OPS.linear_logprob_entropy_backward(**arguments)


@pytest.mark.parametrize("option", [{"chunk_rows": 0}, {"logit_scale": 0.0}, {"softcap": -1.0}, {"vocab_size": 5}])
def test_the_backward_of_the_head_checks_its_options(device, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is "):
        OPS.linear_logprob_entropy_backward(**good_backward(device), **option)


def test_counts_that_are_no_counts():
    k = torch.tensor(3)
    for counts, message in [
        ([2**62, 2**62, 1], r"counts\[1\] is 4611686018427387904; .* sum of counts below 2\^63"),
        ([5, -1], r"counts\[1\] is -1; it must be 0 or above"),
        ([-(2**63), 1], r"counts\[0\] is -9223372036854775808"),
    ]:
        with pytest.raises(ValueError, match=message):
            OPS.global_top_mask_key(torch.tensor(counts), None, k, 0)
    values = torch.rand(4)
    for ties, message in [([2**62, 2**62, 0], r"ties\[1\] is"), ([-1, 0, 0], r"ties\[0\] is -1")]:
        with pytest.raises(ValueError, match=message):
            OPS.global_top_mask_at_key(values, values > 0, torch.tensor(5), k, torch.tensor(ties), 2)


@pytest.mark.parametrize("k", EXTREMES)
@pytest.mark.parametrize("key", EXTREMES)
def test_any_rank_and_key(k, key):
    values, mask = torch.rand(4), torch.ones(4, dtype=torch.bool)
    key, k = torch.tensor(key), torch.tensor(k)
    for ties in ([0, 2**62, 4], [4, 4, 4]):
        selected, _ = OPS.global_top_mask_at_key(values, mask, key, k, torch.tensor(ties), 2)
        assert selected.any() <= (k > 0)
    _, k_left = OPS.global_top_mask_key(torch.tensor([3, 4]), key, k, 0)
    assert 0 <= k_left <= 4


# ---- Memory


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch before 2.13 does not give its message to extensions")
def test_a_lack_of_memory_is_told_in_torchs_words(device):
    """accelerate's find_executable_batch_size looks for these words."""
    words = "CUDA out of memory" if device.type == "cuda" else "can't allocate memory: you tried to allocate"
    # Results of 2^46 elements, and a copy that makes as many contiguous.
    huge = torch.zeros(1, device=device).expand(1 << 23, 1 << 23)
    with pytest.raises(RuntimeError, match=words):
        ext.global_top_mask(huge, huge)
    with pytest.raises(RuntimeError, match=words):
        ext.token_entropy(huge.t())
    with pytest.raises(RuntimeError, match=words):
        ext.logprob_entropy(
            torch.zeros(1, 1, device=device).expand(1 << 46, 1),
            torch.zeros(1, dtype=torch.int64, device=device).expand(1 << 46),
        )
