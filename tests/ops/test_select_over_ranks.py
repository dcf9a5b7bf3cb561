"""The selection over ranks: its four ops, `global_top_mask` with a process group, and its threshold."""

import functools
import inspect
import math
import random
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from entropy_rl_ext import covariance_mask, global_top_mask
from entropy_rl_ext.ops import _select_over_ranks
from entropy_rl_ext.ops._select_over_ranks import digit_shifts, select_over_ranks
from ranks import Ranks
from selections import DTYPES, GROUPS, RULES, cut_up, make_inputs, make_steps

# ---- The steps


class Stopped(Exception):
    pass


class ReplayedRanks:
    """Stands for `Ranks`: replays the results of the first all-reduces, and stops the rank at the next one."""

    def __init__(self, own: int, size: int, results: list[Tensor]) -> None:
        self.own, self.size, self._results = own, size, iter(results)

    def all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        result = next(self._results, None)
        if result is None:
            raise Stopped(tensor, operation)
        tensor.copy_(result)

    def gather_if_few(self, values: Tensor, mask: Tensor) -> None:
        """The rounds, whatever the number of values."""


def unused(mask: Tensor) -> Tensor:
    raise AssertionError("a ratio is for values that are gathered")


def select(values: list[Tensor], masks: list[Tensor], k: Tensor, rule: str, weight: Tensor | None = None):
    """(mask, lowest) of each rank. The ranks, as many as `values`, take turns in this process, on any device."""
    size, results = len(values), []
    while True:
        outputs, sent = [], []
        for own in range(size):
            try:
                ranks = ReplayedRanks(own, size, results)
                outputs.append(select_over_ranks(values[own], masks[own], lambda _: (k, weight), unused, rule, ranks))
            except Stopped as stop:
                sent.append(stop.args)
        if outputs:
            return outputs
        tensors = torch.stack([tensor for tensor, _ in sent])
        results.append(tensors.sum(0) if sent[0][1] == dist.ReduceOp.SUM else tensors.amin(0))


KINDS = ["random", "tied", "constant", "zeros", "special", "all masked"]


def key_of(value: float, bits: int) -> int:
    """The unsigned integer that stands for a value, computed from its bits."""
    if math.isnan(value):
        return 2**bits - 1
    pattern = int(np.float64(value).view(np.uint64) if bits == 64 else np.float32(value).view(np.uint32))
    sign = 2 ** (bits - 1)
    return sign if value == 0 else 2 * sign - 1 - pattern if value < 0 else sign + pattern


def keys_of(values, mask) -> tuple[list[int], int]:
    bits = 64 if values.dtype == torch.float64 else 32
    return [key_of(v, bits) for v in values[mask].double().tolist()], bits


def as_unsigned(key: torch.Tensor, bits: int) -> int:
    return int(key) % 2**bits


def number(value, device, dtype=torch.int64):
    return torch.tensor(value, dtype=dtype, device=device)


def split(values, mask, processes, seed):
    ends = torch.randint(values.numel() + 1, (processes - 1,), generator=torch.Generator().manual_seed(seed))
    return [t.flatten().tensor_split(ends.sort().values) for t in (values, mask)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_count_and_find_keys(kind, dtype, device):
    """Every count, key and next key against the sorted keys."""
    for seed, shape in enumerate([(1,), (7, 129), (1, 9001)]):
        values, mask, _ = make_inputs(shape, dtype, kind, seed, device)
        keys, bits = keys_of(values, mask)
        descending = sorted(keys, reverse=True)
        k_first = 1 + len(keys) // 3
        key, k = None, number(k_first, device)
        for shift in digit_shifts(dtype):
            prefix = None if key is None else as_unsigned(key, bits)
            counts = torch.ops.entropy_rl.global_top_mask_counts(values, mask, key, shift)
            digit_bits = 11 if shift > 0 else {32: 10, 64: 9}[bits]
            above = shift + digit_bits
            alike = [x for x in keys if prefix is None or x >> above == prefix >> above]
            expected = np.bincount([x >> shift & (1 << digit_bits) - 1 for x in alike], minlength=1 << digit_bits)
            assert counts.dtype == torch.int64 and counts.tolist() == expected.tolist(), (seed, shift)
            key, k = torch.ops.entropy_rl.global_top_mask_key(counts, key, k, shift)
        wanted = descending[k_first - 1] if keys else 2**bits - 1
        assert as_unsigned(key, bits) == wanted
        assert int(k) == (k_first - sum(x > wanted for x in keys) if keys else 0)
        following = torch.ops.entropy_rl.global_top_mask_next_key(values, mask, key)
        assert following.dtype == (torch.int64 if bits == 64 else torch.int32)
        # As a signed integer of the same order.
        assert int(following) + 2 ** (bits - 1) == min((x for x in keys if x > wanted), default=2**bits - 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_give_the_mask_of_the_unsplit_values(kind, dtype, device):
    for seed, (processes, ratio) in enumerate([(1, 0.2), (3, 0.2), (8, 0.5), (4, 1.0), (2, 1e-9)]):
        values, mask, _ = make_inputs((3, 433), dtype, kind, seed, device)
        parts = split(values, mask, processes, seed)
        n = int(mask.sum())
        k = min(n, max(1, int(n * ratio + 0.9999)))
        position = (1 - ratio) * max(0, n - 1)
        weight = number(position - math.floor(position), device, torch.float64)
        for rule in RULES:
            rank = number(n - math.floor(position) if rule == "quantile" else k, device)
            results = select(*parts, rank, rule, weight if rule == "quantile" else None)
            unsplit = global_top_mask(values, mask, ratio, rule=rule)
            assert torch.equal(torch.cat([kept for kept, _ in results]), unsplit.flatten()), (rule, processes)
            finite = values[unsplit & ~values.isnan()].double()
            lowest = finite.min() if len(finite) else number(math.inf if unsplit.any() else 0.0, device, torch.float64)
            assert all(value.double() == lowest for _, value in results)
            assert all(value.dtype == (dtype if dtype == torch.float64 else torch.float32) for _, value in results)


def test_steps_clamp_k_between_none_and_all(device):
    values = torch.tensor([2.0, math.nan, 5.0, 2.0], device=device)
    mask = torch.tensor([1, 1, 1, 0], device=device)
    for k, kept in [(-3, []), (0, []), (1, [1]), (2, [1, 2]), (3, [0, 1, 2]), (2**40, [0, 1, 2])]:
        ((found, lowest),) = select([values], [mask], number(k, device), "topk")
        assert found.nonzero().flatten().tolist() == kept
        assert lowest == {0: 0.0, 1: math.inf, 2: 5.0, 3: 2.0}[len(kept)]
    # Also if counts have fewer keys than k.
    counts, key, k = (number(value, device) for value in ([0, 2], 8, 9))
    key, left = torch.ops.entropy_rl.global_top_mask_key(counts, key, k, 2)
    assert (int(key), int(left)) == (12, 2)


def test_a_process_without_ties_keeps_its_larger_values(device):
    """The first process has more ties of the deciding value, 1, than are kept; the second has none, but a 3."""
    values = [torch.tensor(part, device=device) for part in ([2.0, 1.0, 1.0], [3.0, 0.0])]
    results = select(values, [torch.ones_like(part) for part in values], number(3, device), "topk")
    assert [mask.tolist() for mask, _ in results] == [[True, True, False], [True, False]]


def test_counts_add_up_beyond_32_bits(device):
    many = 2**33
    counts = number([many, 0, many, 5], device)
    for k, expected in [(5, (3, 5)), (6, (2, 1)), (many + 5, (2, many)), (many + 6, (0, 1)), (2 * many + 5, (0, many))]:
        key, left = torch.ops.entropy_rl.global_top_mask_key(counts, None, number(k, device), 0)
        assert (int(key), int(left)) == expected
    # A process holds none, some or all of the ties that are kept.
    values = torch.ones(4, device=device)
    key = number(key_of(1.0, 32), device)
    for k, kept in [(many, 0), (many + 3, 3), (2 * many, 4)]:
        ties = number([many, 4, 7], device)
        found, _ = torch.ops.entropy_rl.global_top_mask_at_key(values, values, key, number(k, device), ties, 1)
        assert found.tolist() == [i < kept for i in range(4)]


def test_quantile_rounds_the_product_before_the_sum(device):
    """The numbers of QuantileKey.RoundsTheProductBeforeTheSum in tests/cpp, where one rounding gives another result."""
    low, high = 1.0, 1 + 3 * 2.0**-52
    values = torch.tensor([low, high], dtype=torch.float64, device=device)
    weight = number(float.fromhex("0x1.5555555555556p-3"), device, torch.float64)
    ((found, lowest),) = select([values], [values > 0], number(2, device), "quantile", weight)
    assert found.tolist() == [True, True] and lowest == low


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_one_value_or_none(shape, rule, device):
    values = torch.ones(shape, device=device)
    weight = number(0.0, device, torch.float64) if rule == "quantile" else None
    ((found, lowest),) = select([values], [values], number(1, device), rule, weight)
    assert found.shape == shape and lowest.shape == ()
    assert found.all() and lowest == (1.0 if shape == () else 0.0)


def test_any_strides_and_mask(device):
    values, mask, _ = make_inputs((8, 60), torch.float32, "tied", 7, device)
    k = number(50, device)
    (expected,) = select([values], [mask], k, "topk")
    for other_values, other_mask in [
        (values.T.contiguous().T, mask),
        (torch.empty(8, 120, device=device)[:, ::2].copy_(values), mask.T.contiguous().T),
        (values, torch.where(mask, 1.0, -0.0)),
        (values, mask.to(torch.int8) * 2),
    ]:
        (actual,) = select([other_values], [other_mask], k, "topk")
        assert torch.equal(actual[0], expected[0]) and actual[0].is_contiguous() and actual[1] == expected[1]


def test_result_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        for kind in ["random", "tied"]:
            values, mask, _ = make_inputs((300_000,), torch.float32, kind, 8, "cpu")
            k = number(40_000, "cpu")
            for rule in RULES:
                weight = number(0.5, "cpu", torch.float64) if rule == "quantile" else None
                results = []
                for threads in [1, 2, 5]:
                    torch.set_num_threads(threads)
                    results.append(select([values], [mask], k, rule, weight))
                assert all(torch.equal(results[0][0][0], other[0][0]) for other in results[1:])
    finally:
        torch.set_num_threads(before)


def step_calls(device):
    """Every op with arguments that suit it."""
    values, mask, _ = make_inputs((4, 50), torch.float32, "tied", 10, device)
    k = number(20, device)
    key, k_left = None, k
    for shift in digit_shifts(values.dtype):
        counts = 2 * torch.ops.entropy_rl.global_top_mask_counts(values, mask, key, shift)
        key, k_left = torch.ops.entropy_rl.global_top_mask_key(counts, key, k_left, shift)
    ties = (counts.take(key & (len(counts) - 1)) // 2).repeat(2)
    next_key = torch.ops.entropy_rl.global_top_mask_next_key(values, mask, key)
    counts = torch.ops.entropy_rl.global_top_mask_counts(values, mask, None, 21)
    weight = number(0.5, device, torch.float64)
    return {
        "first counts": ("counts", (values, mask, None, 21)),
        "last counts": ("counts", (values, mask, key, 0)),
        "first key": ("key", (counts, None, k, 21)),
        "last key": ("key", (counts, key, k, 0)),
        "next_key": ("next_key", (values, mask, key)),
        "threshold": ("at_key", (values, mask, key, k_left)),
        "topk": ("at_key", (values, mask, key, k_left, ties, 1)),
        "quantile": ("at_key", (values, mask, key, k_left, None, 0, next_key, weight)),
    }


@pytest.mark.parametrize("call", step_calls("cpu"))
def test_opcheck_of_each_step(call, device):
    op, arguments = step_calls(device)[call]
    torch.library.opcheck(getattr(torch.ops.entropy_rl, f"global_top_mask_{op}").default, arguments)


@pytest.mark.parametrize("rule", RULES)
def test_compiles_in_one_graph_and_does_not_recompile(rule, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = functools.partial(global_top_mask, rule=rule, return_threshold=True)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for seed, (batch, ratio) in enumerate([(4, 0.2), (7, 0.3), (31, 0.5)]):
        values, mask, _ = make_inputs((batch, 64), torch.float32, "tied", seed, device)
        for actual, expected in zip(compiled(values, mask, ratio), call(values, mask, ratio), strict=True):
            assert torch.equal(actual, expected)
    assert counter.frame_count == 1, "compiled again for another size"


def test_carries_no_gradient(device):
    values, mask, _ = make_inputs((4, 50), torch.float32, "random", 11, device)
    found, lowest = global_top_mask(values.requires_grad_(), mask, return_threshold=True)
    assert not found.requires_grad and not lowest.requires_grad
    _, arguments = step_calls(device)["threshold"]
    found, lowest = torch.ops.entropy_rl.global_top_mask_at_key(values, *arguments[1:])
    assert not found.requires_grad and not lowest.requires_grad


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("first counts", {0: torch.zeros(4, 50, dtype=torch.int64)}, "values is int64; it must be float32"),
        ("first counts", {1: torch.ones(4, 49)}, r"mask has shape \[4, 49\]; it must be \[4, 50\]"),
        ("first counts", {3: 20}, "shift is 20; it must be 0 or 32 less a multiple of 11"),
        ("first counts", {3: 32}, "shift is 32; it must be 0 or 32"),
        ("first counts", {3: -1}, "shift is -1; it must be 0 or 32"),
        ("first counts", {3: 10}, "key is None with shift 10; it must be None for the first digit"),
        ("last counts", {3: 21}, "key is given with shift 21; it must be None for the first digit"),
        ("last counts", {2: torch.zeros(())}, r"key is float32 of shape \[\]; it must be one int64"),
        ("first key", {0: torch.zeros(2048)}, "counts is float32; it must be int64"),
        (
            "first key",
            {0: torch.zeros(2049, dtype=torch.int64)},
            r"counts has shape \[2049\]; it must be \[1\] to \[",
        ),
        ("first key", {0: torch.zeros(0, dtype=torch.int64)}, r"counts has shape \[0\]"),
        ("first key", {2: torch.zeros(1, dtype=torch.int64)}, r"k is int64 of shape \[1\]; it must be one int64"),
        ("first key", {3: 64}, r"shift is 64; it must be in \[0, 64\)"),
        ("next_key", {2: torch.zeros((), dtype=torch.int32)}, r"key is int32 of shape \[\]; it must be one int64"),
        ("topk", {4: torch.zeros(2)}, r"ties is float32 of shape \[2\]; it must be int64, one number a process"),
        ("topk", {5: 2}, r"process is 2; it must be in \[0, 2\), the processes of ties"),
        ("topk", {5: -1}, "process is -1"),
        ("quantile", {4: torch.zeros(2, dtype=torch.int64)}, "next_key is given with ties"),
        ("quantile", {7: None}, "next_key is given and weight is None; both are needed for a quantile"),
        ("quantile", {6: None}, "next_key is None and weight is given"),
        ("quantile", {6: torch.zeros((), dtype=torch.int64)}, r"next_key is int64 of shape \[\]; it must be one int32"),
        ("quantile", {7: torch.zeros(())}, r"weight is float32 of shape \[\]; it must be one float64"),
    ],
)
def test_bad_input_of_steps(call, arguments, message, device):
    op, good = step_calls(device)[call]
    bad = [arguments.get(i, value) for i, value in enumerate(good)]
    bad = [value.to(device) if isinstance(value, torch.Tensor) else value for value in bad]
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.entropy_rl, f"global_top_mask_{op}")(*bad)


# ---- global_top_mask over a process group


def differences(
    size: int, few: int, seed: int, tokens: int, kind: str, dtype: torch.dtype, rule: str, ratio: float
) -> list[str]:
    """How this rank's results for its part of a batch differ from those for the unsplit batch.

    Values are gathered where no rank has more than `few`.
    """
    if dist.get_rank() >= size:
        return []
    entropy, mask, _ = make_inputs((tokens,), dtype, kind, seed, "cpu")
    unsplit = global_top_mask(entropy, mask, ratio, rule=rule)
    own = list(cut_up([entropy, mask, unsplit], size, random.Random(seed)))[dist.get_rank()]
    with mock.patch.object(_select_over_ranks, "_FEW", few):
        found, threshold = global_top_mask(*own[:2], ratio, rule=rule, group=GROUPS[size - 1], return_threshold=True)
    errors = [] if torch.equal(found, own[2]) else [f"{found} is not {own[2]}"]
    if threshold.item() != lowest_of(entropy, unsplit):
        errors.append(f"threshold {threshold} is not {lowest_of(entropy, unsplit)}")
    return errors


def lowest_of(entropy: Tensor, kept: Tensor) -> float:
    numbers = entropy[kept & ~entropy.isnan()]
    return numbers.min().item() if len(numbers) else math.inf if kept.any() else 0.0


@settings(deadline=None, max_examples=400)
@given(
    size=st.integers(1, 8),
    few=st.sampled_from([-1, 50, 400]),
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 400),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    rule=st.sampled_from(RULES),
    ratio=st.floats(0, 1, exclude_min=True),
)
def test_any_split_gives_the_mask_of_the_unsplit_batch(eight: Ranks, **case: Any) -> None:
    assert eight.run(differences, *case.values()) == [[]] * 8


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_batches(rule: str, dtype: torch.dtype, eight: Ranks) -> None:
    """Many keys to a digit in every round, and ties on all ranks."""
    for kind in ("random", "tied", "special"):
        for few in (-1, 200_003):
            assert eight.run(differences, 5, few, 7, 200_003, kind, dtype, rule, 0.2) == [[]] * 8


def quantile_of_neighbours(ratio: float) -> list[bool]:
    """Adjacent numbers, so that the quantile can round to either neighbour, split over three ranks."""
    if dist.get_rank() > 2:
        return []
    steps = torch.arange(6, dtype=torch.float64)
    unsplit = torch.cat([1 + steps * 2.0**-52, steps * 5e-324 + 1e-300])
    mask = torch.ones_like(unsplit)
    expected = global_top_mask(unsplit, mask, ratio, rule="quantile")
    cut = [[0, 1, 2, 6], [3, 4, 7, 8, 9], [5, 10, 11]][dist.get_rank()]
    found = global_top_mask(unsplit[cut], mask[cut], ratio, rule="quantile", group=GROUPS[2])
    return (found == expected[cut]).tolist()


def test_quantile_over_ranks_rounds_as_the_op_does(eight: Ranks) -> None:
    for ratio in torch.linspace(0.01, 1, 100, dtype=torch.float64).tolist():
        assert all(all(result) for result in eight.run(quantile_of_neighbours, ratio))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_threshold_of_one_process(rule: str, kind: str, device: torch.device) -> None:
    for dtype, shape in zip(DTYPES, [(3, 70), (1, 1), (0, 4), (9001,)], strict=True):
        entropy, mask, _ = make_inputs(shape, dtype, kind, 1, device)
        found, threshold = global_top_mask(entropy, mask, 0.3, rule=rule, return_threshold=True)
        assert torch.equal(found, global_top_mask(entropy, mask, 0.3, rule=rule))
        assert threshold.shape == () and threshold.item() == lowest_of(entropy, found)
        assert threshold.dtype == (dtype if dtype == torch.float64 else torch.float32)


def errors_of_bad_input() -> list[str]:
    good = {"entropy": torch.zeros(2, 3), "response_mask": torch.ones(2, 3), "group": dist.group.WORLD}
    messages = []
    for bad in (
        {"response_mask": torch.ones(2, 4)},
        {"entropy": torch.zeros(2, 3, dtype=torch.int64)},
        {"top_ratio": 1.5},
        {"rule": "best"},
        {"scope": "sequence"},
        {"group_ids": torch.zeros(2)},
    ):
        try:
            global_top_mask(**(good | bad))
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_bad_input_is_reported_before_anything_is_sent(eight: Ranks) -> None:
    for messages in eight.run(errors_of_bad_input):
        assert [message.split(";")[0] for message in messages] == [
            "response_mask has shape [2, 4]",
            "entropy is int64",
            "top_ratio is 1.5",
            "rule is 'best'",
            "scope is 'sequence'",
            "group_ids is given with scope 'batch'",
        ]


def test_a_threshold_needs_the_scope_batch() -> None:
    entropy = torch.ones(2, 3)
    with pytest.raises(ValueError, match="scope is 'sequence'; with return_threshold it must be 'batch'"):
        global_top_mask(entropy, entropy, scope="sequence", return_threshold=True)


# ---- Collectives, and waiting for the device


def payloads(tokens: int, dtype: torch.dtype, rule: str, *tokens_before: int) -> list[tuple[str, int]]:
    """The collectives of a selection, or of a choice by covariance if `rule` is a loss mode, with their bytes.

    It is the first one of this group, but for selections among `tokens_before`.
    """
    _select_over_ranks._ROOM.clear()
    for before in tokens_before:
        entropy, mask, _ = make_inputs((before,), dtype, "tied", dist.get_rank(), "cpu")
        global_top_mask(entropy, mask, group=dist.group.WORLD)
    sent = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            attribute = getattr(dist, name)
            if not inspect.isfunction(attribute) or name in ("get_rank", "get_world_size"):
                return attribute

            def call(*tensors: Any, **named: Any) -> Any:
                is_gather = name.startswith("all_gather")
                sent.append(("all_gather" if is_gather else name, tensors[is_gather].nbytes))
                return attribute(*tensors, **named)

            return call

    _select_over_ranks.dist = Recorder()
    try:
        if rule in RULES:
            entropy, mask, _ = make_inputs((tokens,), dtype, "tied", dist.get_rank(), "cpu")
            global_top_mask(entropy, mask, 0.2, rule=rule, group=dist.group.WORLD)
        else:
            covariance_mask(*make_steps(tokens, dist.get_rank(), True, dtype), rule, group=dist.group.WORLD)
    finally:
        _select_over_ranks.dist = dist
    return sent


@pytest.mark.parametrize("rule", RULES)
def test_many_tokens_are_not_sent(rule: str, eight: Ranks) -> None:
    """The bytes that docs/distributed.md states."""
    tokens = 100_000
    of_rule = {"topk": [8 * 8], "threshold": [], "quantile": [4]}
    float32 = [16_384, 16_384, 8_192] + of_rule[rule]
    count = ("all_gather", 8)
    sent = [count, *(("all_reduce", size) for size in float32)]
    assert eight.run(payloads, tokens, torch.float32, rule) == [sent] * 8
    of_rule["quantile"] = [8]
    float64 = [16_384] * 5 + [4_096] + of_rule[rule]
    sent = [count, *(("all_reduce", size) for size in float64)]
    assert eight.run(payloads, tokens, torch.float64, rule) == [sent] * 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tokens_are_gathered(dtype: torch.dtype, eight: Ranks) -> None:
    """With the number of values, in room for a power of two of them, if the last selection needed as much."""

    def message(tokens: int) -> tuple[str, int]:
        room = 2 ** math.ceil(math.log2(tokens)) if tokens else 0
        return "all_gather", 8 + room * (dtype.itemsize + 1)

    none, few, more = message(0), message(100), message(400)
    assert none[1] == 8 < few[1] < more[1]
    for rule in RULES:
        for before, tokens, sent in [
            ([], 0, [none]),
            ([], 100, [none, few]),
            ([100], 100, [few]),
            ([100], 400, [few, more]),
            ([400], 100, [more]),
            ([400, 100], 400, [few, more]),
            ([400, 0], 100, [none, few]),
            ([400, 100_000], 100, [none, few]),
        ]:
            assert eight.run(payloads, tokens, dtype, rule, *before) == [sent] * 8, (before, tokens)


def test_many_tokens_after_few(eight: Ranks) -> None:
    """They fit into no message, and are not sent again with more room."""
    first, second, *others = eight.run(payloads, 100_000, torch.float32, "topk", 100)[0]
    assert first == ("all_gather", 8 + 128 * 5) and second == ("all_reduce", 16_384) and len(others) == 3


def test_what_a_choice_by_covariance_sends(eight: Ranks) -> None:
    """Counts and sums, then a selection among covariances or, for clip_cov, among random numbers of 64 bits."""
    float32, float64 = [16_384, 16_384, 8_192, 8 * 8], [*[16_384] * 5, 4_096, 8 * 8]
    for mode, sizes in {"kl_cov": float32, "clip_cov": float64}.items():
        sent = eight.run(payloads, 100_000, torch.float32, mode)[0]
        assert sent[:3] == [("all_reduce", 9 * 8), ("all_reduce", 2 * 8), ("all_gather", 8)]
        assert [size for _, size in sent[3:]] == sizes


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A group of eight ranks that sends nothing; this process is its fourth."""
    for name, value in {"all_reduce": None, "get_rank": 3, "get_world_size": 8}.items():
        monkeypatch.setattr(dist, name, lambda *_, value=value, **__: value)
    # Only values on the CPU are gathered, and those of the tests below stand for others.
    monkeypatch.setattr(_select_over_ranks.Ranks, "gather_if_few", lambda *_: None)
    return object()


def test_no_values_are_gathered_from_a_device(eight: Ranks) -> None:
    """Reading how many each rank has would wait for it."""
    assert eight.run(gathered_from_a_device) == [True] * 8


def gathered_from_a_device() -> bool:
    values = torch.ones(3, device="meta")
    return _select_over_ranks.Ranks(dist.group.WORLD).gather_if_few(values, values > 0) is None


@pytest.mark.parametrize("rule", RULES)
def test_the_host_waits_for_nothing(rule: str, group: Any) -> None:
    """On tensors without values, code that reads a value, or makes a shape that depends on one, fails."""
    with FakeTensorMode():
        entropy, mask = torch.rand(4, 5), torch.ones(4, 5)
        with pytest.raises(DataDependentOutputException):
            entropy.sum().item()
        found, threshold = global_top_mask(entropy, mask, 0.2, rule=rule, group=group, return_threshold=True)
    assert found.shape == (4, 5) and found.dtype == torch.bool
    assert threshold.shape == ()


@pytest.mark.parametrize("mode", ["clip_cov", "kl_cov"])
def test_the_host_waits_for_no_choice_by_covariance(mode: str, group: Any) -> None:
    with FakeTensorMode():
        chosen = covariance_mask(*(torch.ones(4, 5) for _ in range(4)), mode, group=group)
    assert chosen.shape == (4, 5) and chosen.dtype == torch.bool
