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
from entropy_rl_ext import global_top_mask, policy_loss
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
    """Every collective of torch.distributed that a selection, or with a loss mode its own choice, makes, with the bytes
    that it is given."""
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
        if rule in selection.COVARIANCE_MODES:
            selection.select_by_covariance(*make_steps(tokens, dist.get_rank(), True, dtype), rule, "global")
        else:
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


def test_what_a_choice_by_covariance_sends(eight: Ranks) -> None:
    """Counts and sums; then a selection from covariances, or from random numbers of 64 bits."""
    first, float32, float64 = [9 * 8, 2 * 8], [16_384, 16_384, 8_192, 8 * 8], [*[16_384] * 5, 4_096, 8 * 8]
    for mode, sizes in {"kl_cov": first + float32, "clip_cov": first + float64}.items():
        assert eight.run(payloads, 100, torch.float32, mode) == [[("all_reduce", size) for size in sizes]] * 8


@pytest.mark.parametrize("rule", selection.RULES)
def test_the_host_waits_for_nothing(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values: whatever would read one, or whose shape depends on one, fails."""
    for name, value in {"all_reduce": None, "get_rank": 3, "get_world_size": 8, "is_initialized": True}.items():
        monkeypatch.setattr(selection.dist, name, lambda *_, value=value, **__: value)
    with FakeTensorMode():
        entropy, mask = torch.rand(4, 5), torch.ones(4, 5)
        with pytest.raises(DataDependentOutputException):
            entropy.sum().item()
        found, metrics = selection.select_tokens(entropy, mask, 0.2, rule, "global")
    assert found.shape == (4, 5) and found.dtype == torch.bool
    assert metrics["actor/entropy_threshold"].shape == ()


@pytest.mark.parametrize("mode", selection.COVARIANCE_MODES)
def test_the_host_waits_for_no_choice_by_covariance(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"all_reduce": None, "get_rank": 3, "get_world_size": 8, "is_initialized": True}.items():
        monkeypatch.setattr(selection.dist, name, lambda *_, value=value, **__: value)
    with FakeTensorMode():
        chosen = selection.select_by_covariance(*(torch.ones(4, 5) for _ in range(4)), mode, "global")
    assert chosen.shape == (4, 5) and chosen.dtype == torch.bool


# ---- Choice by covariance

# Both choose a third of the tokens, of clip_cov as far as so many are eligible.
COVARIANCE: dict[str, dict[str, float]] = {
    "clip_cov": {"clip_cov_ratio": 1 / 3, "clip_cov_lb": -0.5, "clip_cov_ub": 1.5},
    "kl_cov": {"kl_cov_ratio": 1 / 3},
}


def make_steps(tokens: int, seed: int, tied: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """log_prob, old_log_prob, advantages and response_mask of the concatenated batch, flat; NaN outside the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, generator=generator) < 0.8
    log_prob, noise, advantage = torch.randn(3, tokens, dtype=torch.float64, generator=generator)
    log_prob, noise = -log_prob.abs(), 0.3 * noise
    if tied:
        log_prob, noise, advantage = log_prob.round(), noise.round(), advantage.sign()
    values = [log_prob, log_prob + noise, advantage]
    return [*(torch.where(mask, value, math.nan).to(dtype) for value in values), mask]


def differences_by_covariance(size: int, seed: int, tokens: int, tied: bool, dtype: torch.dtype, mode: str) -> Any:
    """What a rank finds of its part of the batch against the choice from the whole."""
    if dist.get_rank() >= size:
        return []
    batch = make_steps(tokens, seed, tied, dtype)
    whole = selection.select_by_covariance(*batch, mode, seed=seed, **COVARIANCE[mode])
    own = list(cut_up([*batch, whole], size, random.Random(seed)))[dist.get_rank()]
    # The seed of a rank that is not the first does not count.
    found = selection.select_by_covariance(
        *own[:4], mode, "global", GROUPS[size - 1], seed=seed + dist.get_rank(), **COVARIANCE[mode]
    )
    return (found != own[4]).nonzero().tolist()


@settings(deadline=None, max_examples=150)
@given(
    size=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 400),
    tied=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(selection.COVARIANCE_MODES),
)
def test_any_split_gives_the_choice_of_the_concatenated_batch(eight: Ranks, **case: Any) -> None:
    assert eight.run(differences_by_covariance, *case.values()) == [[]] * 8


def covariance_and_eligible(batch: list[Tensor], lower: float, upper: float) -> tuple[Tensor, Tensor]:
    """In float64: each token's covariance, and whether clip_cov may draw it at a clip ratio of 0.2."""
    log_prob, old, advantage, mask = (value.double() for value in batch)
    inside = mask != 0
    covariance = (advantage - advantage[inside].mean()) * (log_prob - log_prob[inside].mean())
    ratio = (log_prob - old).exp()
    clipped = torch.where(advantage > 0, ratio > 1.2, ratio < 0.8)
    return covariance, inside & ~clipped & (covariance > lower) & (covariance < upper)


def test_kl_cov_takes_the_largest_covariances() -> None:
    batch = make_steps(1000, 1, tied=False)
    covariance, _ = covariance_and_eligible(batch, 0, 0)
    n = int(batch[3].sum())
    chosen = selection.select_by_covariance(*batch, "kl_cov", kl_cov_ratio=0.1)
    assert chosen.sum() == int(0.1 * n)
    assert covariance[chosen].min() > covariance[batch[3] & ~chosen].max()
    assert selection.select_by_covariance(*batch, "kl_cov", kl_cov_ratio=1e-9).sum() == 1


def test_clip_cov_draws_every_eligible_token_equally_often() -> None:
    batch = make_steps(120, 2, tied=False)
    _, eligible = covariance_and_eligible(batch, 0.0, 1.0)
    count, k, draws = int(eligible.sum()), int(0.1 * int(batch[3].sum())), 2000
    assert count > 2 * k > 10
    often = torch.zeros(120)
    for seed in range(draws):
        options = {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.0, "clip_cov_ub": 1.0, "seed": seed}
        drawn = selection.select_by_covariance(*batch, "clip_cov", **options)
        assert drawn.sum() == k and not (drawn & ~eligible).any()
        often += drawn
    p = k / count
    assert ((often[eligible] / draws - p).abs() < 5 * math.sqrt(p * (1 - p) / draws)).all()


@pytest.mark.parametrize("mode", selection.COVARIANCE_MODES)
def test_the_choice_is_the_ops_own_where_chance_has_no_part(mode: str) -> None:
    """Loss and metrics to the bit; clip_cov draws all eligible tokens."""
    batch = [value.view(10, 100) for value in make_steps(1000, 3, tied=False)]
    options = COVARIANCE[mode] | ({"clip_cov_ratio": 1.0} if mode == "clip_cov" else {})
    chosen = selection.select_by_covariance(*batch, mode, **options)
    assert chosen.shape == (10, 100) and 0 < chosen.sum() < batch[3].sum()
    loss, metrics = policy_loss(*batch, loss_mode=mode, covariance_mask=chosen, **options)
    expected, expected_metrics = policy_loss(*batch, loss_mode=mode, **options)
    assert torch.equal(loss, expected) and metrics == expected_metrics


@pytest.mark.parametrize("mode", selection.COVARIANCE_MODES)
def test_nothing_to_choose_from(mode: str) -> None:
    for shape in ((0,), (3, 0), (2, 5)):
        log_prob = torch.full(shape, math.nan)
        chosen = selection.select_by_covariance(log_prob, log_prob, log_prob, torch.zeros(shape), mode)
        assert chosen.shape == shape and not chosen.any()
    one = torch.ones(1, 1)
    assert selection.select_by_covariance(one, one, one, one, mode).sum() == (mode == "kl_cov")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mode": "vanilla"}, "loss_mode is 'vanilla'; it must be one of 'clip_cov', 'kl_cov'"),
        ({"old_log_prob": torch.ones(3)}, r"old_log_prob has shape \[3\]; it must be \[2, 3\], that of log_prob"),
        ({"advantages": torch.ones(2, 2)}, r"advantages has shape \[2, 2\]"),
        ({"response_mask": torch.ones(2)}, r"response_mask has shape \[2\]"),
        ({"log_prob": torch.ones(2, 3, dtype=torch.int64)}, "log_prob is int64"),
        ({"ranks": "all"}, "ranks is 'all'; it must be one of 'local', 'global'"),
        ({"clip_cov_lb": 6.0}, "clip_cov_lb is 6; it must be below clip_cov_ub, 5"),
        ({"clip_cov_ratio": 0.0}, "clip_cov_ratio is 0"),
        ({"loss_mode": "kl_cov", "kl_cov_ratio": 2.0}, "kl_cov_ratio is 2"),
        ({"clip_ratio": -1.0}, "clip_ratio_low is -1"),
    ],
    ids=str,
)
def test_bad_options_of_the_choice_by_covariance(change: dict[str, Any], message: str) -> None:
    names = ("log_prob", "old_log_prob", "advantages", "response_mask")
    good = dict.fromkeys(names, torch.ones(2, 3)) | {"loss_mode": "clip_cov"}
    with pytest.raises(ValueError, match=message):
        selection.select_by_covariance(**(good | change))


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
