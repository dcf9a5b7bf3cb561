"""Which response tokens carry the policy gradient of an optimizer step, and what their loss is divided by.

`StepSelection` holds the selection of one optimizer step. The trainer of this package, its loss for verl and its
trainer for TRL all use it. `OPTIONS` documents the configuration keys.

Which tokens compete for the top share follows from two keys, here in terms of `entropy_rl_ext.global_top_mask`, whose
argument `scope` is always "batch":

    entropy_top_scope  entropy_top_ranks  competing tokens                              given to the op
    micro_batch        local              one micro-batch of one rank                   the micro-batch
    micro_batch        global             the micro-batches that the ranks run at once  the micro-batch, with `group`
    mini_batch         local              one rank's share of the optimizer step        all its micro-batches at once
    mini_batch         global             the optimizer step on all ranks               the same, with `group`

Under entropy_top_scope=sequence each response has its own top share: the op's argument `scope` is "sequence", and ranks
have nothing to exchange for it.

The scopes mini_batch and sequence select before the first micro-batch trains, which takes the entropies of the whole
optimizer step. They come from an extra forward (`prepass`), or from the forward that computed the old
log-probabilities.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_rl.scores import names_function, random_scores, token_function, token_scores
from entropy_rl_ext import covariance_mask, global_top_mask, kl_loss, policy_loss
from entropy_rl_ext.ops.global_top_mask import top_k_count

Rule = Literal["topk", "threshold", "quantile"]
Scope = Literal["micro_batch", "mini_batch", "sequence"]
Ranks = Literal["local", "global"]
RULES, SCOPES, RANKS = get_args(Rule), get_args(Scope), get_args(Ranks)

# Loss modes with one probability ratio per sequence: they accept a selection of tokens and do not apply it.
SEQUENCE_MODES = ("gspo", "geo_mean")

# Loss modes without a clip range.
UNCLIPPED_MODES = ("gpg", "kl_cov", "sapo", "dro")

# Loss modes that choose tokens by covariance among all response tokens.
COVARIANCE_MODES = ("clip_cov", "kl_cov")

# Metrics: the lowest and the highest share of its tokens that the rule selected of a response.
LOWEST_SHARE, HIGHEST_SHARE = "actor/entropy_token_ratio/min", "actor/entropy_token_ratio/max"

_VETO = ("entropy_veto.probability", "entropy_veto.entropy")
_REST_CLIP = ("entropy_rest.clip_ratio_low", "entropy_rest.clip_ratio_high")
_REST_KL = "entropy_rest.kl_loss_coef"

# The configuration keys. train.yaml and TRL's --help repeat these texts (a test compares train.yaml's).
OPTIONS = {
    "entropy_top_ratio": "Share of the response tokens that carry the policy gradient, those of highest entropy, in "
    "(0, 1]. null (None in Python): all tokens train, and this package changes nothing.",
    "entropy_top_score": "What ranks the tokens. entropy: the entropy of the policy. surprisal: -log p of the token. "
    "random: a random number, the control experiment. FILE.py:function: a function of (log_prob, entropy, advantages, "
    "response_mask), each [B, S], that returns [B, S].",
    "entropy_top_rule": "Which tokens count as highest. topk: exactly k = max(1, int(n * ratio + 0.9999)) of n tokens. "
    "threshold: also all tokens that tie with the k-th. quantile: all tokens at or above the (1 - ratio) quantile, as "
    "in TRL.",
    "entropy_top_complement": "Train on all other response tokens instead. With ratio 0.2 these are the 80 % of lowest "
    "entropy, the paper's control experiment.",
    "entropy_top_scope": "Which tokens compete. micro_batch: those of one micro-batch, as in the paper's code. "
    "mini_batch: those of the whole optimizer step, however it is split into micro-batches. sequence: those of one "
    "response, so that every response trains on its own top share.",
    "entropy_top_source": "Where the scopes mini_batch and sequence take their entropies from. prepass: an extra "
    "forward without gradient before every optimizer step. old_policy: the forward that computed the old "
    "log-probabilities, at no extra cost.",
    "entropy_top_ranks": "Whether ranks compete. local: each rank selects from its own tokens. global: the tokens of "
    "all ranks compete as one batch.",
    "entropy_top_normalize": "What a mean over tokens divides by. selected: the selected tokens (Eq. 6 of the paper), "
    "or the sum of the weights if tokens have weights. response: all response tokens (TRL). At ratio 0.2 the gradient "
    "of selected is five times that of response.",
    "entropy_rest.weight": "Weight of the loss of the tokens that were not selected; that of a selected token is 1. 0: "
    "they do not train. 1: they train like the selected ones.",
    "entropy_rest.clip_ratio_low": "clip_ratio_low of the tokens that were not selected. null: the same as that of the "
    "selected ones.",
    "entropy_rest.clip_ratio_high": "clip_ratio_high of the tokens that were not selected. null: the same as that of "
    "the selected ones.",
    "entropy_rest.kl_loss_coef": "kl_loss_coef of the tokens that were not selected. null: the same as that of the "
    "selected ones.",
    "entropy_veto.probability": "A token never trains if its advantage is above 0, its probability below this and its "
    "entropy below entropy_veto.entropy. null: no token is vetoed.",
    "entropy_veto.entropy": "The entropy of that rule, in nats; null exactly if its probability is.",
    "token_weight": "FILE.py:function of (log_prob, entropy, advantages, response_mask), each [B, S], that returns "
    "[B, S], 0 or above: factors of the tokens' weights. null: 1.",
}


def select_tokens(
    entropy: Tensor,
    response_mask: Tensor,
    top_ratio: float,
    rule: Rule = "topk",
    ranks: Ranks = "local",
    group: dist.ProcessGroup | None = None,
    *,
    complement: bool = False,
    per_sequence: bool = False,
) -> tuple[Tensor, Tensor]:
    """Selects the response tokens of highest entropy, or with `complement` all others.

    Args:
        entropy: any shape, float32, bfloat16, float16 or float64; may be empty.
        response_mask: the same shape, any dtype, nonzero = response token.
        top_ratio: share of the response tokens to keep, in (0, 1].
        rule: "topk", "threshold" or "quantile", as in `entropy_rl_ext.global_top_mask`.
        ranks: "local": this process alone. "global": a collective of all ranks of `group`.
        group: a process group; None is the default group. Without one, this process is the only rank.
        complement: select the response tokens that the rule leaves out.
        per_sequence: each row of `entropy`, whose last dimension is the sequence, competes by itself. `ranks` has no
            effect then.

    Returns:
        The mask, bool, of the shape of `entropy`; and the lowest entropy that the rule keeps, 0-dim, in nats. With
        `per_sequence` it is the mean of the rows' lowest entropies, weighted by their response tokens.

    Raises:
        ValueError: as `global_top_mask`, or an unknown `ranks`.
    """
    entropy, among_ranks = entropy.detach(), competing_group(ranks, group)
    if per_sequence:
        selected = global_top_mask(entropy, response_mask, top_ratio, rule=rule, scope="sequence")
        threshold = _mean_of_lowest(entropy, selected, response_mask)
    else:
        selected, threshold = global_top_mask(
            entropy, response_mask, top_ratio, rule=rule, group=among_ranks, return_threshold=True
        )
    if complement:
        selected = (response_mask != 0) & ~selected
    return selected, threshold


def _mean_of_lowest(entropy: Tensor, selected: Tensor, response_mask: Tensor) -> Tensor:
    """[]: the lowest selected entropy of each row (inf if only NaN is selected), averaged over response tokens."""
    tokens = (response_mask != 0).sum(-1)
    lowest = torch.where(selected & ~entropy.isnan(), entropy, torch.inf).amin(-1)
    return torch.where(tokens > 0, lowest * tokens, 0).sum() / tokens.sum().clamp(min=1)


def competing_group(ranks: Ranks, group: dist.ProcessGroup | None = None) -> dist.ProcessGroup | None:
    """The process group whose tokens compete under `entropy_top_ranks`; None means this process alone."""
    if ranks not in RANKS:
        raise ValueError(f"ranks is {ranks!r}; it must be one of {', '.join(map(repr, RANKS))}")
    return (group or dist.group.WORLD) if ranks == "global" else None


@contextmanager
def prepass(device: torch.device) -> Iterator[None]:
    """Context of a forward whose only purpose is the entropies that a selection needs.

    It disables gradients and restores the random-number state of the CPU and of `device`. Dropout in the optimizer
    step therefore draws what it would draw without the prepass. If the prepass runs the same micro-batches in the same
    order, both see the same entropies.
    """
    devices = [] if device.type == "cpu" else [device]
    with torch.no_grad(), torch.random.fork_rng(devices, device_type="cuda" if not devices else device.type):
        yield


def needs_all_tokens(actor: Any) -> str | None:
    """The setting for which the loss reads log-probabilities or entropies of unselected tokens; None if there is none.

    If there is none and the selection is made before the optimizer step, that step runs the LM head on the selected
    tokens only. `actor` is an actor configuration with verl's keys.
    """
    loss_mode = actor.policy_loss.loss_mode
    if loss_mode in SEQUENCE_MODES:
        return f"policy_loss.loss_mode={loss_mode}"
    if actor.entropy_coeff != 0:
        return f"entropy_coeff={actor.entropy_coeff}"
    return "use_kl_loss=true" if actor.use_kl_loss else None


def setting(config: Any, key: str) -> Any:
    """The value of TABLE.NAME in a configuration, or of TABLE_NAME if it has no tables; None without either."""
    table, name = key.split(".")
    values = getattr(config, table, None)
    return getattr(config, f"{table}_{name}", None) if values is None else values.get(name)


class Contradiction(NamedTuple):
    """A key whose value makes no sense beside the other keys, and why."""

    key: str
    value: Any
    reason: str


def contradiction(config: Any) -> Contradiction | None:
    """The first contradiction among this package's keys; None if there is none."""
    ratio, policy = config.entropy_top_ratio, getattr(config, "policy_loss", None)
    weights = {key: setting(config, key) for key in ("entropy_rest.weight", *_VETO)}
    weights["token_weight"] = getattr(config, "token_weight", None)
    ranges = {key: setting(config, key) for key in (*_REST_CLIP, _REST_KL)}
    given = [key for key, value in weights.items() if value] + [key for key in ranges if ranges[key] is not None]
    for key in given:
        value = weights[key] if key in weights else ranges[key]
        if ratio is None:
            return Contradiction(key, value, "it needs entropy_top_ratio, which is null; ratio 1 selects all tokens")
        if policy is not None and policy.loss_mode in SEQUENCE_MODES:
            lacks = "weights" if key in weights else "selected tokens"
            reason = f"loss_mode {policy.loss_mode} has one ratio per sequence and no {lacks}"
            return Contradiction(key, value, reason)
        if key in _REST_CLIP and not weights["entropy_rest.weight"]:
            return Contradiction(key, value, "entropy_rest.weight is 0, so those tokens have no loss to clip")
        if key in _REST_CLIP and policy is not None and policy.loss_mode in UNCLIPPED_MODES:
            return Contradiction(key, value, f"loss_mode {policy.loss_mode} does not clip")
        if key == _REST_KL and not getattr(config, "use_kl_loss", True):
            return Contradiction(key, value, "it needs use_kl_loss, which is false")
    probability, entropy = (weights[key] for key in _VETO)
    for key, value, other in zip(_VETO, (probability, entropy), (entropy, probability), strict=True):
        if value is None and other is not None:
            return Contradiction(key, value, "both numbers of entropy_veto must be set, or none")
    if ratio is not None and config.entropy_top_scope == "sequence" and config.entropy_top_ranks == "global":
        reason = "it must be local with entropy_top_scope sequence: a response is on one rank"
        return Contradiction("entropy_top_ranks", config.entropy_top_ranks, reason)
    return None


def load_functions(config: Any) -> None:
    """Imports the functions that the keys name. Raises UserError if there is no such function."""
    if config.entropy_top_ratio is None:
        return
    score, weight = getattr(config, "entropy_top_score", "entropy"), getattr(config, "token_weight", None)
    if names_function(score):
        token_function("entropy_top_score", score)
    if weight is not None:
        token_function("token_weight", weight)


def movement_metrics(loss_mode: str | None) -> set[str]:
    """The metrics that measure, as means over response tokens, how far the policy has moved from the old one.

    The clip fraction of clip_cov is not one of them: it is the share of the tokens that were chosen.
    """
    clipped = set() if loss_mode == "clip_cov" else {"actor/pg_clipfrac", "actor/pg_clipfrac_lower"}
    return {"actor/ppo_kl"} | clipped


def _sum(weights: Tensor) -> Tensor:
    """[]: int64 of a mask, float64 of weights, whose order then does not matter to a float32."""
    return weights.sum(dtype=torch.float64 if weights.is_floating_point() else None)


def by_choice(chosen: Tensor, own: float, rest: float, like: Tensor) -> Tensor:
    """One number for the tokens that the rule selected and another for the others: [B, S], the dtype of `like`."""
    return torch.full_like(like, rest).masked_fill(chosen, own)


# ---- One optimizer step


@dataclass
class TokenSelection:
    """The selection of a mini-batch, token by token. Every tensor has the shape of the tokens it was made for."""

    mask: Tensor  # bool: the token trains
    weight: Tensor | None = None  # float, 0 outside the mask; None: 1 for every token in the mask
    # With weights only; bool: the rule selected the token; the veto keeps it from training.
    selected: Tensor | None = None
    vetoed: Tensor | None = None
    covariance_mask: Tensor | None = None  # bool: clip_cov or kl_cov chose the token
    # Log-probabilities before the step; None unless the step runs the LM head on the selected tokens only.
    log_prob: Tensor | None = None

    def weights(self) -> Tensor:
        """What a mean over the selection divides by the sum of: bool or float."""
        return self.mask if self.weight is None else self.weight

    def chosen(self) -> Tensor:
        """bool: the rule selected the token."""
        return self.mask if self.selected is None else self.selected

    def split(self, rows: Sequence[int]) -> list["TokenSelection"]:
        """The selection of each micro-batch, given how many rows each has."""
        names = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        parts = zip(*(getattr(self, name).split(list(rows)) for name in names), strict=True)
        return [TokenSelection(**dict(zip(names, part, strict=True))) for part in parts]


def share_metrics(tokens: TokenSelection, response_mask: Tensor) -> dict[str, Tensor]:
    """The shares of the response tokens of a micro-batch that the rule selected, and that the veto keeps from training,
    as metrics."""
    count = (response_mask != 0).sum().clamp(min=1)
    shares = {"actor/entropy_token_ratio": tokens.chosen().sum() / count}
    if tokens.vetoed is not None:
        shares["actor/entropy_veto_ratio"] = tokens.vetoed.sum() / count
    return shares


class StepSelection:
    """What one optimizer step trains on, as one of its ranks sees it.

    Call `count_tokens` before the first micro-batch, and if the selection is made `before_step` `select_mini_batch` as
    well. Then call `policy_loss` for every micro-batch, on all ranks in the same order, and `extreme_shares` at the
    end. A trainer with its own loss calls `score`, `select`, `weigh`, `divisor` and `note_shares` instead of
    `policy_loss`.
    """

    before_step: bool  # whether the selection is made before the first micro-batch: the scopes mini_batch and sequence
    old_policy: bool  # whether that selection uses the entropies of the old policy
    draws: bool  # whether the selection or clip_cov needs a seed
    threshold_name: str  # of the metric: the lowest score that the rule keeps
    tokens: Tensor  # [ranks, micro-batches] int64: response tokens
    response_tokens: Tensor  # []: their sum
    # Of `select_mini_batch`, all []: the lowest score that the rule kept; the sum of the weights of the tokens that
    # competed with this rank's and of all ranks' (without weights, how many train); how many train on all ranks.
    threshold: Tensor
    competing_weight: Tensor
    weight: Tensor
    trained: Tensor
    # [B, S] bool, of the last `policy_loss`: the tokens with a gradient; None: all of them. And those that the rule
    # selected; None without a selection.
    trained_mask: Tensor | None
    chosen: Tensor | None

    def __init__(self, config: Any, group: dist.ProcessGroup | None = None, *, in_micro_batches: bool = False) -> None:
        """
        Args:
            config: an actor configuration with verl's keys, or any object with the `entropy_top_*` keys alone. The keys
                score, source and complement and those of the weights may be missing.
            group: the ranks that share the step; None is the default group.
            in_micro_batches: select in each micro-batch, whatever the scope: for a loss outside an optimizer step.
        """
        self._config = config
        self._group = group or dist.group.WORLD
        self._ratio = config.entropy_top_ratio
        self._complement = getattr(config, "entropy_top_complement", False)
        self._over_ranks = config.entropy_top_ranks == "global"
        self._per_sequence = config.entropy_top_scope == "sequence"
        self._score = getattr(config, "entropy_top_score", "entropy")
        self._rest = setting(config, "entropy_rest.weight") or 0.0
        self._veto = tuple(setting(config, key) for key in _VETO)
        self._token_weight = getattr(config, "token_weight", None)
        rest_clip = {key.split(".")[1]: setting(config, key) for key in _REST_CLIP}
        self._rest_clip = {name: value for name, value in rest_clip.items() if value is not None}
        self._rest_kl = setting(config, _REST_KL)
        self._random = self._ratio is not None and self._score == "random"
        self.threshold_name = f"actor/{'entropy' if self._score == 'entropy' else 'score'}_threshold"
        selects = self._ratio is not None and not in_micro_batches
        self.before_step = selects and config.entropy_top_scope != "micro_batch"
        self.old_policy = getattr(config, "entropy_top_source", "prepass") == "old_policy"
        policy = getattr(config, "policy_loss", None)
        self._loss_mode = None if policy is None else policy.loss_mode
        self.draws = self._random or self._loss_mode == "clip_cov"
        # [2] of each micro-batch so far: the lowest share of a response, negated, and the highest; -inf without any.
        self.shares: list[Tensor] = []

    def count_tokens(
        self, micro_batch_tokens: Tensor, micro_batches_per_step: int | None = None, *, seed: int = 0
    ) -> None:
        """Exchanges the numbers of response tokens, from which the divisor follows. A collective.

        Args:
            micro_batch_tokens: [micro-batches] int64, the response tokens of each micro-batch of this rank. All ranks
                give as many.
            micro_batches_per_step: if the selection is made before the step, how many of them form an optimizer step,
                if the divisor spans several steps; None: all of them.
            seed: of the score random, if selections are made in micro-batches; the first rank's is used.
        """
        gathered = self._gather(torch.cat([micro_batch_tokens, micro_batch_tokens.new_full((1,), seed)]))
        self.tokens, self._seed = gathered[:, :-1], gathered[0, -1]
        self.response_tokens = self.tokens.sum()
        if self._ratio is None:
            return
        before_own = self.tokens[: self._own_rank()].sum()
        self._before = before_own + micro_batch_tokens.cumsum(0) - micro_batch_tokens  # [micro-batches]
        self._size = (micro_batches_per_step or len(micro_batch_tokens)) if self.before_step else 1
        competing = self.tokens.unflatten(1, (-1, self._size)).sum(-1)  # [ranks, selections]
        if self._over_ranks:
            competing = competing.sum(0, keepdim=True)
        own = 0 if self._over_ranks else self._own_rank()
        self._competing = competing[own]
        # What topk selects of each response follows from its own length, which is not known here.
        counts = (
            competing.double()
            if self._per_sequence
            else top_k_count(competing, self._ratio, complement=self._complement)
        )
        counts = counts + self._rest * (competing - counts)
        self._count_of_all = counts.sum()
        # The masks of an optimizer step are known on all ranks when it begins; those of a micro-batch are not.
        self._counts = counts.sum(0) if self.before_step else counts[own]

    def competing_tokens(self, number: int) -> Tensor:
        """[]: how many response tokens compete with those of micro-batch `number`, its own included."""
        return self._competing[number // self._size]

    def score(
        self, number: int, log_prob: Tensor, entropy: Tensor, advantages: Tensor | None, response_mask: Tensor
    ) -> Tensor:
        """[B, S]: what ranks the tokens of micro-batch `number`."""
        if self._random:
            return random_scores(self._seed, response_mask, self._before[number])
        return token_scores(self._score, log_prob.detach(), entropy.detach(), advantages, response_mask)

    def select(self, scores: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
        """`select_tokens` by any score, with the options of the configuration."""
        config = self._config
        return select_tokens(
            scores,
            response_mask,
            self._ratio,
            config.entropy_top_rule,
            config.entropy_top_ranks,
            self._group,
            complement=self._complement,
            per_sequence=self._per_sequence,
        )

    def select_mini_batch(
        self,
        log_prob: Tensor,
        entropy: Tensor,
        response_mask: Tensor,
        *,
        old_log_prob: Tensor | None = None,
        advantages: Tensor | None = None,
        seed: int = 0,
        only_selected: bool = False,
    ) -> TokenSelection:
        """Selects from all of this rank's tokens in the optimizer step. A collective.

        Args:
            log_prob, entropy: [B, S], of the policy before the step.
            response_mask, old_log_prob, advantages: the same shape. The loss modes clip_cov and kl_cov need the last
                two: they choose tokens by covariance, here from the whole mini-batch too. A score of the user's may
                need the advantages.
            seed: of clip_cov's draw and of the score random; the first rank's is used.
            only_selected: whether the step will run the LM head on the selected tokens only.
        """
        if self._random:
            count = (response_mask != 0).sum()
            gathered = self._gather(torch.stack([count, count.new_full((), seed)]))
            scores = random_scores(gathered[0, 1], response_mask, gathered[: self._own_rank(), 0].sum())
        else:
            scores = token_scores(self._score, log_prob.detach(), entropy.detach(), advantages, response_mask)
        selected, self.threshold = self.select(scores, response_mask)
        tokens = self.weigh(selected, log_prob, entropy, advantages, response_mask)
        own = _sum(tokens.weights())
        self.weight = self._all_reduce(own)
        self.competing_weight = self.weight if self._over_ranks else own
        self.trained = self.weight if tokens.weight is None else self._all_reduce(tokens.mask.sum())
        if self._loss_mode in COVARIANCE_MODES:
            assert old_log_prob is not None and advantages is not None
            tokens.covariance_mask = covariance_mask(
                log_prob,
                old_log_prob,
                advantages,
                response_mask,
                group=competing_group(self._config.entropy_top_ranks, self._group),
                seed=seed,
                **(_options(self._config, _COVARIANCE) | self.clip_ratios(tokens, log_prob)),
            )
        tokens.log_prob = log_prob if only_selected else None
        return tokens

    def weigh(
        self, selected: Tensor, log_prob: Tensor, entropy: Tensor, advantages: Tensor | None, response_mask: Tensor
    ) -> TokenSelection:
        """The tokens that train, given those that the rule selected: with the weights of the configuration, if any.

        The weight of a token is 1 if it was selected and `entropy_rest.weight` if not, times `token_weight`; and 0 if
        `entropy_veto` applies to it. All tensors are [B, S].
        """
        vetoes = self._veto[0] is not None
        if not (self._rest or vetoes or self._token_weight):
            return TokenSelection(selected)
        log_prob, entropy, inside = log_prob.detach(), entropy.detach(), response_mask != 0
        weight = torch.where(selected, 1.0, self._rest) * inside
        if self._token_weight is not None:
            factors = token_function("token_weight", self._token_weight)
            weight = torch.where(weight > 0, weight * factors(log_prob, entropy, advantages, response_mask), 0.0)
        vetoed = None
        if vetoes:
            assert advantages is not None
            probability, bound = self._veto
            vetoed = inside & (advantages > 0) & (log_prob.exp() < probability) & (entropy < bound)
            weight = torch.where(vetoed, 0.0, weight)
        return TokenSelection(weight > 0, weight, selected, vetoed)

    def divisor(self, number: int, weights: Tensor) -> Tensor:
        """The divisor with which the losses of all micro-batches add up to a mean over the selected tokens, weighted if
        they have weights.

        How many tokens topk selects follows from the numbers of response tokens alone. Under the rule topk the divisor
        is therefore their number in the whole step, and every selected token has the same weight. The other rules may
        select more, `token_weight` and `entropy_veto` may give any weights, and with the scope micro_batch it is not
        known what the later micro-batches will have. There each selection's mean over its own tokens is weighted by its
        share of topk's number. With the scope sequence the sum is that of the optimizer step; if the divisor spans
        several steps, a step is weighted by its share of the response tokens.

        Args:
            number: of the micro-batch.
            weights: `TokenSelection.weights` of its tokens, any shape. A collective under the scope micro_batch with
                ranks global, except for the rule topk without `token_weight` and `entropy_veto`.
        """
        weighs = self._token_weight is not None or self._veto[0] is not None
        if self._config.entropy_top_rule == "topk" and not self._per_sequence and not weighs:
            return self._count_of_all
        total = self.weight if self.before_step else _sum(weights)
        if self._over_ranks and not self.before_step:
            total = self._all_reduce(total)
        return total * self._count_of_all / self._counts[number // self._size].clamp(min=1)

    def policy_loss(
        self,
        number: int,
        log_prob: Tensor,
        entropy: Tensor,
        old_log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        tokens: TokenSelection | None = None,
        **options: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`entropy_rl_ext.policy_loss` of one micro-batch, on its selected tokens and with the configuration's options.

        Args:
            number: of the micro-batch.
            log_prob, entropy, old_log_prob, advantages, response_mask: [B, S].
            tokens: [B, S], this micro-batch's part of `select_mini_batch`; None if there was none.
            options: further arguments of `policy_loss`. Their `batch_num_tokens` counts all response tokens.

        Returns:
            The loss; and metrics, weighted so that their sums over micro-batches and ranks are means over the response
            tokens of the step. If only the selected tokens met the LM head and the selection used the old policy, then
            how far the policy has moved is known for the selected tokens only: the metrics of that are means over those
            and have `_selected` appended to their names.
        """
        metrics = {}
        renamed = tokens is not None and tokens.log_prob is not None and self.old_policy
        if tokens is not None:
            metrics[self.threshold_name] = self.threshold
            if tokens.log_prob is not None:  # the unselected tokens enter the metrics, not the loss
                log_prob = torch.where(tokens.mask, log_prob, tokens.log_prob)
        elif self._ratio is not None:
            scores = self.score(number, log_prob, entropy, advantages, response_mask)
            selected, metrics[self.threshold_name] = self.select(scores, response_mask)
            tokens = self.weigh(selected, log_prob, entropy, advantages, response_mask)
        self.trained_mask = self.chosen = None
        if tokens is not None and self._loss_mode not in SEQUENCE_MODES:
            self.trained_mask, self.chosen = tokens.mask, tokens.chosen()
            self.note_shares(tokens.chosen(), response_mask)
            if self._config.entropy_top_normalize == "selected":
                options["batch_num_tokens"] = self.divisor(number, tokens.weights())
            if tokens.weight is not None:
                options["rollout_is_weights"] = self._factors(tokens, tokens.weight, options)
        loss, loss_metrics = policy_loss(
            log_prob,
            old_log_prob,
            advantages,
            response_mask,
            entropy_mask=None if tokens is None else tokens.mask,
            covariance_mask=None if tokens is None else tokens.covariance_mask,
            normalize=self._config.entropy_top_normalize,
            **(_options(self._config, _POLICY_LOSS) | ({} if tokens is None else self.clip_ratios(tokens, log_prob))),
            **options,
        )
        metrics |= loss_metrics
        if tokens is not None and tokens.selected is not None:
            metrics |= share_metrics(tokens, response_mask)
        return loss, self._weighted(metrics, response_mask, renamed)

    def clip_ratios(self, tokens: TokenSelection, log_prob: Tensor) -> dict[str, Tensor]:
        """The clip ratios that differ from token to token, as arguments of `policy_loss`, [B, S] as `log_prob`."""
        found = {}
        for name, rest in self._rest_clip.items():
            own = self._config.clip_ratio if self._config[name] is None else self._config[name]
            found[name] = by_choice(tokens.chosen(), own, rest, log_prob)
        return found

    def kl_loss(
        self, log_prob: Tensor, ref_log_prob: Tensor, response_mask: Tensor, **aggregation: Any
    ) -> tuple[Tensor, Tensor]:
        """The KL penalty of the micro-batch of the last `policy_loss`, all of whose response tokens it covers.

        Returns:
            What to add to the loss: each token's estimate times `kl_loss_coef`, or `entropy_rest.kl_loss_coef` if the
            rule did not select it, averaged over all response tokens. And the penalty itself, without coefficients.
        """
        config = self._config
        batch, options = (log_prob, ref_log_prob, response_mask), {"kl_loss_type": config.kl_loss_type, **aggregation}
        penalty = kl_loss(*batch, **options)
        if self._rest_kl is None or self.chosen is None:
            return config.kl_loss_coef * penalty, penalty
        coefficients = by_choice(self.chosen, config.kl_loss_coef, self._rest_kl, log_prob)
        return kl_loss(*batch, weights=coefficients, **options), penalty

    def _factors(self, tokens: TokenSelection, weight: Tensor, options: dict[str, Any]) -> Tensor:
        """[B, S]: what multiplies the tokens' losses, given the arguments of `policy_loss`."""
        by_row = self._loss_mode == "sapo" or options.get("loss_agg_mode") == "seq-mean-token-mean"
        if by_row and self._config.entropy_top_normalize == "selected":
            # The op divides a row by the number of its tokens instead of the sum of their weights.
            total = weight.sum(-1, keepdim=True)
            weight = weight * torch.where(total > 0, tokens.mask.sum(-1, keepdim=True) / total, 0.0)
        of_rollout = options.get("rollout_is_weights")
        return weight if of_rollout is None else weight * of_rollout

    def note_shares(self, mask: Tensor, response_mask: Tensor) -> None:
        """Keeps the lowest and the highest selected share of a response, for `extreme_shares`: both masks [B, S]."""
        tokens = (response_mask != 0).sum(-1)
        share = mask.sum(-1) / tokens.clamp(min=1)
        self.shares.append(torch.where(tokens > 0, torch.stack([-share, share]), -torch.inf).amax(-1))

    def extreme_shares(self) -> dict[str, Tensor]:
        """The lowest and the highest share of its tokens that the rule selected of a response, over the micro-batches
        so far and all ranks; 0 without responses. A collective."""
        if not self.shares:
            return {}
        ends = torch.stack(self.shares).amax(0)
        if self._group is not None:
            dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._group)
        lowest, highest = torch.where(ends.isinf(), 0.0, ends).unbind()
        return {LOWEST_SHARE: 0 - lowest, HIGHEST_SHARE: highest}

    def _weighted(self, metrics: dict[str, Tensor], response_mask: Tensor, renamed: bool) -> dict[str, Tensor]:
        tokens, weighted = response_mask.sum(), {}
        for name, value in metrics.items():
            total = self.response_tokens
            if renamed and name in movement_metrics(self._loss_mode):
                # The unselected tokens entered the mean as unmoved, so it is a sum over the selected ones.
                name, total = f"{name}_selected", self.trained
            weighted[name] = value * tokens / total.clamp(min=1)
        return weighted

    def _own_rank(self) -> int:
        return 0 if self._group is None else dist.get_rank(self._group)

    def _gather(self, own: Tensor) -> Tensor:
        """[n] of each rank to [ranks, n]."""
        if self._group is None:
            return own[None]
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(gathered, own, group=self._group)
        return torch.stack(gathered)

    def _all_reduce(self, value: Tensor) -> Tensor:
        if self._group is None:
            return value
        value = value.clone()
        dist.all_reduce(value, group=self._group)
        return value


# Options of `covariance_mask` and of `policy_loss`: keys of an actor configuration, and those of its `policy_loss`.
_CLIP = ("clip_ratio", "clip_ratio_low", "clip_ratio_high")
_CHOICE = ("loss_mode", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio")
_COVARIANCE = (_CLIP, _CHOICE)
_POLICY_LOSS = ((*_CLIP, "clip_ratio_c", "tau_pos", "tau_neg"), (*_CHOICE, "ppo_kl_coef", "dro_beta"))


def _options(actor: Any, names: tuple[Sequence[str], Sequence[str]]) -> dict[str, Any]:
    own, of_policy_loss = names
    return {name: actor[name] for name in own} | {name: actor.policy_loss[name] for name in of_policy_loss}
