"""Loss, gradient and metrics of policy_loss, kl_loss and aggregate equal those of verl 0.9.1's functions."""

import itertools
import math
import warnings

import pytest
import torch
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig, PolicyLossConfig

from entropy_rl_ext import aggregate, kl_loss, policy_loss

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
AGGREGATIONS = [
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
]
# The batch by itself, and as one of several micro-batches on one of two ranks.
BATCHES = [{}, {"dp_size": 2, "batch_num_tokens": 700, "global_batch_size": 12, "loss_scale_factor": 50}]
KL_TYPES = [name + plus for name in ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3") for plus in ("", "+")]

# With these numbers the batch below takes every branch of every loss.
ACTOR = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5, "tau_pos": 1.1, "tau_neg": 1.3}
LOSS = {
    "clip_cov_ratio": 1.0,  # draws every eligible token, so that both draw the same
    "clip_cov_lb": -0.5,
    "clip_cov_ub": 1.0,
    "kl_cov_ratio": 0.2,
    "ppo_kl_coef": 0.7,
    "dro_beta": 0.3,
}

# verl adds 1e-8 to counts: a relative error of 1e-8 for a count of one, which float32 rounds away.
TOLERANCES = {torch.float64: {"rtol": 2e-8, "atol": 2e-8}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="entropy_mask is not applied")
        yield


def make_batch(dtype, rows=6, tokens=40):
    """A batch with a row without response tokens and a row without selected tokens."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low, high):
        values = torch.rand(rows, tokens, generator=generator, dtype=torch.float64)
        return (values * (high - low) + low).to(dtype)

    log_prob = uniform(-3, 0)
    response = torch.rand(rows, tokens, generator=generator) < 0.8
    entropy = torch.rand(rows, tokens, generator=generator) < 0.3
    response[1], entropy[2] = False, False
    tensors = {
        "log_prob": log_prob,
        "old_log_prob": (log_prob + uniform(-1, 1)).clamp(max=0),
        "advantages": uniform(-2, 2),
        "response_mask": response,
    }
    return tensors, entropy, uniform(0.2, 2)


def verl_loss(tensors, mode, *, monkeypatch, weights, aggregation, batch, entropy=None, numbers=LOSS):
    """verl's loss, with the entropy mask multiplied into the response mask at the aggregation."""
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode=mode, **numbers),
        global_batch_info=batch,
        **ACTOR,
    )
    with monkeypatch.context() as patch:
        if entropy is not None and mode not in ("gspo", "geo_mean"):
            whole = core_algos.agg_loss

            def selected(loss_mat, loss_mask, **options):
                return whole(loss_mat=loss_mat, loss_mask=loss_mask & entropy, **options)

            patch.setattr(core_algos, "agg_loss", selected)
        return core_algos.get_policy_loss_fn(mode)(
            **tensors, loss_agg_mode=aggregation, config=config, rollout_is_weights=weights
        )


def with_gradient(function, log_prob):
    log_prob = log_prob.clone().requires_grad_()
    loss, metrics = function(log_prob)
    return loss.detach(), metrics, torch.autograd.grad(loss, log_prob)[0]


def assert_equal_to_verl(actual, expected, dtype):
    tolerance = TOLERANCES[dtype]
    assert actual[0].dtype == dtype
    torch.testing.assert_close(actual[0], expected[0].to(dtype), **tolerance)
    torch.testing.assert_close(actual[2], expected[2], **tolerance)
    ours = {name: value.item() for name, value in actual[1].items() if name != "actor/entropy_token_ratio"}
    # verl averages clip fractions in float32 for every dtype.
    assert ours == pytest.approx(expected[1], rel=max(2**-23, tolerance["rtol"]), abs=max(2**-23, tolerance["atol"]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_policy_loss(monkeypatch, mode, aggregation, dtype):
    tensors, entropy_mask, is_weights = make_batch(dtype)
    log_prob = tensors.pop("log_prob")
    for batch, entropy, weights in itertools.product(BATCHES, (None, entropy_mask), (None, is_weights)):
        actual = with_gradient(
            lambda x, batch=batch, entropy=entropy, weights=weights: policy_loss(
                x,
                **tensors,
                loss_mode=mode,
                entropy_mask=entropy,
                rollout_is_weights=weights,
                loss_agg_mode=aggregation,
                **ACTOR,
                **LOSS,
                **batch,
            ),
            log_prob,
        )
        options = {"weights": weights, "aggregation": aggregation, "batch": batch, "entropy": entropy}
        expected = with_gradient(
            lambda x, options=options: verl_loss({"log_prob": x, **tensors}, mode, monkeypatch=monkeypatch, **options),
            log_prob,
        )
        assert_equal_to_verl(actual, expected, dtype)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("clip_cov", "kl_cov", "gspo", "geo_mean")])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_entropy_mask_equals_the_product_mask_in_verl(monkeypatch, mode, aggregation):
    """If the loss uses no batch statistic, masking at the aggregation equals masking everywhere."""
    tensors, entropy, _ = make_batch(torch.float64)
    loss, _ = policy_loss(**tensors, loss_mode=mode, entropy_mask=entropy, loss_agg_mode=aggregation, **ACTOR, **LOSS)
    tensors["response_mask"] = tensors["response_mask"] & entropy
    expected, _ = verl_loss(tensors, mode, monkeypatch=monkeypatch, weights=None, aggregation=aggregation, batch={})
    torch.testing.assert_close(loss, expected, **TOLERANCES[torch.float64])


def test_normalize_response_equals_verls_count_of_response_tokens(monkeypatch):
    tensors, entropy, _ = make_batch(torch.float64)
    loss, _ = policy_loss(**tensors, entropy_mask=entropy, normalize="response", **ACTOR, **LOSS)
    batch = {"batch_num_tokens": tensors["response_mask"].sum()}
    expected, _ = verl_loss(
        tensors,
        "vanilla",
        monkeypatch=monkeypatch,
        weights=None,
        aggregation="token-mean",
        batch=batch,
        entropy=entropy,
    )
    torch.testing.assert_close(loss, expected, **TOLERANCES[torch.float64])


@pytest.mark.parametrize("ratio", [1e-6, 0.05, 0.2, 0.6])
def test_clip_cov_draws_as_many_of_the_same_tokens(monkeypatch, ratio):
    """The draws differ, but their number and the tokens that they draw from are the same."""
    tensors, _, _ = make_batch(torch.float64)
    numbers = {**LOSS, "clip_cov_ratio": ratio}
    drawn, of_all = [], []
    for draw in range(20):
        log_prob = tensors["log_prob"].clone().requires_grad_()
        loss, metrics = policy_loss(
            **{**tensors, "log_prob": log_prob}, loss_mode="clip_cov", seed=draw, **ACTOR, **numbers
        )
        drawn.append(torch.autograd.grad(loss, log_prob)[0] == 0)
        torch.manual_seed(draw)
        _, expected = verl_loss(
            tensors,
            "clip_cov",
            monkeypatch=monkeypatch,
            weights=None,
            aggregation="token-mean",
            batch={},
            numbers=numbers,
        )
        assert metrics["actor/pg_clipfrac"].item() == pytest.approx(expected["actor/pg_clipfrac"], rel=1e-7)
        of_all.append(metrics["actor/pg_clipfrac"].item())
    log_prob = tensors["log_prob"].clone().requires_grad_()
    every, _ = verl_loss(
        {**tensors, "log_prob": log_prob},
        "clip_cov",
        monkeypatch=monkeypatch,
        weights=None,
        aggregation="token-mean",
        batch={},
    )
    eligible = (
        torch.autograd.grad(every, log_prob)[0] == 0
    )  # verl drew it at ratio 1, clipped it, or the mask leaves it out
    assert all((eligible | ~mask).all() for mask in drawn)
    assert len(set(of_all)) == 1
    draws_all = all(torch.equal(mask, eligible) for mask in drawn)
    assert draws_all or len({tuple(mask.flatten().tolist()) for mask in drawn}) > 1


@pytest.mark.parametrize("kind", KL_TYPES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kl_loss(kind, aggregation, dtype):
    tensors, _, _ = make_batch(dtype)
    log_prob, ref_log_prob, mask = (tensors[name] for name in ("log_prob", "old_log_prob", "response_mask"))
    log_prob[0, 0], ref_log_prob[0, 0] = -40.0, -1.0  # beyond the clamps
    for batch in BATCHES:
        options = {"loss_agg_mode": aggregation, **batch}

        def ours(x, options=options):
            return kl_loss(x, ref_log_prob, mask, kl_loss_type=kind, **options), {}

        def verls(x, options=options):
            return core_algos.agg_loss(core_algos.kl_penalty(x, ref_log_prob, kind), mask, **options), {}

        assert_equal_to_verl(with_gradient(ours, log_prob), with_gradient(verls, log_prob), dtype)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_aggregate(aggregation, dtype):
    """verl's ppo_loss aggregates the entropy bonus this way."""
    tensors, _, entropy = make_batch(dtype)
    for batch in BATCHES:
        options = {"loss_agg_mode": aggregation, **batch}
        results = [
            with_gradient(lambda x, f=f, options=options: (f(x, tensors["response_mask"], **options), {}), entropy)
            for f in (aggregate, core_algos.agg_loss)
        ]
        assert_equal_to_verl(*results, dtype)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_where_verl_divides_zero_by_zero_the_loss_is_zero(monkeypatch, aggregation):
    tensors, _, _ = make_batch(torch.float32)
    tensors["response_mask"][:] = False
    expected, _ = verl_loss(
        tensors, "vanilla", monkeypatch=monkeypatch, weights=None, aggregation=aggregation, batch={}
    )
    loss, _ = policy_loss(**tensors, loss_agg_mode=aggregation, **ACTOR, **LOSS)
    assert loss.item() == 0
    assert math.isnan(expected.item()) or expected.item() == 0


def test_every_mode_of_verl_is_covered():
    """bypass_mode is not a loss: it selects one of the others."""
    assert set(MODES) == set(core_algos.POLICY_LOSS_REGISTRY) - {"bypass_mode"}
