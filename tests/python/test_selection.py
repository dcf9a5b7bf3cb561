"""Selection as the trainer uses it: over micro-batches, mini-batches and ranks."""

import inspect
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from entropy_rl import selection
from entropy_rl_ext import global_top_mask
from ranks import Ranks

KINDS = ("random", "tied", "constant", "special", "none")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# ---- Over ranks


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(8, tmp_path_factory.mktemp("ranks"))
    ranks.run(make_groups)
    yield ranks
    ranks.close()


GROUPS: list[Any] = []


def make_groups() -> None:
    """The group of the first 1 to 8 ranks."""
    GROUPS.extend(dist.new_group(range(size)) for size in range(1, 9))


def make_batch(tokens: int, kind: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """The entropies of the concatenated batch, flat, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.empty(tokens, dtype=torch.float64).exponential_(generator=generator)
    if kind == "tied":
        entropy = (entropy * 4).round() / 4
    elif kind == "constant":
        entropy.fill_(1.5)
    elif kind == "special":
        values = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0, -1.0, 5e-324, 1e-45])
        entropy = torch.where(entropy < 1, values[torch.randint(9, (tokens,), generator=generator)], entropy)
    mask = torch.rand(tokens, generator=generator) < (0.0 if kind == "none" else 0.7)
    return entropy.to(dtype), mask


def cut_up(batch: list[Tensor], parts: int, generator: random.Random) -> Iterator[list[Tensor]]:
    """Parts of any length, also none."""
    ends = sorted(generator.randrange(len(batch[0]) + 1) for _ in range(parts - 1))
    for begin, end in itertools.pairwise([0, *ends, len(batch[0])]):
        yield [tensor[begin:end] for tensor in batch]


def differences(size: int, seed: int, tokens: int, kind: str, dtype: torch.dtype, rule: str, ratio: float) -> list[str]:
    """What a rank finds of its part of the batch, cut into 1 to 8 micro-batches, against the mask of the whole."""
    if dist.get_rank() >= size:
        return []
    entropy, mask = make_batch(tokens, kind, dtype, seed)
    whole = global_top_mask(entropy, mask, ratio, rule=rule)
    generator = random.Random(seed)  # the same on every rank, down to its own part
    own = list(cut_up([entropy, mask, whole], size, generator))[dist.get_rank()]
    own_generator = random.Random(seed + dist.get_rank())
    micro_batches = list(cut_up(own, own_generator.randint(1, 8), own_generator))
    entropies, masks, expected = zip(*micro_batches, strict=True)
    found, metrics = selection.select_mini_batch(entropies, masks, ratio, rule, "global", GROUPS[size - 1])

    errors = [f"{a} is not {b}" for a, b in zip(found, expected, strict=True) if not torch.equal(a, b)]
    kept = entropy[whole & ~entropy.isnan()]
    lowest = kept.min().item() if len(kept) else math.inf if whole.any() else 0.0
    if metrics["actor/entropy_threshold"] != lowest:
        errors.append(f"threshold {metrics['actor/entropy_threshold']} is not {lowest}")
    return errors


@settings(deadline=None, max_examples=400)
@given(
    size=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 400),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    rule=st.sampled_from(selection.RULES),
    ratio=st.floats(0, 1, exclude_min=True),
)
def test_any_split_gives_the_mask_of_the_concatenated_batch(eight: Ranks, **case: Any) -> None:
    assert eight.run(differences, *case.values()) == [[]] * 8


@pytest.mark.parametrize("rule", selection.RULES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_large_batches(rule: str, dtype: torch.dtype, eight: Ranks) -> None:
    """Many keys to a digit in every round, and ties on all ranks."""
    for kind in ("random", "tied", "special"):
        assert eight.run(differences, 5, 7, 200_003, kind, dtype, rule, 0.2) == [[]] * 8


def quantile_of_neighbours(ratio: float) -> list[bool]:
    """Of adjacent numbers, where the quantile may round to either: three on rank 0, two on rank 1, one on rank 2."""
    steps = torch.arange(6, dtype=torch.float64)
    whole = torch.cat([1 + steps * 2.0**-52, steps * 5e-324 + 1e-300])
    mask = torch.ones_like(whole)
    expected = global_top_mask(whole, mask, ratio, rule="quantile")
    cut = [[0, 1, 2, 6], [3, 4, 7, 8, 9], [5, 10, 11]][min(dist.get_rank(), 2)]
    if dist.get_rank() > 2:
        return []
    found, _ = selection.select_tokens(whole[cut], mask[cut], ratio, "quantile", "global", GROUPS[2])
    return (found == expected[cut]).tolist()


def test_quantile_rounds_as_the_op_does(eight: Ranks) -> None:
    for ratio in torch.linspace(0.01, 1, 100, dtype=torch.float64).tolist():
        assert all(all(result) for result in eight.run(quantile_of_neighbours, ratio))


def test_quantile_rounds_the_product_before_the_sum() -> None:
    """The numbers of the test of the same name in tests/cpp: one rounding of the exact value would give the next."""
    low, high = selection._keys(torch.tensor([1.0, 1 + 3 * 2.0**-52], dtype=torch.float64))
    weight = torch.tensor(float.fromhex("0x1.5555555555556p-3"), dtype=torch.float64)
    assert selection._quantile_key(low, high, weight) == low


def errors_of_bad_input() -> list[str]:
    good = {"entropy": torch.zeros(2, 3), "response_mask": torch.ones(2, 3), "top_ratio": 0.2, "ranks": "global"}
    messages = []
    for bad in (
        {"response_mask": torch.ones(2, 4)},
        {"entropy": torch.zeros(2, 3, dtype=torch.int64)},
        {"top_ratio": 1.5},
        {"rule": "best"},
        {"ranks": "all"},
    ):
        try:
            selection.select_tokens(**(good | bad))
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_bad_input_is_named_before_anything_is_sent(eight: Ranks) -> None:
    for messages in eight.run(errors_of_bad_input):
        assert [message.split(";")[0] for message in messages] == [
            "response_mask has shape [2, 4]",
            "entropy is int64",
            "top_ratio is 1.5",
            "rule is 'best'",
            "ranks is 'all'",
        ]


def test_without_a_process_group_this_process_is_the_only_rank() -> None:
    entropy, mask = make_batch(100, "tied", torch.float32, 0)
    found, _ = selection.select_tokens(entropy, mask, 0.2, ranks="global")
    assert torch.equal(found, global_top_mask(entropy, mask, 0.2))


def payloads(tokens: int, dtype: torch.dtype, rule: str) -> list[tuple[str, int]]:
    """Every collective of torch.distributed that a selection makes, with the bytes it is given."""
    sent = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            attribute = getattr(dist, name)
            if not inspect.isfunction(attribute) or name in (
                "is_available",
                "is_initialized",
                "get_rank",
                "get_world_size",
            ):
                return attribute

            def call(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
                sent.append((name, tensor.nbytes))
                return attribute(tensor, *arguments, **named)

            return call

    selection.dist = Recorder()
    try:
        entropy, mask = make_batch(tokens, "tied", dtype, dist.get_rank())
        selection.select_tokens(entropy, mask, 0.2, rule, "global")
    finally:
        selection.dist = dist
    return sent


@pytest.mark.parametrize("tokens", [0, 100, 100_000])
@pytest.mark.parametrize("rule", selection.RULES)
def test_what_is_sent_does_not_depend_on_the_tokens(rule: str, tokens: int, eight: Ranks) -> None:
    """The bytes of docs/distributed.md."""
    of_rule = {"topk": [8 * 8], "threshold": [], "quantile": [4]}
    float32 = [16_384, 16_384, 8_192] + of_rule[rule]
    assert eight.run(payloads, tokens, torch.float32, rule) == [[("all_reduce", size) for size in float32]] * 8
    of_rule["quantile"] = [8]
    float64 = [16_384] * 5 + [4_096] + of_rule[rule]
    assert eight.run(payloads, tokens, torch.float64, rule) == [[("all_reduce", size) for size in float64]] * 8


@pytest.mark.parametrize("rule", selection.RULES)
def test_the_host_waits_for_nothing(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values: whatever would read one, or whose shape depends on one, fails."""
    for name, value in {"all_reduce": None, "get_rank": 3, "get_world_size": 8}.items():
        monkeypatch.setattr(selection.dist, name, lambda *_, value=value, **__: value)
    with FakeTensorMode():
        entropy, mask = torch.rand(4, 5), torch.ones(4, 5)
        with pytest.raises(DataDependentOutputException):
            entropy.sum().item()
        found, lowest = selection._select_over_ranks(entropy, mask, 0.2, rule, None)
    assert found.shape == (4, 5) and found.dtype == torch.bool and lowest.shape == ()


# ---- Scopes


def test_micro_batches_of_different_widths() -> None:
    """As when every micro-batch is padded to its own longest response."""
    entropies = [torch.rand(2, 5), torch.rand(3, 7), torch.rand(0, 4)]
    masks = [torch.ones_like(entropy) for entropy in entropies]
    masks[1][:, 4:] = 0
    found, metrics = selection.select_mini_batch(entropies, masks, 0.25)
    assert [mask.shape for mask in found] == [entropy.shape for entropy in entropies]
    kept = torch.cat([entropy[mask] for entropy, mask in zip(entropies, found, strict=True)])
    inside = torch.cat([entropy[mask != 0] for entropy, mask in zip(entropies, masks, strict=True)])
    assert kept.sort().values.equal(inside.topk(6).values.flip(0))
    assert metrics["actor/entropy_threshold"] == kept.min()
    with pytest.raises(ValueError, match="entropies is empty"):
        selection.select_mini_batch([], [], 0.2)


def test_a_prepass_leaves_no_trace() -> None:
    """The step draws the same dropout as without it, and sees the entropies that the prepass saw."""
    dropout, x = torch.nn.Dropout(0.5), torch.randn(3, 100, requires_grad=True)
    torch.manual_seed(0)
    expected = [dropout(x) for _ in range(3)]
    torch.manual_seed(0)
    with selection.prepass(x.device):
        seen = [dropout(x) for _ in range(3)]
    assert all(not output.requires_grad for output in seen)
    for wanted, before, after in zip(expected, seen, (dropout(x) for _ in range(3)), strict=True):
        assert torch.equal(wanted, before) and torch.equal(wanted, after)


@pytest.mark.parametrize("rule", selection.RULES)
def test_the_complement_is_all_other_response_tokens(rule: str) -> None:
    entropy = (8 * torch.rand(4, 50, generator=torch.Generator().manual_seed(0))).round()  # with ties
    mask = torch.arange(50) < torch.tensor([50, 0, 7, 31])[:, None]
    top, metrics = selection.select_tokens(entropy, mask, 0.2, rule)
    (rest,), of_rest = selection.select_mini_batch([entropy], [mask], 0.2, rule, complement=True)
    assert torch.equal(top ^ rest, mask) and not (top & rest).any()
    assert rest.any() and entropy[rest].max() <= metrics["actor/entropy_threshold"]
    assert of_rest == metrics, "the threshold between the two"
    if rule == "topk":
        assert rest.sum() == selection.top_k_count(mask.sum(), 0.2, complement=True)


@pytest.mark.parametrize("ratio", [0.2, 0.1, 1 / 3, 0.999, 1.0, 1e-6])
def test_top_k_count_is_what_topk_selects(ratio: float) -> None:
    tokens = torch.arange(0, 400)
    counts = selection.top_k_count(tokens, ratio)
    for n in range(0, 400, 7):
        entropy, mask = torch.rand(1, 400), torch.arange(400)[None] < n
        selected, _ = selection.select_tokens(entropy, mask, ratio, "topk")
        assert selected.sum() == counts[n]
        assert counts[n] == (max(1, int(n * ratio + 0.9999)) if n else 0)


def test_threshold_is_the_lowest_selected_entropy() -> None:
    entropy, mask = torch.tensor([[0.5, 2.0, 9.0], [1.0, 3.0, 0.1]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    selected, metrics = selection.select_tokens(entropy, mask, 0.4, "topk")
    assert selected.tolist() == [[False, True, False], [False, True, False]]
    assert metrics["actor/entropy_threshold"] == 2.0
    _, metrics = selection.select_tokens(entropy, torch.zeros_like(mask), 0.4, "topk")
    assert metrics["actor/entropy_threshold"] == 0.0


def test_divisors_of_topk_are_all_selected_tokens() -> None:
    generator = random.Random(0)
    sizes = torch.tensor([generator.randrange(1, 60) for _ in range(8)] + [0])
    counts = selection.top_k_count(sizes, 0.2)
    for size, count in zip(sizes, counts, strict=True):
        divisor = selection.token_divisor(count, count, counts.sum())
        assert divisor == (counts.sum() if size else 0)
