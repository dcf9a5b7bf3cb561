"""Plain-torch oracle of every op: float64 inside, written for reading. It shares no code with the ops.

Each function has the name and arguments of the op it stands for and is differentiable by autograd where
the op is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# --- token_entropy, logprob_entropy ---------------------------------------------------------------


def _log_softmax(logits: Tensor, mask: Tensor | None, temperature: float | Tensor) -> Tensor:
    logits = logits.to(torch.float64)
    if mask is not None:  # a masked row is not read: whatever it holds becomes 0
        logits = torch.where((mask != 0).unsqueeze(-1), logits, 0.0)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(torch.float64).expand(logits.shape[:-1]).unsqueeze(-1)
    return torch.log_softmax(logits / temperature, dim=-1)


def _masked_rows(values: Tensor, mask: Tensor | None, logits: Tensor) -> Tensor:
    if mask is not None:
        values = torch.where(mask != 0, values, 0.0)
    return values if logits.dtype == torch.float64 else values.to(torch.float32)


def token_entropy(logits: Tensor, *, mask: Tensor | None = None, temperature: float | Tensor = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature): [..., V] -> [...]."""
    log_p = _log_softmax(logits, mask, temperature)
    # p log p tends to 0 with p; log p is replaced before the product, or its gradient would be NaN.
    finite = torch.where(log_p == -torch.inf, 0.0, log_p)
    return _masked_rows(-(log_p.exp() * finite).sum(-1), mask, logits)


def logprob_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """(log-probability of the target, entropy): [..., V], [...] -> [...], [...]."""
    if mask is not None:
        targets = torch.where(mask != 0, targets, 0)
    log_p = _log_softmax(logits, mask, temperature)
    log_prob = log_p.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    entropy = token_entropy(logits, mask=mask, temperature=temperature)
    return _masked_rows(log_prob, mask, logits), entropy if entropy_grad else entropy.detach()


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy_grad: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_statistics: bool = False,
) -> tuple[Tensor, ...]:
    """`logprob_entropy` of an LM head: [..., H], [V, H], [...] -> [...], [...]; for `token_statistics`, two more."""
    wide = hidden.to(torch.float64)
    if mask is not None:  # as above, and before 0 * NaN reaches the gradient of the weight
        wide = torch.where((mask != 0).unsqueeze(-1), wide, 0.0)
    logits = wide @ weight.to(torch.float64).t()
    if bias is not None:
        logits = logits + bias.to(torch.float64)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    outputs = logprob_entropy(logits, targets, mask=mask, temperature=temperature, entropy_grad=entropy_grad)
    outputs = (_as_result(outputs[0], hidden), _as_result(outputs[1], hidden))
    if not token_statistics:
        return outputs
    inside = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask != 0
    squared = _log_softmax(logits.detach(), None, temperature).exp().square().sum(-1)
    squared = _as_result(torch.where(inside, squared, 0.0), hidden)
    return *outputs, (logits.argmax(-1) == targets) & inside, squared


# --- global_top_mask -------------------------------------------------------------------------------


def _keep_top(values: Tensor, ratio: float, rule: str, dtype: torch.dtype) -> Tensor:
    """Which of the response entropies of one scope are kept: [n] float64 -> [n] bool."""
    n = values.numel()
    if n == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    k = min(n, max(1, int(n * ratio + 0.9999)))
    ascending = values.sort().values  # NaN last
    if rule == "topk":
        keep = torch.zeros_like(values, dtype=torch.bool)
        keep[values.sort(descending=True, stable=True).indices[:k]] = True
        return keep
    if rule == "threshold":
        threshold = ascending[n - k]
    else:
        position = (1 - ratio) * (n - 1)
        lower = int(position)
        threshold, upper = ascending[lower], ascending[min(lower + 1, n - 1)]
        # A step of zero width or from -inf leads nowhere, and inf - inf would be NaN.
        if position > lower and upper != threshold and threshold != -torch.inf:
            threshold = torch.minimum(threshold + (position - lower) * (upper - threshold), upper)
            threshold = threshold.to(dtype).to(torch.float64)
    return (values >= threshold) | values.isnan()


def global_top_mask(
    entropy: Tensor,
    response_mask: Tensor,
    top_ratio: float = 0.2,
    *,
    rule: str = "topk",
    scope: str = "batch",
    group_ids: Tensor | None = None,
) -> Tensor:
    """The highest-entropy response tokens of each scope: [..., S] -> bool of the same shape."""
    rows = torch.arange(entropy.shape[:-1].numel(), device=entropy.device).view(entropy.shape[:-1])
    segments = {"batch": torch.zeros_like(rows), "sequence": rows, "group": group_ids}[scope]
    assert segments is not None
    segments = segments.unsqueeze(-1).expand(entropy.shape)
    dtype = torch.float64 if entropy.dtype == torch.float64 else torch.float32
    result = torch.zeros(entropy.shape, dtype=torch.bool, device=entropy.device)
    for segment in torch.unique(segments):
        inside = (response_mask != 0) & (segments == segment)
        result[inside] = _keep_top(entropy[inside].to(torch.float64), top_ratio, rule, dtype)
    return result


def get_global_entropy_top_mask(entropy: Tensor, response_mask: Tensor, top_ratio: float = 0.2) -> Tensor:
    """`global_top_mask` over the batch as int64."""
    return global_top_mask(entropy, response_mask, top_ratio).to(torch.int64)


# --- aggregate, kl_loss, policy_loss ---------------------------------------------------------------


def _inside(values: Tensor, mask: Tensor) -> Tensor:
    """`values` in float64, and 0 outside the mask, so that nothing there reaches a sum or a gradient."""
    return torch.where(mask, values.to(torch.float64), 0.0)


def _count(mask: Tensor, dim: int | None = None) -> Tensor:
    # As float64: an integer tensor plus 1e-8 would be float32, and the 1e-8 lost.
    return mask.sum(dim, dtype=torch.float64)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return _inside(values, mask).sum() / (_count(mask) + 1e-8)


def _as_result(value: Tensor, like: Tensor) -> Tensor:
    return value if like.dtype == torch.float64 else value.to(torch.float32)


def _aggregate(
    values: Tensor,
    counted: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """`values` are 0 where they are out; `counted` says which tokens a mean divides by."""
    row_counts = _count(counted, 1)
    row_sums = torch.where(row_counts > 0, values.sum(1), 0.0)
    divisor: float | Tensor
    if loss_agg_mode == "token-mean":
        divisor = counted.sum() if batch_num_tokens is None else batch_num_tokens
    elif loss_agg_mode == "token-sum":
        divisor = 1
    else:
        divisor = (row_counts > 0).sum() if global_batch_size is None else global_batch_size
    if loss_agg_mode == "seq-mean-token-mean":
        row_sums = row_sums / (row_counts + 1e-8)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        row_sums = row_sums / (counted.shape[1] if loss_scale_factor is None else loss_scale_factor)
    return row_sums.sum() / divisor * dp_size if divisor > 0 else row_sums.sum() * 0.0


def aggregate(values: Tensor, mask: Tensor, *, loss_agg_mode: str = "token-mean", **batch: Any) -> Tensor:
    """[B, S] -> []; `batch` is dp_size, batch_num_tokens, global_batch_size, loss_scale_factor."""
    inside = mask != 0
    return _as_result(_aggregate(_inside(values, inside), inside, loss_agg_mode, **batch), values)


def kl_loss(
    log_prob: Tensor,
    ref_log_prob: Tensor,
    response_mask: Tensor,
    *,
    weights: Tensor | None = None,
    kl_loss_type: str = "low_var_kl",
    loss_agg_mode: str = "token-mean",
    **batch: Any,
) -> Tensor:
    """KL estimate of each token, aggregated: [B, S] -> []; `batch` as in `aggregate`."""
    mask = response_mask != 0
    d = _inside(log_prob, mask) - _inside(ref_log_prob, mask).detach()
    k2 = 0.5 * d**2
    estimator = kl_loss_type.removesuffix("+")
    if estimator in ("kl", "k1"):
        value = d
    elif estimator == "abs":
        value = d.abs()
    elif estimator in ("mse", "k2"):
        value = k2
    else:
        d = d.clamp(-20, 20)
        value = (torch.exp(-d) + d - 1).clamp(-10, 10)
    if kl_loss_type.endswith("+"):
        value = value.detach() + k2 - k2.detach()
    if weights is not None:
        value = value * _inside(weights, mask).detach()
    return aggregate(value, mask, loss_agg_mode=loss_agg_mode, **batch).to(
        torch.float64 if log_prob.dtype == torch.float64 else torch.float32
    )


@dataclass(frozen=True)
class _Options:
    """Options of the loss modes: numbers, and clip ratios that are numbers or [B, S]."""

    clip_ratio: float = 0.2
    clip_ratio_low: float | Tensor | None = None
    clip_ratio_high: float | Tensor | None = None
    clip_ratio_c: float = 3.0
    clip_cov_ratio: float = 0.0002
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 0.0002
    ppo_kl_coef: float = 0.1
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    dro_beta: float | None = None
    seed: int = 0

    @property
    def low(self) -> Tensor:
        return self._clip_ratio(self.clip_ratio_low)

    @property
    def high(self) -> Tensor:
        return self._clip_ratio(self.clip_ratio_high)

    def _clip_ratio(self, given: float | Tensor | None) -> Tensor:
        """Float64, [] or [B, S]."""
        value = self.clip_ratio if given is None else given
        return value.double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


@dataclass(frozen=True)
class _Tokens:
    """A batch in float64, 0 outside the response: [B, S]."""

    log_p: Tensor
    old: Tensor
    advantage: Tensor
    response: Tensor
    weight: Tensor | None  # rollout_is_weights
    chosen: Tensor | None  # covariance_mask

    @property
    def d(self) -> Tensor:
        return self.log_p - self.old

    @property
    def clamped(self) -> Tensor:
        return self.d.clamp(-20, 20)


# A loss mode: the tokens' losses, which are clipped above and below, and the terms of actor/ppo_kl. For geo_mean the
# losses are those of the rows.
_Loss = tuple[Tensor, Tensor, Tensor, Tensor]


def _bounded(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x between the bounds, and at a bound with its whole gradient; that of torch.clamp depends on torch's version."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def _surrogate(t: _Tokens, o: _Options, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss, and which tokens it clips."""
    unclipped_loss, clipped_loss = -t.advantage * ratio, -t.advantage * _bounded(ratio, 1 - o.low, 1 + o.high)
    return torch.maximum(unclipped_loss, clipped_loss), clipped_loss > unclipped_loss


def _vanilla(t: _Tokens, o: _Options) -> _Loss:
    losses, clipped = _surrogate(t, o, t.clamped.exp())
    bound = -t.advantage * o.clip_ratio_c
    lower = (t.advantage < 0) & (losses > bound)
    return torch.where(lower, bound, losses), clipped, lower, -t.clamped


def _gpg(t: _Tokens, o: _Options) -> _Loss:
    none = torch.zeros_like(t.response)
    return -t.advantage * t.log_p, none, none, -t.clamped


def _clip_cov(t: _Tokens, o: _Options) -> _Loss:
    losses, by_ratio = _surrogate(t, o, t.d.exp())
    if t.chosen is None:
        index = torch.arange(t.d.numel(), device=t.d.device).view_as(t.response)
        words = _splitmix64(_splitmix64(torch.full_like(index, o.seed)) + index)
        keys = ((words >> 32) & 0xFFFFFFFF).clamp(min=1)
        clipped = _first_largest(keys, _eligible(t, o, by_ratio), _share(o.clip_cov_ratio, t.response))
    else:
        clipped = t.response & t.chosen
    return torch.where(clipped, 0.0, losses), clipped, torch.zeros_like(clipped), -t.d


def _kl_cov(t: _Tokens, o: _Options) -> _Loss:
    chosen = t.chosen
    if chosen is None:
        chosen = _first_largest(_covariance(t, "kl_cov"), t.response, _share(o.kl_cov_ratio, t.response))
    losses = -t.advantage * t.d.exp()
    none = torch.zeros_like(t.response)
    return torch.where(chosen, losses + o.ppo_kl_coef * t.d.abs(), losses), none, none, t.d.abs()


def _gspo(t: _Tokens, o: _Options) -> _Loss:
    sequence = t.d.sum(1, keepdim=True) / t.response.sum(1, keepdim=True).clamp(min=1)
    losses, clipped = _surrogate(t, o, (t.log_p - t.log_p.detach() + sequence.detach()).clamp(max=10).exp())
    return losses, clipped, torch.zeros_like(clipped), -t.d


def _geo_mean(t: _Tokens, o: _Options) -> _Loss:
    d, advantage = t.d, t.advantage
    bounded = _bounded(d, -o.low, o.high)
    towards = torch.where(advantage > 0, torch.minimum(d, bounded), torch.maximum(d, bounded))
    count = _count(t.response, 1) + 1e-8
    ratio = (torch.where(advantage != 0, towards, 0.0).sum(1) / count).exp()
    losses = -advantage.sum(1) / count * ratio
    if t.weight is not None:
        log_weight = torch.where(t.response, (t.weight + 1e-10).log(), 0.0)
        losses = losses * (log_weight.sum(1) / count).exp()
    return losses, (d != bounded) & (advantage > 0), (d != bounded) & (advantage < 0), -d


def _dppo_tv(t: _Tokens, o: _Options) -> _Loss:
    difference = t.log_p.exp() - t.old.exp()
    return _dppo(t, o, torch.where(t.advantage > 0, difference <= o.high, difference >= -o.low))


def _dppo_kl(t: _Tokens, o: _Options) -> _Loss:
    p, q = t.log_p.exp(), t.old.exp()
    divergence = q * (t.old - t.log_p) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    above, below = (divergence <= o.high) | (p <= q), (divergence <= o.low) | (p >= q)
    return _dppo(t, o, torch.where(t.advantage > 0, above, below))


def _dppo(t: _Tokens, o: _Options, valid: Tensor) -> _Loss:
    ratio = t.clamped.exp().detach()
    losses = torch.where(valid, -t.advantage * ratio.clamp(max=o.clip_ratio_c) * t.log_p, 0.0)
    return losses, ~valid, (ratio > o.clip_ratio_c) & valid, -t.clamped


def _sapo(t: _Tokens, o: _Options) -> _Loss:
    tau = torch.where(t.advantage > 0, torch.full_like(t.advantage, o.tau_pos), o.tau_neg)
    none = torch.zeros_like(t.response)
    return -t.advantage * torch.sigmoid(tau * (t.clamped.exp() - 1)) * 4 / tau, none, none, -t.clamped


def _dro(t: _Tokens, o: _Options) -> _Loss:
    assert o.dro_beta is not None
    none = torch.zeros_like(t.response)
    return -(t.log_p * t.advantage - 0.5 * o.dro_beta * t.d**2), none, none, -t.d


def _cispo(t: _Tokens, o: _Options) -> _Loss:
    ratio = t.clamped.exp().detach()
    bounded = ratio.clamp(1 - o.low, 1 + o.high)
    return -bounded * t.advantage * t.log_p, ratio != bounded, torch.zeros_like(t.response), -t.clamped


_LOSS_MODES = {
    "vanilla": _vanilla,
    "gpg": _gpg,
    "clip_cov": _clip_cov,
    "kl_cov": _kl_cov,
    "gspo": _gspo,
    "geo_mean": _geo_mean,
    "dppo_tv": _dppo_tv,
    "dppo_kl": _dppo_kl,
    "sapo": _sapo,
    "dro": _dro,
    "cispo": _cispo,
}
_METRICS = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
_REPORTED = {"gpg": _METRICS[:0], "clip_cov": _METRICS[:2], "kl_cov": _METRICS[1:2], "dro": _METRICS[1:2]}


def policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    loss_mode: str = "vanilla",
    entropy_mask: Tensor | None = None,
    covariance_mask: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    loss_agg_mode: str = "token-mean",
    normalize: str = "selected",
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics): [B, S] -> []; `options` are those of the loss mode."""
    response = response_mask != 0
    weight = None if rollout_is_weights is None else _inside(rollout_is_weights, response)
    t = _Tokens(
        _inside(log_prob, response),
        _inside(old_log_prob, response).detach(),
        _inside(advantages, response).detach(),
        response,
        weight,
        None if covariance_mask is None else covariance_mask != 0,
    )
    losses, clipped, lower, kl = _LOSS_MODES[loss_mode](t, _Options(**options))
    selected = response
    if entropy_mask is not None and loss_mode not in ("gspo", "geo_mean"):
        selected = response & (entropy_mask != 0)
    if loss_mode == "geo_mean":
        loss = losses.sum() / max(1, losses.numel())
    else:
        losses = _inside(losses if weight is None else losses * weight, selected)
        counted = response if normalize == "response" else selected
        mode = "seq-mean-token-mean" if loss_mode == "sapo" else loss_agg_mode
        loss = _aggregate(losses, counted, mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    terms = dict(zip(_METRICS, (clipped.double(), kl, lower.double()), strict=True))
    metrics = {
        name: _as_result(_masked_mean(terms[name].detach(), response), log_prob)
        for name in _REPORTED.get(loss_mode, _METRICS)
    }
    if entropy_mask is not None:
        ratio = _count(selected) / _count(response).clamp(min=1)
        metrics["actor/entropy_token_ratio"] = _as_result(ratio, log_prob)
    return _as_result(loss, log_prob), metrics


# --- covariance_mask, and the choices of clip_cov and kl_cov ----------------------------------------


def covariance_mask(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_mode: str,
    **options: Any,
) -> Tensor:
    """The response tokens that clip_cov or kl_cov chooses: any shape -> bool of the same shape."""
    response, o = response_mask != 0, _Options(**options)
    log_p, old, advantage = (_inside(value, response) for value in (log_prob, old_log_prob, advantages))
    t = _Tokens(log_p, old, advantage, response, None, None)
    if loss_mode == "kl_cov":
        return _first_largest(_covariance(t, loss_mode), response, _share(o.kl_cov_ratio, response))
    _, by_ratio = _surrogate(t, o, t.d.exp())
    place = response.flatten().cumsum(0).view_as(response) - 1
    words = _splitmix64(_splitmix64(torch.full_like(place, o.seed)) + place)
    keys = (words >> 11) & (2**53 - 1)
    return _first_largest(keys, _eligible(t, o, by_ratio), _share(o.clip_cov_ratio, response))


def _covariance(t: _Tokens, loss_mode: str) -> Tensor:
    """Each token's covariance of log-probability and advantage, whose means verl takes in these two ways."""
    n = _count(t.response) + (1e-8 if loss_mode == "clip_cov" else 0.0)
    log_p = t.log_p.detach()
    return (t.advantage - t.advantage.sum() / n) * (log_p - log_p.sum() / n)


def _eligible(t: _Tokens, o: _Options, by_ratio: Tensor) -> Tensor:
    covariance = _covariance(t, "clip_cov")
    return t.response & ~by_ratio & (covariance > o.clip_cov_lb) & (covariance < o.clip_cov_ub)


def _share(ratio: float, response: Tensor) -> int:
    return max(1, int(ratio * int(response.sum())))


def _splitmix64(x: Tensor) -> Tensor:
    """The next word of splitmix64 (Steele, Lea, Flood, 2014) after each state, int64 standing for unsigned words."""

    def shifted(x: Tensor, by: int) -> Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)

    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ shifted(x, 31)


def _first_largest(keys: Tensor, eligible: Tensor, count: int) -> Tensor:
    """Marks the `count` largest eligible keys, the first ones where keys are equal: [B, S] -> [B, S] bool."""
    indices = eligible.flatten().nonzero().squeeze(1)
    order = keys.flatten()[indices].sort(descending=True, stable=True).indices
    chosen = torch.zeros(keys.numel(), dtype=torch.bool, device=keys.device)
    chosen[indices[order[:count]]] = True
    return chosen.view_as(keys)
