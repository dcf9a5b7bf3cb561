"""The selection of an optimizer step. The selection over ranks itself is tested in tests/ops."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from entropy_rl import selection
from entropy_rl.selection import StepSelection
from entropy_rl_ext import covariance_mask, global_top_mask, kl_loss, reference
from ranks import Ranks
from steps import SEED, configuration, make_batch, micro_batches, select


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


# ---- select_tokens


def test_ranks_is_a_process_group(four: Ranks) -> None:
    """ "local" is this process alone, and "global" the default group unless another one is given."""
    assert four.run(groups_of_ranks) == [[True] * 3] * 4
    assert selection.competing_group("global") is None, "without a process group, this process is the only rank"
    with pytest.raises(ValueError, match="ranks is 'all'; it must be one of 'local', 'global'"):
        selection.competing_group("all")


def groups_of_ranks() -> list[bool]:
    group = dist.new_group([0, 1, 2, 3])
    return [
        selection.competing_group("local", group) is None,
        selection.competing_group("global") is dist.group.WORLD,
        selection.competing_group("global", group) is group,
    ]


@pytest.mark.parametrize("rule", selection.RULES)
def test_the_complement_is_all_other_response_tokens(rule: str) -> None:
    entropy = (8 * torch.rand(4, 50, generator=torch.Generator().manual_seed(0))).round()  # with ties
    mask = torch.arange(50) < torch.tensor([50, 0, 7, 31])[:, None]
    top, threshold = selection.select_tokens(entropy, mask, 0.2, rule)
    rest, of_rest = selection.select_tokens(entropy, mask, 0.2, rule, complement=True)
    assert torch.equal(top ^ rest, mask) and not (top & rest).any()
    assert rest.any() and entropy[rest].max() <= threshold
    assert of_rest == threshold, "the threshold separates the two"


def test_threshold_is_the_lowest_selected_entropy() -> None:
    entropy, mask = torch.tensor([[0.5, 2.0, 9.0], [1.0, 3.0, 0.1]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    selected, threshold = selection.select_tokens(entropy, mask, 0.4, "topk")
    assert selected.tolist() == [[False, True, False], [False, True, False]]
    assert threshold == 2.0
    _, threshold = selection.select_tokens(entropy, torch.zeros_like(mask), 0.4, "topk")
    assert threshold == 0.0


@pytest.mark.parametrize("rule", selection.RULES)
def test_each_row_has_its_own_share(rule: str) -> None:
    """The rule applies to each row alone, and the threshold is the mean of the rows' over their tokens."""
    entropy = torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
    lengths = [50, 0, 7, 31]
    mask = torch.arange(50) < torch.tensor(lengths)[:, None]
    selected, threshold = selection.select_tokens(entropy, mask, 0.2, rule, per_sequence=True)
    thresholds = 0.0
    for row, length in enumerate(lengths):
        alone, lowest = selection.select_tokens(entropy[row], mask[row], 0.2, rule)
        assert torch.equal(selected[row], alone)
        thresholds += length * float(entropy[row][alone].min() if length else lowest)
    assert threshold == pytest.approx(thresholds / sum(lengths))


# ---- prepass


def test_a_prepass_restores_random_numbers() -> None:
    """The step draws the same dropout as without the prepass, and the prepass draws the same as the step."""
    dropout, x = torch.nn.Dropout(0.5), torch.randn(3, 100, requires_grad=True)
    torch.manual_seed(0)
    expected = [dropout(x) for _ in range(3)]
    torch.manual_seed(0)
    with selection.prepass(x.device):
        seen = [dropout(x) for _ in range(3)]
    assert all(not output.requires_grad for output in seen)
    for wanted, before, after in zip(expected, seen, (dropout(x) for _ in range(3)), strict=True):
        assert torch.equal(wanted, before) and torch.equal(wanted, after)


# ---- StepSelection


def selected_weight(seed: int, **changes: Any) -> float:
    """The weights that this rank's selected tokens have in the mean, added up."""
    batch, total = make_batch(seed + dist.get_rank() if dist.is_initialized() else seed), 0.0
    step, tokens = select(configuration(**changes), batch, 2)
    for number, (part, selected) in enumerate(zip(micro_batches(batch, 2), tokens, strict=True)):
        if selected is None:
            mask = step.select(part["entropy"], part["response_mask"])[0]
            scored = [part[name] for name in ("log_prob", "entropy", "advantages", "response_mask")]
            selected = step.weigh(mask, *scored)
        weights = selected.weights()
        divisor = step.divisor(number, weights)
        total += float(weights.sum() / divisor) if divisor else 0.0
    return total


FUNCTIONS = Path(__file__).with_name("training.py")
WEIGHTS = [
    {"entropy_rest": {"weight": 0.1}},
    {"entropy_rest": {"weight": 1.0}, "entropy_veto": {"probability": 0.5, "entropy": 0.6}},
    {"token_weight": f"{FUNCTIONS}:entropy_weight", "entropy_rest": {"weight": 0.5}, "rule": "threshold"},
]

ALL = [
    dict(zip(("scope", "ranks", "rule", "complement"), values, strict=True))
    for values in itertools.product(selection.SCOPES, selection.RANKS, selection.RULES, (False, True))
    if values[:2] != ("sequence", "global")
]


ALL += [
    weights | dict(zip(("scope", "ranks"), values, strict=True))
    for weights in WEIGHTS
    for values in itertools.product(selection.SCOPES, selection.RANKS)
    if values != ("sequence", "global")
]


@pytest.mark.parametrize("changes", ALL, ids=str)
def test_the_weights_of_the_selected_tokens_add_up_to_one(changes: dict[str, Any], four: Ranks) -> None:
    assert selected_weight(0, **changes) == pytest.approx(1)
    assert sum(four.run(weight_of_rank, changes)) == pytest.approx(1)


def weight_of_rank(changes: dict[str, Any]) -> float:
    return selected_weight(0, **changes)


def equal_divisors(scope: str, rule: str) -> list[float]:
    """The distinct divisors of this rank's micro-batches, and the selected tokens of all ranks."""
    batch = make_batch(dist.get_rank())
    step, tokens = select(configuration(scope=scope, rule=rule, ranks="local"), batch, 1)
    divisors, count = set(), torch.zeros(())
    for number, (part, selected) in enumerate(zip(micro_batches(batch, 1), tokens, strict=True)):
        mask = step.select(part["entropy"], part["response_mask"])[0] if selected is None else selected.mask
        divisors.add(float(step.divisor(number, mask)))
        count += mask.sum()
    dist.all_reduce(count)
    return [*divisors, float(count)]


@pytest.mark.parametrize(
    ("scope", "rule"), [("micro_batch", "topk"), *itertools.product(("mini_batch", "sequence"), selection.RULES)]
)
def test_the_divisor_is_the_number_of_selected_tokens_of_all_ranks(scope: str, rule: str, four: Ranks) -> None:
    """Under topk, and under every rule if the selection is made before the step."""
    for divisor, count in four.run(equal_divisors, scope, rule):
        assert divisor == count > 0


def test_the_divisor_may_span_several_steps() -> None:
    """As in TRL, where num_items_in_batch spans all that was generated at once."""
    tokens = torch.tensor([10, 7, 0, 12])
    step = StepSelection(configuration())
    step.count_tokens(tokens, micro_batches_per_step=2)
    counts = [max(1, int(n * 0.3 + 0.9999)) for n in (17, 12)]
    assert step.divisor(3, torch.ones(())) == sum(counts)
    assert [int(step.competing_tokens(number)) for number in range(4)] == [17, 17, 12, 12]


@pytest.mark.parametrize("size", [1, 2, 6])
def test_a_mini_batch_selects_the_same_tokens_however_it_is_split(size: int) -> None:
    batch = make_batch()
    step, tokens = select(configuration(loss_mode="kl_cov"), batch, size)
    found = torch.cat([part.mask for part in tokens])
    expected = global_top_mask(batch["entropy"], batch["response_mask"], 0.3)
    assert torch.equal(found, expected) and step.weight == expected.sum()
    names = ("log_prob", "old_log_prob", "advantages", "response_mask")
    chosen = covariance_mask(*(batch[name] for name in names), "kl_cov", kl_cov_ratio=0.2)
    assert torch.equal(torch.cat([part.covariance_mask for part in tokens]), chosen)


@pytest.mark.parametrize("changes", [{}, {"scope": "sequence", "ranks": "local"}, *WEIGHTS], ids=str)
def test_loss_and_metrics_do_not_depend_on_the_split(changes: dict[str, Any]) -> None:
    batch, results = make_batch(), []
    for size in (1, 2, 6):
        step, tokens = select(configuration(**changes), batch, size)
        sums: dict[str, float] = {"loss": 0.0}
        for number, (part, selected) in enumerate(zip(micro_batches(batch, size), tokens, strict=True)):
            loss, metrics = step.policy_loss(number, **part, tokens=selected, batch_num_tokens=step.response_tokens)
            for name, value in ({"loss": loss} | metrics).items():
                sums[name] = sums.get(name, 0.0) + value.item()
        results.append(sums | {name: value.item() for name, value in step.extreme_shares().items()})
    assert results[0]["actor/entropy_threshold"] > 0 and results[0]["loss"] != 0
    for sums in results[1:]:
        assert sums == pytest.approx(results[0], rel=1e-5, abs=1e-6)


def shares(scope: str) -> list[float]:
    """The metrics of a step in micro-batches of one row; then the shares of this rank's responses, by counting."""
    batch, found = make_batch(dist.get_rank()), []
    step, tokens = select(configuration(scope=scope, ranks="local"), batch, 1)
    for number, (part, selected) in enumerate(zip(micro_batches(batch, 1), tokens, strict=True)):
        step.policy_loss(number, **part, tokens=selected)
        n = int(part["response_mask"].sum())
        if n:
            mask = step.select(part["entropy"], part["response_mask"])[0] if selected is None else selected.mask
            found.append(int(mask.sum()) / n)
    metrics = step.extreme_shares()
    assert list(metrics) == ["actor/entropy_token_ratio/min", "actor/entropy_token_ratio/max"]
    return [*(value.item() for value in metrics.values()), *found]


@pytest.mark.parametrize("scope", selection.SCOPES)
def test_the_extreme_shares_of_a_response_cover_all_ranks(scope: str, four: Ranks) -> None:
    of_ranks = four.run(shares, scope)
    expected = [extreme(share for _, _, *found in of_ranks for share in found) for extreme in (min, max)]
    assert expected[0] < expected[1]
    for lowest, highest, *_ in of_ranks:
        assert [lowest, highest] == pytest.approx(expected)


def test_without_responses_the_extreme_shares_are_zero() -> None:
    step, mask = StepSelection(configuration()), torch.zeros(2, 3, dtype=torch.bool)
    assert step.extreme_shares() == {}
    step.note_shares(mask, mask)
    assert [value.item() for value in step.extreme_shares().values()] == [0, 0]


def random_masks(scope: str, size: int, rows: int) -> list[bool]:
    """The tokens of `rows` rows of this rank's share that the score random selects, response by response."""
    whole = make_batch(rows=8)
    begin = dist.get_rank() * rows if dist.is_initialized() else 0
    batch = {name: value[begin : begin + rows] for name, value in whole.items()}
    ranks = "local" if scope == "sequence" else "global"
    step, tokens = select(configuration(scope=scope, ranks=ranks, score="random"), batch, size)
    masks = []
    for number, (part, selected) in enumerate(zip(micro_batches(batch, size), tokens, strict=True)):
        if selected is None:
            drawn = step.score(number, *(part[name] for name in ("log_prob", "entropy", "advantages", "response_mask")))
            masks.append(drawn > 0.7)  # the competing tokens depend on the split, the random numbers do not
        else:
            masks.append(selected.mask)
        masks[-1] = masks[-1] & part["response_mask"]
    return torch.cat(masks).tolist()


@pytest.mark.parametrize("scope", selection.SCOPES)
def test_random_numbers_do_not_depend_on_the_split(scope: str, four: Ranks) -> None:
    expected = random_masks(scope, 8, 8)
    assert 0.2 < torch.tensor(expected)[make_batch(rows=8)["response_mask"]].float().mean() < 0.45
    assert random_masks(scope, 2, 8) == expected
    for size in (2, 1):
        assert [mask for masks in four.run(random_masks, scope, size, 2) for mask in masks] == expected


@pytest.mark.parametrize("scope", selection.SCOPES)
def test_surprisal_selects_the_least_probable_tokens(scope: str) -> None:
    batch = make_batch()
    step, (tokens,) = select(configuration(scope=scope, ranks="local", score="surprisal"), batch, 6)
    _, metrics = step.policy_loss(0, **batch, tokens=tokens)
    name = "sequence" if scope == "sequence" else "batch"
    mask = global_top_mask(-batch["log_prob"], batch["response_mask"], 0.3, scope=name)
    entropies = global_top_mask(batch["entropy"], batch["response_mask"], 0.3, scope=name)
    assert not torch.equal(mask, entropies)
    assert tokens is None or torch.equal(tokens.mask, mask)
    assert metrics["actor/entropy_token_ratio"] == pytest.approx(float(mask.sum() / batch["response_mask"].sum()))
    assert "actor/entropy_threshold" not in metrics
    if scope != "sequence":
        torch.testing.assert_close(metrics["actor/score_threshold"], -batch["log_prob"][mask].max())


def test_unselected_tokens_that_did_not_meet_the_lm_head() -> None:
    """Their log-probabilities before the step enter the metrics. Under old_policy they say nothing about how far the
    policy has moved: the metrics of that cover the selected tokens only, and their names say so."""
    batch = make_batch()
    step = StepSelection(configuration(source="old_policy"))
    step.count_tokens(batch["response_mask"].sum()[None])
    before = batch | {"log_prob": batch["old_log_prob"]}
    tokens = step.select_mini_batch(**before, only_selected=True)
    batch["log_prob"] = torch.where(tokens.mask, batch["log_prob"], math.nan)
    _, metrics = step.policy_loss(0, **batch, tokens=tokens)
    assert not {"actor/ppo_kl", "actor/pg_clipfrac"} & metrics.keys()
    moved = (batch["old_log_prob"] - batch["log_prob"])[tokens.mask]
    torch.testing.assert_close(metrics["actor/ppo_kl_selected"], moved.mean())
    assert metrics["actor/entropy_token_ratio"] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: "-".join(weights))
@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("normalize", ["selected", "response"])
@pytest.mark.parametrize("scope", selection.SCOPES)
def test_a_weighted_mean(weights: dict[str, Any], agg: str, normalize: str, scope: str) -> None:
    """The loss is the mean of the tokens' losses with their weights. Rollout weights do not enter the divisor."""
    batch = {name: value.double() if value.is_floating_point() else value for name, value in make_batch().items()}
    step, (tokens,) = select(configuration(scope=scope, ranks="local", normalize=normalize, **weights), batch, 6)
    rollout = 0.5 + torch.rand(6, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inside = batch["response_mask"]
    options = {"batch_num_tokens": inside.sum(), "global_batch_size": 6, "loss_agg_mode": agg}
    found, metrics = step.policy_loss(0, **batch, tokens=tokens, rollout_is_weights=rollout, **options)

    selected = step.select(batch["entropy"], inside)[0]
    weight = torch.where(selected, 1.0, weights.get("entropy_rest", {"weight": 0.0})["weight"]).double() * inside
    if "token_weight" in weights:
        weight = weight * (batch["entropy"] - 0.2).clamp(min=0)
    if "entropy_veto" in weights:
        vetoed = inside & (batch["advantages"] > 0) & (batch["log_prob"].exp() < 0.5) & (batch["entropy"] < 0.6)
        assert 0 < vetoed.sum() < inside.sum() / 4
        torch.testing.assert_close(metrics["actor/entropy_veto_ratio"], vetoed.sum() / inside.sum())
        weight = torch.where(vetoed, 0.0, weight)
    ratio, advantage = (batch["log_prob"] - batch["old_log_prob"]).exp(), batch["advantages"]
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    loss = torch.where(advantage < 0, torch.minimum(loss, -3 * advantage), loss) * weight * rollout
    divisor = weight if normalize == "selected" else inside.double()
    match agg:
        case "token-mean":
            expected = loss.sum() / divisor.sum()
        case "seq-mean-token-sum":
            expected = loss.sum() / 6
        case _:
            expected = (loss.sum(1) / divisor.sum(1).clamp(min=1e-300)).sum() / 6
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)  # a row's mean adds 1e-8 to its number of tokens
    torch.testing.assert_close(metrics["actor/entropy_token_ratio"], selected.sum() / inside.sum())


def test_without_a_ratio_all_tokens_train() -> None:
    batch = make_batch()
    step = StepSelection(configuration(ratio=None))
    step.count_tokens(batch["response_mask"].sum()[None])
    _, metrics = step.policy_loss(0, **batch, batch_num_tokens=step.response_tokens)
    assert not step.before_step and not {"actor/entropy_token_ratio", "actor/entropy_threshold"} & metrics.keys()


@pytest.mark.parametrize("scope", selection.SCOPES)
@pytest.mark.parametrize("rule", selection.RULES)
@pytest.mark.parametrize("loss_mode", ["vanilla", *selection.COVARIANCE_MODES])
def test_the_host_waits_for_nothing(loss_mode: str, rule: str, scope: str) -> None:
    """On tensors without values: reading a value, or a shape that depends on one, raises."""
    with FakeTensorMode():
        batch = dict.fromkeys(make_batch(), torch.rand(6, 20))
        with pytest.raises(DataDependentOutputException):
            batch["entropy"].sum().item()
        config = configuration(rule=rule, scope=scope, ranks="local", loss_mode=loss_mode)
        step, tokens = select(config, batch, 2)
        for number, (part, selected) in enumerate(zip(micro_batches(batch, 2), tokens, strict=True)):
            loss, _ = step.policy_loss(number, **part, tokens=selected)
        step.extreme_shares()
    assert loss.shape == ()


def test_the_options_are_documented() -> None:
    """One text for each entropy_top_* key of the configuration."""
    documented = {key.removeprefix("entropy_top_") for key in selection.OPTIONS}
    rest = {f"entropy_rest.{name}" for name in ("weight", "clip_ratio_low", "clip_ratio_high", "kl_loss_coef")}
    assert documented == rest | {
        "entropy_veto.probability",
        "entropy_veto.entropy",
        "token_weight",
        "ratio",
        "score",
        "rule",
        "scope",
        "source",
        "ranks",
        "normalize",
        "complement",
    }


# ---- The clip range and the KL coefficient of the other tokens

CLIPPED_MODES = ["vanilla", "clip_cov", "dppo_tv", "dppo_kl", "cispo"]


@pytest.mark.parametrize("loss_mode", CLIPPED_MODES)
@pytest.mark.parametrize("scope", selection.SCOPES)
def test_the_other_tokens_have_their_own_clip_range(loss_mode: str, scope: str) -> None:
    """The loss is that of the two kinds of tokens, each with its own numbers; one key alone changes one end."""
    batch = {name: value.double() if value.is_floating_point() else value for name, value in make_batch().items()}
    inside, rest = batch["response_mask"], {"weight": 1.0, "clip_ratio_low": 0.05, "clip_ratio_high": 0.4}
    keys = {"scope": scope, "ranks": "local", "loss_mode": loss_mode}
    for own in (rest, rest | {"clip_ratio_low": None}, rest | {"clip_ratio_high": None}):
        step, (tokens,) = select(configuration(**keys, entropy_rest=own), batch, 6)
        options = {"batch_num_tokens": inside.sum(), "seed": 3}
        loss, _ = step.policy_loss(0, **batch, tokens=tokens, **options)
        chosen, arguments = step.chosen, {name: value for name, value in batch.items() if name != "entropy"}
        assert 0 < chosen.sum() < inside.sum()
        numbers = {name: 0.2 if own[name] is None else own[name] for name in ("clip_ratio_low", "clip_ratio_high")}
        ratios = {
            name: torch.full_like(batch["entropy"], number).masked_fill(chosen, 0.2) for name, number in numbers.items()
        }
        cov = {"clip_cov_ratio": 0.2, "clip_cov_lb": -0.5, "clip_cov_ub": 1.5}
        if loss_mode == "clip_cov" and tokens is not None:
            cov["covariance_mask"] = covariance_mask(**arguments, loss_mode=loss_mode, seed=SEED, **cov, **ratios)
        cov = cov if loss_mode == "clip_cov" else {}
        expected, _ = reference.policy_loss(**arguments, loss_mode=loss_mode, seed=3, **ratios, **cov)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_the_other_tokens_have_their_own_kl_coefficient(agg: str) -> None:
    """Every response token has a share of the mean as large as before, times its coefficient; 0 is a coefficient."""
    batch = {name: value.double() if value.is_floating_point() else value for name, value in make_batch().items()}
    inside, ref = batch["response_mask"], batch["old_log_prob"] - 0.3
    aggregation = {"batch_num_tokens": inside.sum(), "global_batch_size": 6, "loss_agg_mode": agg}
    whole = kl_loss(batch["log_prob"], ref, inside, **aggregation)
    for rest, complement in ((0.3, False), (0.0, False), (0.3, True)):
        config = configuration(use_kl_loss=True, kl_loss_coef=0.1, entropy_rest={"weight": 0.0, "kl_loss_coef": rest})
        config.entropy_top_complement = complement
        step, (tokens,) = select(config, batch, 6)
        step.policy_loss(0, **batch, tokens=tokens, **aggregation)
        term, penalty = step.kl_loss(batch["log_prob"], ref, inside, **aggregation)
        assert torch.equal(penalty, whole)
        kl = (ref - batch["log_prob"]).exp() - (ref - batch["log_prob"]) - 1
        losses = torch.where(inside, kl * torch.where(tokens.chosen(), 0.1, rest), 0.0)
        rows = losses.sum(-1)
        if agg == "token-mean":
            expected = losses.sum() / inside.sum()
        else:
            expected = (rows / inside.sum(-1).clamp(min=1) if agg == "seq-mean-token-mean" else rows).sum() / 6
        torch.testing.assert_close(term, expected, rtol=1e-7, atol=0)  # 1e-8 in verl's divisor of a row
    step, (tokens,) = select(configuration(use_kl_loss=True, kl_loss_coef=0.1), batch, 6)
    step.policy_loss(0, **batch, tokens=tokens, **aggregation)
    assert torch.equal(step.kl_loss(batch["log_prob"], ref, inside, **aggregation)[0], 0.1 * whole)


REST = "entropy_rest"


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"ratio": None, REST: {"kl_loss_coef": 0.0}}, "kl_loss_coef", "it needs entropy_top_ratio, which is null"),
        ({"ratio": None, REST: {"clip_ratio_low": 0.0}}, "clip_ratio_low", "it needs entropy_top_ratio"),
        (
            {REST: {"weight": 0.0, "clip_ratio_high": 0.3}},
            "clip_ratio_high",
            "entropy_rest.weight is 0, so those tokens",
        ),
        ({REST: {"clip_ratio_low": 0.3}}, "clip_ratio_low", "entropy_rest.weight is 0, so those tokens"),
        ({REST: {"kl_loss_coef": 0.0}}, "kl_loss_coef", "it needs use_kl_loss, which is false"),
        *(
            (
                {"loss_mode": mode, REST: {"weight": 1.0, "clip_ratio_low": 0.1}},
                "clip_ratio_low",
                f"loss_mode {mode} does",
            )
            for mode in selection.UNCLIPPED_MODES
        ),
        *(
            (
                {"loss_mode": mode, "use_kl_loss": True, REST: {"kl_loss_coef": 0.1}},
                "kl_loss_coef",
                f"loss_mode {mode} has",
            )
            for mode in selection.SEQUENCE_MODES
        ),
    ],
    ids=str,
)
def test_ranges_of_the_other_tokens_that_make_no_sense(changes: dict[str, Any], key: str, reason: str) -> None:
    found = selection.contradiction(configuration(**changes))
    assert found is not None and found.key == f"{REST}.{key}" and found.value == changes[REST][key]
    assert found.reason.startswith(reason)


def test_every_loss_mode_clips_or_does_not() -> None:
    assert {*CLIPPED_MODES, *selection.UNCLIPPED_MODES, *selection.SEQUENCE_MODES} == set(reference._LOSS_MODES)
