"""global_top_mask and get_global_entropy_top_mask in one process; test_select_over_ranks.py has the rest."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from entropy_rl_ext import get_global_entropy_top_mask, global_top_mask, reference
from selections import DTYPES, RULES, make_inputs

SCOPES = ["batch", "sequence", "group"]
RATIOS = [1e-9, 0.05, 0.2, 1 / 3, 0.5, 0.999, 1.0]

SHAPES = [
    (1, 1),  # one token
    (1, 33),  # one row: every scope is the same
    (257, 1),  # rows of one token
    (7, 129),  # odd sizes, nothing aligned
    (3, 4096),  # a row is exactly one tile of the CUDA kernels
    (2, 9001),  # rows of several tiles, the last one ragged
    (1, 100_003),  # batch over many tiles, and over several threads on the CPU
]


# ---- An independent statement of the rules, in numpy and pure Python -------------------------------------


def rank_key(value: float) -> tuple[bool, float]:
    """NaN above everything, zeros equal."""
    return (math.isnan(value), 0.0 if math.isnan(value) else value)


def interpolate(low: float, high: float, weight: float) -> float:
    if weight == 0 or low == high or low == -math.inf:
        return low
    if math.isnan(low) or math.isnan(high):
        return math.nan
    return min(low + weight * (high - low), high)


def expected_segment(values: list[float], ratio: float, rule: str, rounding: type) -> list[bool]:
    n = len(values)
    if n == 0:
        return []
    k = min(n, max(1, int(n * ratio + 0.9999)))
    descending = sorted(range(n), key=lambda i: (rank_key(values[i]), -i), reverse=True)
    if rule == "topk":
        chosen = set(descending[:k])
        return [i in chosen for i in range(n)]
    if rule == "threshold":
        threshold = values[descending[k - 1]]
    else:
        position = (1 - ratio) * (n - 1)
        lower = math.floor(position)
        ascending = [values[i] for i in reversed(descending)]
        upper = ascending[min(lower + 1, n - 1)]
        threshold = float(rounding(interpolate(ascending[lower], upper, position - lower)))
    return [rank_key(value) >= rank_key(threshold) for value in values]


def expected_mask(entropy, response_mask, ratio, rule, scope, group_ids):
    rows = entropy.shape[0]
    rounding = np.float64 if entropy.dtype == torch.float64 else np.float32
    values = entropy.double().cpu().numpy()
    inside = response_mask.double().cpu().numpy() != 0
    owner = {"batch": [0] * rows, "sequence": list(range(rows)), "group": group_ids}[scope]
    owner = [int(i) for i in owner]
    result = np.zeros(entropy.shape, dtype=bool)
    for segment in set(owner):
        where = [(r, c) for r in range(rows) if owner[r] == segment for c in np.flatnonzero(inside[r])]
        kept = expected_segment([float(values[i]) for i in where], ratio, rule, rounding)
        for index, keep in zip(where, kept, strict=True):
            result[index] = keep
    return torch.from_numpy(result)


def select(entropy, mask, ratio, rule, scope, groups):
    group_ids = groups if scope == "group" else None
    return global_top_mask(entropy, mask, ratio, rule=rule, scope=scope, group_ids=group_ids)


# ---- Parity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, rule, scope, dtype, device):
    for kind, ratio in itertools.product(["random", "tied", "special"], [0.05, 0.2, 1.0]):
        entropy, mask, groups = make_inputs(shape, dtype, kind, 0, device)
        actual = select(entropy, mask, ratio, rule, scope, groups)
        expected = reference.global_top_mask(
            entropy, mask, ratio, rule=rule, scope=scope, group_ids=groups if scope == "group" else None
        )
        assert actual.dtype == torch.bool and actual.is_contiguous()
        assert torch.equal(actual, expected), (kind, ratio)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_groups_of_many_tokens_and_of_few(rule, dtype, device):
    """On CUDA a block takes a group of up to 16,384 tokens; of a larger one, a block takes each tile."""
    rows_of_group = [9, 1, 20, 7, 8, 1]  # 7 rows have 14,357 tokens, 8 have 16,408
    columns = 2051
    owner = torch.arange(len(rows_of_group)).repeat_interleave(torch.tensor(rows_of_group))
    for kind in ["random", "tied", "special"]:
        entropy, mask, _ = make_inputs((len(owner), columns), dtype, kind, 3, device)
        for ids in (owner, owner[torch.randperm(len(owner), generator=torch.Generator().manual_seed(4))]):
            actual = select(entropy, mask, 0.2, rule, "group", ids.to(device))
            expected = reference.global_top_mask(entropy, mask, 0.2, rule=rule, scope="group", group_ids=ids.to(device))
            assert torch.equal(actual, expected), kind


@pytest.mark.parametrize("kind", ["random", "tied", "constant", "zeros", "special", "all masked"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rule", RULES)
def test_equals_independent_statement(rule, scope, kind, device):
    for seed, ratio in enumerate(RATIOS):
        for shape in [(1, 1), (6, 31)]:
            for dtype in [torch.float32, torch.float64]:
                entropy, mask, groups = make_inputs(shape, dtype, kind, seed, device)
                actual = select(entropy, mask, ratio, rule, scope, groups)
                expected = expected_mask(entropy, mask, ratio, rule, scope, groups)
                assert torch.equal(actual.cpu(), expected), (ratio, shape, dtype)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rule", RULES)
def test_same_bits_as_on_the_cpu(rule, scope, device):
    # Long enough for hundreds of tiles, and for ties and NaN on both sides of every tile's edge.
    for dtype, kind in itertools.product([torch.float32, torch.float64], ["random", "special"]):
        arguments = make_inputs((3, 400_003), dtype, kind, 11, "cpu")
        moved = [tensor.to(device) for tensor in arguments]
        on_device = select(*moved[:2], 0.2, rule, scope, moved[2])
        assert torch.equal(on_device.cpu(), select(*arguments[:2], 0.2, rule, scope, arguments[2]))


def authors_mask(entropy, response_mask, top_ratio):
    """The published implementation's choice: flatten, top-k over the response tokens, scatter back."""
    flat_mask = response_mask.flatten().bool()
    response_entropy = entropy.flatten()[flat_mask]
    k = max(1, int(len(response_entropy) * top_ratio + 0.9999))
    chosen = torch.zeros(len(response_entropy), dtype=torch.long, device=entropy.device)
    chosen[torch.topk(response_entropy, k).indices] = 1
    result = torch.zeros(entropy.numel(), dtype=torch.long, device=entropy.device)
    result[flat_mask] = chosen
    return result.view_as(entropy)


def test_drop_in_equals_authors_expression_on_1000_inputs(device):
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        rows, columns = torch.randint(1, 65, (2,), generator=generator).tolist()
        # A permutation has no ties, so that the authors' choice is defined.
        entropy = torch.randperm(rows * columns, generator=generator).view(rows, columns) / (rows * columns)
        mask = torch.randint(2, (rows, columns), generator=generator)
        mask[0, 0] = 1  # their expression needs a token
        ratio = float(1 - torch.rand((), generator=generator, dtype=torch.float64))
        entropy, mask = entropy.to(device), mask.to(device)
        actual = get_global_entropy_top_mask(entropy, mask, ratio)
        assert actual.dtype == torch.int64
        assert torch.equal(actual, authors_mask(entropy, mask, ratio))


def test_count_rounds_the_product_before_the_sum(device):
    # Python rounds n * ratio, then the sum. A fused multiply-add rounds once: one off for 20 pairs below.
    pairs = [(n, m / (10_000 * n)) for n in range(3, 1500, 7) for m in (1, 10_001, 30_001, 100_001)]
    for n, ratio in pairs:
        if ratio > 1:
            continue
        entropy = torch.arange(n, dtype=torch.float32, device=device).unsqueeze(0)
        kept = int(global_top_mask(entropy, torch.ones_like(entropy), ratio).sum())
        assert kept == min(n, max(1, int(n * ratio + 0.9999))), (n, ratio)


@pytest.mark.parametrize("n", [2, 5, 11, 101, 1001])
def test_quantile_equals_torch_quantile_in_float64(n, device):
    entropy = torch.rand(1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).to(device)
    for ratio in RATIOS:
        threshold = torch.quantile(entropy, 1 - ratio)
        actual = global_top_mask(entropy, torch.ones_like(entropy), ratio, rule="quantile")
        assert torch.equal(actual, entropy >= threshold)


# ---- Properties that the docstring states ------------------------------------------------------------

inputs = st.builds(
    lambda rows, columns, seed, levels, share: (
        torch.randint(levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float(),
        torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) < share,
    ),
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([1, 2, 5, 10**6]),
    share=st.sampled_from([0.02, 0.5, 1.0]),
)
ratios = st.floats(0, 1, exclude_min=True)


@settings(deadline=None, max_examples=200)
@given(inputs, ratios)
def test_topk_keeps_exactly_k_and_threshold_adds_only_ties(device, example, ratio):
    entropy, mask = (t.to(device) for t in example)
    n = int(mask.sum())
    k = min(n, max(1, int(n * ratio + 0.9999)))
    top = global_top_mask(entropy, mask, ratio)
    assert int(top.sum()) == k
    assert not (top & ~mask).any()
    if n:
        above = global_top_mask(entropy, mask, ratio, rule="threshold")
        assert torch.equal(above, mask & (entropy >= entropy[top].min()))
        # Of the tokens at the threshold, the kept ones come first.
        tied = above & (entropy == entropy[top].min())
        kept = top[tied]
        assert torch.equal(kept, kept.sort(descending=True).values)


@settings(deadline=None, max_examples=100)
@given(inputs, ratios, st.sampled_from(RULES))
def test_scopes_agree_with_batch_on_their_own_rows(device, example, ratio, rule):
    entropy, mask = (t.to(device) for t in example)
    groups = torch.arange(entropy.shape[0], device=device) % 3
    for scope, owner in [("sequence", torch.arange(entropy.shape[0], device=device)), ("group", groups)]:
        every = select(entropy, mask, ratio, rule, scope, owner)
        for segment in owner.unique():
            rows = owner == segment
            part = global_top_mask(entropy[rows], mask[rows], ratio, rule=rule)
            assert torch.equal(every[rows], part)


@settings(deadline=None, max_examples=50)
@given(inputs, ratios, st.sampled_from(RULES))
def test_depends_on_the_order_of_the_entropies_alone(device, example, ratio, rule):
    entropy, mask = (t.to(device) for t in example)
    # Interpolation is only invariant to scaling by a power of two.
    other = entropy * 0.25 if rule == "quantile" else torch.atan(entropy.double())
    assert torch.equal(global_top_mask(entropy, mask, ratio, rule=rule), global_top_mask(other, mask, ratio, rule=rule))


@pytest.mark.parametrize("rule", RULES)
def test_tokens_outside_the_mask_are_ignored(rule, device):
    entropy, mask, _ = make_inputs((5, 200), torch.float32, "random", 3, device)
    expected = global_top_mask(entropy, mask, 0.2, rule=rule)
    poisoned = torch.where(mask, entropy, math.nan)
    assert torch.equal(global_top_mask(poisoned, mask, 0.2, rule=rule), expected)
    assert not (expected & ~mask).any()


def test_nan_ranks_highest(device):
    entropy = torch.tensor([[1.0, math.nan, math.inf, 3.0, -math.nan]], device=device)
    mask = torch.ones_like(entropy)
    assert global_top_mask(entropy, mask, 0.2).tolist() == [[False, True, False, False, False]]
    assert global_top_mask(entropy, mask, 0.2, rule="threshold").tolist() == [[False, True, False, False, True]]
    # The quantile lies between inf and NaN, so it is NaN.
    assert global_top_mask(entropy, mask, 0.4, rule="quantile").tolist() == [[False, True, False, False, True]]


def test_quantile_between_infinities(device):
    inf = math.inf
    cases = [
        ([inf, inf, 1.0], 0.3, [True, True, False]),  # between equal neighbours, not inf - inf
        ([-inf, -inf, 1.0], 0.7, [True, True, True]),
        ([-inf, 1.0, 2.0], 0.9, [True, True, True]),  # -inf stays -inf
        ([0.0, 1.0, inf], 0.3, [False, False, True]),
    ]
    for values, ratio, expected in cases:
        entropy = torch.tensor([values], device=device)
        mask = global_top_mask(entropy, torch.ones_like(entropy), ratio, rule="quantile")
        assert mask.tolist() == [expected], values


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)], ids=str)
def test_no_tokens_select_nothing(shape, rule, device):
    entropy = torch.zeros(shape, device=device)
    for scope in SCOPES:
        groups = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
        assert select(entropy, entropy, 0.2, rule, scope, groups).shape == shape


def test_any_number_of_dimensions(device):
    entropy, mask, _ = make_inputs((12, 50), torch.float32, "tied", 4, device)
    groups = torch.arange(12, device=device) % 5
    for scope in SCOPES:
        flat = select(entropy, mask, 0.3, "topk", scope, groups)
        shaped = select(entropy.view(3, 4, 50), mask.view(3, 4, 50), 0.3, "topk", scope, groups.view(3, 4))
        assert torch.equal(flat.view(3, 4, 50), shaped)
    row = select(entropy[0], mask[0], 0.3, "topk", "sequence", None)
    assert torch.equal(row, global_top_mask(entropy[0], mask[0], 0.3))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *DTYPES])
def test_mask_of_any_dtype(dtype, device):
    entropy, mask, _ = make_inputs((4, 77), torch.float32, "random", 5, device)
    assert torch.equal(global_top_mask(entropy, mask.to(dtype)), global_top_mask(entropy, mask))
    # Of integers, any nonzero value is in.
    other = torch.where(mask, 1.0, -0.0) if dtype.is_floating_point else mask * 2
    assert torch.equal(global_top_mask(entropy, other.to(dtype)), global_top_mask(entropy, mask))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_group_ids_of_any_integer_dtype(dtype, device):
    entropy, mask, groups = make_inputs((9, 40), torch.float32, "tied", 6, device)
    expected = select(entropy, mask, 0.2, "topk", "group", groups)
    # The order and values of ids do not matter.
    renamed = torch.tensor([7, 1, 120], device=device)[groups].to(dtype)
    assert torch.equal(select(entropy, mask, 0.2, "topk", "group", renamed), expected)


def test_any_strides(device):
    entropy, mask, groups = make_inputs((8, 60), torch.float32, "tied", 7, device)
    for scope in SCOPES:
        expected = select(entropy, mask, 0.2, "topk", scope, groups)
        assert torch.equal(select(entropy.T.contiguous().T, mask, 0.2, "topk", scope, groups), expected)
        spread = torch.empty(8, 120, device=device)[:, ::2].copy_(entropy)
        assert torch.equal(select(spread, mask.T.contiguous().T, 0.2, "topk", scope, groups), expected)
        broadcast = select(entropy[:1].expand(8, 60), mask[:1].expand(8, 60), 0.2, "topk", scope, groups)
        copied = select(entropy[:1].repeat(8, 1), mask[:1].repeat(8, 1), 0.2, "topk", scope, groups)
        assert torch.equal(broadcast, copied)


def many_tokens(kind: str, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(n, generator=generator)
    if kind == "normal":
        return torch.randn(n, generator=generator)
    if kind == "ascending":
        return random.sort().values
    if kind == "descending":
        return random.sort(descending=True).values
    if kind == "few values":
        return (random * 8).floor()
    if kind == "one value and outliers":
        return torch.where(random < 1e-4, random, torch.where(random > 1 - 1e-4, torch.nan, 0.5))
    # The CPU reads 16 neighbours of each `stride` tokens first, to know about which values are kept.
    stride = n // 1024
    starts = torch.arange(n // stride) * stride + torch.arange(n // stride) * 37 % (stride // 16) * 16
    random[(starts[:, None] + torch.arange(16)).flatten()] -= {"sample too low": 10, "sample too high": -10}[kind]
    return random


@pytest.mark.parametrize(
    "kind",
    [
        "normal",
        "ascending",
        "descending",
        "few values",
        "one value and outliers",
        "sample too low",
        "sample too high",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_many_tokens(kind, dtype, device):
    """Against a stable sort, at the ratios and number of threads at which the CPU kernel takes another way."""
    n = 300_000
    entropy = many_tokens(kind, n).to(dtype)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.7
    values = entropy[mask].to(torch.float64 if dtype == torch.float64 else torch.float32)
    order = values.nan_to_num(torch.inf).sort(descending=True, stable=True)
    before = torch.get_num_threads()
    try:
        for threads, ratio in itertools.product([1, 3], [1e-6, 0.001, 0.2, 0.999, 1.0]):
            torch.set_num_threads(threads)
            k = max(1, int(len(values) * ratio + 0.9999))
            lower = (1 - ratio) * (len(values) - 1)
            low, high = (float(order.values[len(values) - 1 - i]) for i in (int(lower), math.ceil(lower)))
            quantile = torch.tensor(low if math.isinf(low) else low + (lower % 1) * (high - low), dtype=torch.float64)
            kept = {rule: torch.zeros(len(values), dtype=torch.bool) for rule in RULES}
            kept["topk"][order.indices[:k]] = True
            kept["threshold"] = values.nan_to_num(torch.inf) >= order.values[k - 1]
            kept["quantile"] = values.nan_to_num(torch.inf) >= quantile.to(values.dtype)
            for rule in RULES:
                actual = global_top_mask(entropy.to(device), mask.to(device), ratio, rule=rule).cpu()
                assert not actual[~mask].any() and torch.equal(actual[mask], kept[rule]), (rule, ratio, threads)
    finally:
        torch.set_num_threads(before)


def test_result_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        for shape in [(1, 300_000), (64, 3000)]:
            entropy, mask, groups = make_inputs(shape, torch.float32, "tied", 8, "cpu")
            for rule, scope in itertools.product(RULES, SCOPES):
                results = []
                for threads in [1, 2, 5]:
                    torch.set_num_threads(threads)
                    results.append(select(entropy, mask, 0.2, rule, scope, groups))
                assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


def test_carries_no_gradient(device):
    entropy = torch.rand(3, 8, device=device, requires_grad=True)
    mask = global_top_mask(entropy, torch.ones_like(entropy))
    assert not mask.requires_grad
    (entropy * mask).sum().backward()
    assert torch.equal(entropy.grad, mask.to(entropy.dtype))


# ---- Registration ----------------------------------------------------------------------------------------


def test_three_arguments_are_enough(device):
    entropy, mask, _ = make_inputs((4, 50), torch.float32, "random", 9, device)
    assert torch.equal(torch.ops.entropy_rl.global_top_mask(entropy, mask, 0.3), global_top_mask(entropy, mask, 0.3))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(scope, requires_grad, device):
    entropy, mask, groups = make_inputs((4, 50), torch.float32, "random", 10, device)
    group_ids = groups if scope == "group" else None
    arguments = (entropy.requires_grad_(requires_grad), mask, 0.2, "topk", scope, group_ids)
    torch.library.opcheck(torch.ops.entropy_rl.global_top_mask, arguments)
    ratio = torch.tensor(0.2, dtype=torch.float64)
    arguments = (*arguments[:2], ratio, *arguments[3:])
    torch.library.opcheck(torch.ops.entropy_rl.global_top_mask_forward, arguments)


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_in_one_graph_and_does_not_recompile(dynamic, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(global_top_mask, fullgraph=True, dynamic=dynamic, backend=counter)
    compilations = []
    cases = [(4, 0.2), (7, 0.2), (9, 0.35), (31, 0.05), (8, 0.5), (5, 1.0)]
    for seed, (batch, ratio) in enumerate(cases):
        entropy, mask, _ = make_inputs((batch, 64), torch.float32, "random", seed, device)
        assert torch.equal(compiled(entropy, mask, ratio), global_top_mask(entropy, mask, ratio))
        compilations.append(counter.frame_count)
    # By default torch.compile takes batch size and ratio as constants until it has seen them change.
    assert compilations == ([1, 1, 1, 1, 1, 1] if dynamic else [1, 2, 3, 3, 3, 3])


# ---- Bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_ratio": 0.0}, r"top_ratio is 0; it must be in \(0, 1\]"),
        ({"top_ratio": -0.1}, r"top_ratio is -0\.1; it must be in \(0, 1\]"),
        ({"top_ratio": 1.5}, r"top_ratio is 1\.5; it must be in \(0, 1\]"),
        ({"top_ratio": math.nan}, r"top_ratio is -?nan; it must be in \(0, 1\]"),
        ({"rule": "best"}, r"rule is 'best'; it must be one of 'topk', 'threshold', 'quantile'"),
        ({"scope": "row"}, r"scope is 'row'; it must be one of 'batch', 'sequence', 'group'"),
        ({"scope": "group"}, "group_ids is None; scope 'group' needs it"),
        ({"group_ids": torch.zeros(2, dtype=torch.int64)}, "group_ids is given with scope 'batch'"),
        (
            {"scope": "group", "group_ids": torch.zeros(2)},
            "group_ids is float32; it must be an integer dtype",
        ),
        (
            {"scope": "group", "group_ids": torch.zeros(3, dtype=torch.int64)},
            r"group_ids has shape \[3\]; it must be \[2\]",
        ),
        ({"response_mask": torch.ones(2, 4)}, r"response_mask has shape \[2, 4\]; it must be \[2, 3\]"),
        ({"entropy": torch.zeros(2, 3, dtype=torch.int64)}, "entropy is int64; it must be float32"),
        (
            {"entropy": torch.zeros(()), "response_mask": torch.zeros(())},
            r"entropy has no dimension; it must be \[\.\.\., sequence\]",
        ),
    ],
)
def test_bad_input(arguments, message, device):
    defaults = {"entropy": torch.zeros(2, 3), "response_mask": torch.ones(2, 3)}
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (defaults | arguments).items()
    }
    with pytest.raises(ValueError, match=message):
        global_top_mask(**arguments)


@pytest.mark.parametrize("algorithm", ["auto", "sort", "radix"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scope", SCOPES)
def test_every_algorithm_gives_the_same_mask(algorithm, rule, scope, device):
    # The CPU has one algorithm and accepts all names. 200_000 tokens: several blocks share a segment on CUDA.
    for shape in [(9, 60), (2, 100_000)]:
        entropy, mask, groups = make_inputs(shape, torch.float32, "tied", 12, device)
        ratio = torch.tensor(0.2, dtype=torch.float64)
        ids = groups if scope == "group" else None
        actual = torch.ops.entropy_rl.global_top_mask_forward(entropy, mask, ratio, rule, scope, ids, algorithm)
        assert torch.equal(actual, select(entropy, mask, 0.2, rule, scope, groups))


def test_unknown_algorithm(device):
    entropy = torch.zeros(2, 3, device=device)
    ratio = torch.tensor(0.2, dtype=torch.float64)
    with pytest.raises(ValueError, match="algorithm is 'best'; it must be one of 'auto', 'sort', 'radix'"):
        torch.ops.entropy_rl.global_top_mask_forward(entropy, entropy, ratio, "topk", "batch", None, "best")


def test_bad_ratio_under_the_papers_name(device):
    with pytest.raises(ValueError, match="top_ratio is 20"):
        get_global_entropy_top_mask(torch.zeros(2, 3, device=device), torch.ones(2, 3, device=device), 20)
