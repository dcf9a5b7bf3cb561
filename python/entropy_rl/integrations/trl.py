"""TRL's GRPO on the tokens of highest entropy: `EntropyGRPOConfig` and `EntropyGRPOTrainer` (docs/trl.md).

The trainer replaces two methods of TRL's. `_get_per_token_logps_and_entropies` computes log-probabilities and entropies
with this package's ops, and `get_high_entropy_mask` selects tokens with `entropy_rl.selection`. The loss is TRL's own
for every loss_type.
"""

import contextlib
import inspect
import math
import operator
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from entropy_rl.extras import installed_version
from entropy_rl.integrations import install_tested, missing_hook, warn_if_untested
from entropy_rl.report.rollouts import Rollout, make_rollouts, write_rollouts
from entropy_rl.scores import FUNCTION, SCORES, names_function
from entropy_rl.selection import (
    OPTIONS,
    Ranks,
    Rule,
    Scope,
    StepSelection,
    TokenSelection,
    by_choice,
    contradiction,
    load_functions,
    prepass,
    select_tokens,
)
from entropy_rl_ext import linear_logprob_entropy

# What this module replaces or calls in TRL, beside its documented functions.
HOOKS = {
    "trl:GRPOTrainer._compute_loss": "self, model, inputs",
    "trl:GRPOTrainer.get_high_entropy_mask": "self, entropies, mask, threshold",
    "trl:GRPOTrainer._get_per_token_logps_and_entropies": (
        "self, model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, ..."
    ),
    "trl:GRPOConfig": (
        "..., top_entropy_quantile, steps_per_generation, gradient_accumulation_steps, importance_sampling_level, "
        "loss_type, beta, epsilon, epsilon_high, entropy_coef, use_adaptive_entropy, entropy_target"
    ),
    "trl.trainer.utils:_ChunkedLogProbFunction.forward": (
        "ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs"
    ),
    "trl.trainer.utils:_use_triton": "device",
    "trl.models.utils:disable_gradient_checkpointing": "model, gradient_checkpointing_kwargs",
}
# The attributes of a trainer that this module reads.
ATTRIBUTES = (
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "loss_type",
    "beta",
    "epsilon_low",
    "epsilon_high",
    "_entropy_bonus_enabled",
    "_last_world_entropy",
    "_step",
    "_buffered_inputs",
    "_metrics",
)

if installed_version("trl") is None:
    raise ImportError(f"entropy_rl.integrations.trl needs TRL, which is not installed: {install_tested('trl')}")
_missing = missing_hook("trl", HOOKS)
if _missing is not None:
    raise ImportError(_missing)
warn_if_untested("trl")

import trl.trainer.utils  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.models.utils import disable_gradient_checkpointing  # noqa: E402

Normalize = Literal["selected", "response"]
LMHead = Literal["selected_rows", "trl"]
CHOICES = {
    "entropy_top_rule": get_args(Rule),
    "entropy_top_scope": get_args(Scope),
    "entropy_top_ranks": get_args(Ranks),
    "entropy_top_normalize": get_args(Normalize),
    "entropy_lm_head": get_args(LMHead),
}

# The tokens over which a loss_type averages. dr_grpo and luspo do not divide by a number of tokens. If the
# selection is made before the optimizer step, bnpo averages over the tokens of the step.
MEAN_OVER = {
    "dapo": "batch",
    "cispo": "batch",
    "vespo": "batch",
    "bnpo": "micro_batch",
    "grpo": "sequence",
    "sapo": "sequence",
}

# Loss types without a clip range, and TRL's names of the numbers that the other tokens may have apart.
UNCLIPPED = ("sapo", "vespo")
TRL_NAMES = {"clip_ratio_low": "epsilon", "clip_ratio_high": "epsilon_high", "kl_loss_coef": "beta"}

# TRL's metrics that are means over tokens, or over sequences under importance_sampling_level="sequence".
CLIP_RATIO_MEANS = {"cispo_clip_ratio", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}


def _of_trl(key: str) -> str:
    """The text of a key with TRL's name of the number."""
    name = key.split(".")[1]
    return OPTIONS[key].replace(name, TRL_NAMES[name])


@dataclass
class EntropyGRPOConfig(GRPOConfig):
    """`GRPOConfig` with the options of the selection. The `help` of each field documents it.

    Raises:
        ValueError: a value that is not allowed, or that contradicts another option; the message names them.
    """

    entropy_top_ratio: float | None = field(default=None, metadata={"help": OPTIONS["entropy_top_ratio"]})
    entropy_top_score: str = field(default="entropy", metadata={"help": OPTIONS["entropy_top_score"]})
    entropy_top_rule: Rule = field(default="topk", metadata={"help": OPTIONS["entropy_top_rule"]})
    entropy_top_scope: Scope = field(
        default="micro_batch",
        metadata={"help": OPTIONS["entropy_top_scope"] + " Both last ones cost one more forward without gradient."},
    )
    entropy_top_ranks: Ranks = field(default="local", metadata={"help": OPTIONS["entropy_top_ranks"]})
    entropy_top_normalize: Normalize = field(default="selected", metadata={"help": OPTIONS["entropy_top_normalize"]})
    entropy_rest_weight: float = field(default=0.0, metadata={"help": OPTIONS["entropy_rest.weight"]})
    entropy_rest_clip_ratio_low: float | None = field(
        default=None, metadata={"help": _of_trl("entropy_rest.clip_ratio_low")}
    )
    entropy_rest_clip_ratio_high: float | None = field(
        default=None, metadata={"help": _of_trl("entropy_rest.clip_ratio_high")}
    )
    entropy_rest_kl_loss_coef: float | None = field(
        default=None, metadata={"help": _of_trl("entropy_rest.kl_loss_coef")}
    )
    entropy_veto_probability: float | None = field(default=None, metadata={"help": OPTIONS["entropy_veto.probability"]})
    entropy_veto_entropy: float | None = field(default=None, metadata={"help": OPTIONS["entropy_veto.entropy"]})
    token_weight: str | None = field(default=None, metadata={"help": OPTIONS["token_weight"]})
    entropy_lm_head: LMHead = field(
        default="selected_rows",
        metadata={
            "help": "What computes log-probabilities and entropies if entropy_top_ratio is set. selected_rows: this "
            "package's op, whose backward multiplies only the tokens that have a gradient. trl: TRL's own, which "
            "multiplies all tokens."
        },
    )
    rollout_data_dir: str | None = field(
        default=None,
        metadata={
            "help": "A directory for the completions of every optimizer step, as STEP.jsonl: texts, rewards and "
            "advantages, and for each token its id, its entropy, its log-probability and whether it was selected. "
            "`entropy-rl inspect --rollouts` makes a page of them."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        score = self.entropy_top_score
        if score not in SCORES and not names_function(score):
            raise ValueError(f"entropy_top_score is {score!r}; it must be one of {', '.join((*SCORES, FUNCTION))}")
        self._check_weights()
        found = contradiction(self)
        if found is not None:
            key, reason = (text.replace("entropy_rest.", "entropy_rest_") for text in (found.key, found.reason))
            raise ValueError(f"{key.replace('.', '_')} is {found.value!r}; {reason}")
        ratio = self.entropy_top_ratio
        if ratio is None:
            return
        if not 0 < ratio <= 1:
            raise ValueError(f"entropy_top_ratio is {ratio}; it must be above 0 and at most 1, or None")
        if self.top_entropy_quantile != 1:
            raise ValueError(
                f"entropy_top_ratio is {ratio} and top_entropy_quantile is {self.top_entropy_quantile}; set one of "
                "them: the first selects tokens by this trainer's rules, the second by TRL's own"
            )
        load_functions(self)
        self._check_ranges()
        window = self.gradient_accumulation_steps
        if self.entropy_top_scope != "micro_batch" and self.steps_per_generation % window:
            raise ValueError(
                f"entropy_top_scope is {self.entropy_top_scope!r} and steps_per_generation is "
                f"{self.steps_per_generation}; it must be a multiple of gradient_accumulation_steps, {window}, so that "
                "the completions of an optimizer step exist when it begins"
            )
        if self.importance_sampling_level == "sequence":
            warnings.warn(
                "importance_sampling_level is 'sequence': all tokens of a sequence share one ratio, so all of them "
                "train, and the selection only weights sequences by their selected tokens",
                stacklevel=3,
            )
        bonus = self.entropy_coef != 0 or self.use_adaptive_entropy
        weighs = self.entropy_rest_weight or self.entropy_veto_probability is not None or self.token_weight is not None
        if bonus and weighs:
            raise ValueError(
                f"entropy_coef is {self.entropy_coef} and tokens have weights (entropy_rest_weight, entropy_veto_* or "
                "token_weight); set one of them, because TRL would weight the bonus as it weights the loss"
            )
        if bonus and self.entropy_top_normalize == "selected" and MEAN_OVER.get(self.loss_type) == "sequence":
            raise ValueError(
                f"entropy_top_normalize is 'selected' with an entropy bonus and loss_type {self.loss_type!r}; it must "
                "be 'response' there, because TRL would weight the bonus by sequence, as it weights the loss"
            )

    def _check_weights(self) -> None:
        rest, probability, entropy = self.entropy_rest_weight, self.entropy_veto_probability, self.entropy_veto_entropy
        if not (math.isfinite(rest) and rest >= 0):
            raise ValueError(f"entropy_rest_weight is {rest}; it must be a number of at least 0")
        for name in TRL_NAMES:
            value = getattr(self, f"entropy_rest_{name}")
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"entropy_rest_{name} is {value}; it must be a number of at least 0, or None")
        if probability is not None and not 0 < probability <= 1:
            raise ValueError(f"entropy_veto_probability is {probability}; it must be above 0 and at most 1, or None")
        if entropy is not None and not (math.isfinite(entropy) and entropy > 0):
            raise ValueError(f"entropy_veto_entropy is {entropy}; it must be a number above 0, or None")
        if self.token_weight is not None and not names_function(self.token_weight):
            raise ValueError(f"token_weight is {self.token_weight!r}; it must be {FUNCTION}, or None")

    def _check_ranges(self) -> None:
        """Raises ValueError if the tokens that were not selected have a number of their own that has no effect."""
        for name in TRL_NAMES:
            key, value = f"entropy_rest_{name}", getattr(self, f"entropy_rest_{name}")
            if value is None:
                continue
            if self.importance_sampling_level == "sequence":
                raise ValueError(f"{key} is {value}; importance_sampling_level 'sequence' has one ratio per sequence")
            if name == "kl_loss_coef":
                if not (self.beta or value):
                    raise ValueError(f"{key} is {value}; beta is {self.beta}, so there is no KL penalty")
                continue
            if self.loss_type in UNCLIPPED or (self.loss_type == "cispo" and name == "clip_ratio_low"):
                end = "does not clip" if self.loss_type in UNCLIPPED else "has no lower clip ratio"
                raise ValueError(f"{key} is {value}; loss_type {self.loss_type!r} {end}")


class EntropyGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer`, the policy gradient on the tokens of highest entropy.

    Takes what `GRPOTrainer` takes, with an `EntropyGRPOConfig` as `args`. Beside TRL's metrics it logs
    `entropy_token_ratio`, the selected share of the completion tokens, its extremes over the completions
    (`entropy_token_ratio/min` and `/max`), and `entropy_threshold`, the lowest selected entropy in nats
    (`score_threshold` for another score). With `entropy_veto_probability` it logs `entropy_veto_ratio`, the share that
    never trains. All cover all processes and micro-batches of an optimizer step; means are weighted by tokens.
    """

    loss_type: str  # TRL sets it

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: EntropyGRPOConfig | None = None, *rest: Any, **named: Any
    ):
        if not isinstance(args, EntropyGRPOConfig):
            raise TypeError(f"args is {type(args).__name__}; an EntropyGRPOConfig was expected")
        beta, rest_beta = args.beta, args.entropy_rest_kl_loss_coef
        # TRL loads the reference model, and computes its log-probabilities, only for a beta other than 0.
        args.beta = beta or rest_beta or beta
        try:
            super().__init__(model, reward_funcs, args, *rest, **named)
        finally:
            args.beta = beta
        missing = [name for name in ATTRIBUTES if not hasattr(self, name)]
        if missing:
            raise ImportError(
                f"GRPOTrainer of trl {trl.__version__} lacks {', '.join(missing)}: {install_tested('trl')}"
            )
        if args.entropy_top_ratio is not None:
            self.top_entropy_quantile = 0.0  # below 1, TRL's loss asks for the mask
        self._lm_head_is_ours = args.entropy_top_ratio is not None and args.entropy_lm_head == "selected_rows"
        if self._lm_head_is_ours and is_deepspeed_zero3_enabled():
            self._lm_head_is_ours = False
            warnings.warn(
                "entropy_lm_head is 'selected_rows', but DeepSpeed ZeRO-3 gathers the LM head during the forward only; "
                "TRL's own LM head, which gathers it again in the backward, computes log-probabilities and entropies",
                stacklevel=2,
            )
        # The selection of the optimizer step; if none is made before it, of the micro-batch.
        self._selection: StepSelection  # set by `_begin_selection`
        # If the selection is made before the step, for each of its micro-batches: its part of it, and the prepass's
        # log-probabilities and entropies, each [B, T].
        self._tokens: list[TokenSelection] = []
        self._scores: list[tuple[Tensor, Tensor]] = []
        # State while the loss of a micro-batch is computed: its inputs, and what corrects the entropy bonus, [].
        self._loss_inputs: dict[str, Any] | None = None
        self._bonus_correction: Tensor | float = 0.0
        self._selected_tokens: Tensor | None = None  # [4]: sums over the step that `_log_selection` reports
        self._shares: list[Tensor] = []  # those of StepSelection, over the step
        self._recorded: dict[str, Tensor] = {}  # of the micro-batch: log_probs, entropies and selected, each [B, T]
        # With rollout_data_dir:
        self._rewards: Tensor  # [completions of all processes], set by `_calculate_rewards`
        self._rollouts: list[Rollout] = []  # of the optimizer step
        if args.rollout_data_dir is not None:
            Path(args.rollout_data_dir).mkdir(parents=True, exist_ok=True)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        self._recorded = {}
        if self.args.entropy_top_ratio is None:
            loss = super()._compute_loss(model, inputs)
        else:
            loss = self._selected_loss(model, inputs)
        if self.args.rollout_data_dir is not None and self.model.training:
            self._record(inputs)
        return loss

    def _selected_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        before_step, loss_type = self._selects_before_step(), self.loss_type
        if not before_step or self._position() == 0:
            self._begin_selection(inputs)
        self._loss_inputs, entropy_coef = inputs, self._applied_entropy_coef()
        numbers = {name: getattr(self, name) for name in ("epsilon_low", "epsilon_high", "beta")}
        if before_step and loss_type == "bnpo":  # dapo is the same loss, and takes its divisor as an input
            self.loss_type, inputs = "dapo", inputs | {"num_items_in_batch": self._num_items_of_bnpo()}
        try:
            loss = super()._compute_loss(model, inputs) - entropy_coef * self._bonus_correction
        finally:
            self._loss_inputs, self._bonus_correction, self.loss_type = None, 0.0, loss_type
            self.__dict__.update(numbers)
        if before_step and self._position() == self.args.gradient_accumulation_steps - 1:
            self._join_metrics()
        return loss

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """The tokens of a micro-batch that train, by this trainer's rule and over its ranks.

        Args:
            entropies: [B, T] float, nats.
            mask: [B, T], nonzero = completion token.
            threshold: 1 - the share to keep, in [0, 1]. 1 keeps as much as the smallest share keeps. The loss ignores
                it and uses `entropy_top_ratio`.

        Returns:
            [B, T] bool. In the loss, if tokens have weights, those; and with `entropy_top_normalize="selected"` the
            factor of each token that turns TRL's mean over completion tokens into the (weighted) one over selected
            tokens.
        """
        args, inputs = self.args, self._loss_inputs
        if inputs is None:
            ratio = max(1 - threshold, sys.float_info.min)
            alone = args.entropy_top_scope == "sequence"
            rule, ranks = args.entropy_top_rule, args.entropy_top_ranks
            return select_tokens(entropies, mask, ratio, rule, ranks, per_sequence=alone)[0]
        selection = self._selection
        if selection.before_step:
            tokens, lowest = self._tokens[self._position()], selection.threshold
            if self._entropy_bonus_enabled:
                self._bonus_correction = self._correct_bonus(entropies, tokens.mask)
        else:
            log_probs, advantages = self._recorded["log_probs"], _advantages(inputs, mask)
            scores = selection.score(self._number(), log_probs, entropies, advantages, mask)
            selected, lowest = selection.select(scores, mask)
            tokens = selection.weigh(selected, log_probs, entropies, advantages, mask)
        self._set_ranges(tokens.chosen())
        self._log_selection(tokens, mask, lowest)
        self._recorded["selected"] = tokens.mask
        weights = tokens.weights()
        if args.entropy_top_normalize == "response":
            return weights
        return weights * self._normalization(weights, mask, inputs)

    def _set_ranges(self, chosen: Tensor) -> None:
        """Gives TRL's loss of this micro-batch tensors [B, T] in place of the numbers that the other tokens have apart;
        `chosen` are the selected ones."""
        args, log_prob = self.args, self._recorded["log_probs"]
        own = {"epsilon_low": self.epsilon_low, "epsilon_high": self.epsilon_high, "beta": args.beta}
        for (name, value), key in zip(own.items(), TRL_NAMES, strict=True):
            rest = getattr(args, f"entropy_rest_{key}")
            if rest is not None:
                of_tokens = by_choice(chosen, value, rest, log_prob)
                setattr(self, name, _Coefficients(of_tokens) if name == "beta" else of_tokens)
        if isinstance(self.epsilon_low, Tensor) or isinstance(self.epsilon_high, Tensor):
            # torch.clamp takes two numbers or two tensors.
            for name in ("epsilon_low", "epsilon_high"):
                value = getattr(self, name)
                setattr(self, name, value if isinstance(value, Tensor) else log_prob.new_full((), value))

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with _lm_head(self._score) if self._lm_head_is_ours else contextlib.nullcontext():
            found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if kwargs.get("compute_entropy"):
            self._recorded |= {"log_probs": found[0].detach(), "entropies": found[1].detach()}
        return found

    # ---- The completions of a step, for rollout_data_dir

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)  # [completions of all processes, functions]
        weighted = rewards * self.reward_weights.to(rewards.device)
        self._rewards = weighted.nansum(-1).masked_fill(rewards.isnan().all(-1), torch.nan)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.args.rollout_data_dir is not None:
            output["rewards"] = self._rewards.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        return output

    def _record(self, inputs: dict[str, Any]) -> None:
        """Keeps the completions of a micro-batch, and writes those of the optimizer step after its last one."""
        mask, advantages = inputs["completion_mask"], inputs["advantages"]
        prompts = zip(inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True)
        step = self.state.global_step + 1
        self._rollouts += make_rollouts(
            getattr(self.processing_class, "tokenizer", self.processing_class),
            [ids[inside].tolist() for ids, inside in prompts],
            inputs["completion_ids"],
            mask,
            step=step,
            scores=inputs["rewards"],
            advantages=(advantages[:, None] if advantages.ndim == 1 else advantages).expand_as(mask),
            entropies=self._recorded.get("entropies"),
            log_probs=self._recorded.get("log_probs"),
            selected=self._recorded.get("selected"),
        )
        if not self.accelerator.sync_gradients:
            return
        rollouts, self._rollouts = gather_object(self._rollouts), []
        if self.accelerator.is_main_process:
            write_rollouts(Path(self.args.rollout_data_dir) / f"{step}.jsonl", rollouts)

    # ---- The selection

    def _selects_before_step(self) -> bool:
        return self.model.training and self.args.entropy_top_scope != "micro_batch"  # evaluation has no optimizer steps

    def _position(self) -> int:
        """The number of this micro-batch in its optimizer step."""
        return self._step % self.args.gradient_accumulation_steps

    def _number(self) -> int:
        """The number of this micro-batch among those that `_begin_selection` counts."""
        return self._step % self.args.steps_per_generation if self.model.training else 0

    def _begin_selection(self, inputs: dict[str, Any]) -> None:
        """Counts the tokens of the generation, which `num_items_in_batch` spans. Unless the scope is
        micro_batch it also selects the tokens of the optimizer step that begins."""
        args = self.args
        selection = self._selection = StepSelection(args, in_micro_batches=not self.model.training)
        micro_batches = self._buffered_inputs if self.model.training else [inputs]
        tokens = torch.stack([_loss_mask(micro_batch).sum() for micro_batch in micro_batches])
        seed = args.seed * 1_000_003 + self.state.global_step
        selection.count_tokens(tokens, args.gradient_accumulation_steps, seed=seed)
        if not selection.before_step:
            return
        micro_batches = micro_batches[self._number() :][: args.gradient_accumulation_steps]
        with (
            prepass(self.accelerator.device),
            disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs),
        ):
            self._scores = [self._log_probs_and_entropies(micro_batch) for micro_batch in micro_batches]
        log_prob, entropy = map(torch.cat, zip(*self._scores, strict=True))
        mask = torch.cat([_loss_mask(micro_batch) for micro_batch in micro_batches])
        advantages = torch.cat([_advantages(micro_batch, _loss_mask(micro_batch)) for micro_batch in micro_batches])
        rows = [len(scores) for scores, _ in self._scores]
        tokens_of_step = selection.select_mini_batch(log_prob, entropy, mask, advantages=advantages, seed=seed)
        self._tokens = tokens_of_step.split(rows)

    def _log_probs_and_entropies(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        # `inputs` also holds images and the like, under the names of the method's parameters.
        names = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        log_probs, entropies, _ = self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
            compute_entropy=True,
            **{name: value for name, value in inputs.items() if name in names},
        )
        return log_probs, entropies

    # ---- The divisor of the loss

    def _normalization(self, weights: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor | float:
        """Completion tokens per selected token, or per weight, among those that this loss_type averages over: [],
        [B, 1] or 1."""
        selection, number = self._selection, self._number()
        match MEAN_OVER.get(self.args.loss_type):
            case "sequence":
                return mask.sum(-1, keepdim=True) / _or_one(weights.sum(-1, keepdim=True))
            case "micro_batch" if selection.before_step:
                return selection.competing_tokens(number).clamp(min=1) / _or_one(selection.competing_weight)
            case "micro_batch":
                return mask.sum() / _or_one(weights.sum())
            case "batch":
                return inputs["num_items_in_batch"] / _or_one(selection.divisor(number, weights))
            case _:
                return 1.0

    # ---- Means over the optimizer step that TRL takes over a micro-batch

    def _competing_processes(self) -> int:
        return self.accelerator.num_processes if self.args.entropy_top_ranks == "global" else 1

    def _num_items_of_bnpo(self) -> Tensor:
        """[]: the `num_items_in_batch` with which dapo, the KL penalty included, is the mean over the completion tokens
        of the optimizer step. TRL scales it from all processes to one, and from the whole generation to a step."""
        processes = self.accelerator.num_processes / self._competing_processes()
        steps = self.args.steps_per_generation / self.current_gradient_accumulation_steps
        return self._selection.competing_tokens(self._number()).clamp(min=1) * processes * steps

    def _correct_bonus(self, entropies: Tensor, selected: Tensor) -> Tensor:
        """[]: what turns TRL's bonus, the mean entropy of a micro-batch, into its share of the mean over the step."""
        total = (entropies * selected).sum()
        theirs = total / selected.sum().clamp(min=1) / self.current_gradient_accumulation_steps
        return total * self._competing_processes() / self._selection.competing_weight.clamp(min=1) - theirs

    def _applied_entropy_coef(self) -> float:
        """TRL's coefficient of the bonus in this optimizer step. TRL may adapt it at the end of the step."""
        applied = not self.use_adaptive_entropy or self._last_world_entropy <= self.args.entropy_target
        return self.entropy_coef if applied else 0.0

    # ---- Metrics

    def _log_selection(self, selected: TokenSelection, mask: Tensor, lowest: Tensor) -> None:
        self._selection.note_shares(selected.chosen(), mask)
        self._shares.append(self._selection.shares[-1])
        tokens = mask.sum()
        vetoed = torch.zeros_like(tokens) if selected.vetoed is None else selected.vetoed.sum()
        sums = torch.stack([selected.chosen().sum(), tokens, lowest * tokens, vetoed]).double()
        self._selected_tokens = sums if self._selected_tokens is None else self._selected_tokens + sums
        mode = "train" if self.model.training else "eval"
        if mode == "train" and not self.accelerator.sync_gradients:
            return
        chosen, tokens, threshold, vetoed = self.accelerator.reduce(self._selected_tokens, reduction="sum").tolist()
        self._selection.shares, self._shares, self._selected_tokens = self._shares, [], None
        shares = {name.removeprefix("actor/"): share.item() for name, share in self._selection.extreme_shares().items()}
        threshold_name = self._selection.threshold_name.removeprefix("actor/")
        logged = {"entropy_token_ratio": chosen / max(tokens, 1), threshold_name: threshold / max(tokens, 1)}
        if self.args.entropy_veto_probability is not None:
            logged["entropy_veto_ratio"] = vetoed / max(tokens, 1)
        for name, value in (logged | shares).items():
            self._metrics[mode][name].append(value)

    def _join_metrics(self) -> None:
        """Replaces TRL's metrics of the micro-batches by those of the step. TRL would log their unweighted mean."""
        args, end = self.args, self._number() + 1
        tokens = self._selection.tokens.sum(0)[end - args.gradient_accumulation_steps : end].tolist()
        means = {"entropy", "kl"} | (CLIP_RATIO_MEANS if args.importance_sampling_level == "token" else set())
        if self._tokens[-1].mask.shape[1] == 1:
            # TRL takes one column for a value of each sequence, and micro-batches have the same number of sequences.
            means = set()
        for name, values in self._metrics["train"].items():
            parts = values[-args.gradient_accumulation_steps :]
            if name in means:
                joined = sum(map(operator.mul, parts, tokens)) / max(sum(tokens), 1)
            elif name == "clip_ratio/low_min":  # NaN if a micro-batch has no tokens
                joined = min((part for part in parts if not math.isnan(part)), default=math.nan)
            elif name == "clip_ratio/high_max":
                joined = max((part for part in parts if not math.isnan(part)), default=math.nan)
            elif name == "policy_loss" and MEAN_OVER.get(args.loss_type) in ("batch", "micro_batch"):
                joined = sum(parts)  # each is what its micro-batch adds to the mean over the step
            else:
                continue
            values[-len(parts) :] = [joined]

    # ---- Log-probabilities and entropies

    def _score(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N] int64
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = (),
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        """[N] log-probabilities and entropies, in the signature of TRL's fused LM head."""
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        known = self._known_scores(len(targets))
        log_prob, entropy = linear_logprob_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            mask=None if known is None else known[0],
            temperature=temperature,
            entropy_grad=self._entropy_bonus_enabled,
            logit_scale=logit_scale,
            softcap=softcap,
        )
        if known is not None:
            selected, *rest = known
            log_prob, entropy = (torch.where(selected, *pair) for pair in zip((log_prob, entropy), rest, strict=True))
        return log_prob, entropy if "entropy" in outputs else None, None, None, None

    def _known_scores(self, scored: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """If the loss reads only the prepass's values of unselected tokens: the tokens that train, and the prepass's
        log-probabilities and entropies, each [N]. None outside the loss, or if other tokens may have a gradient."""
        inputs, args = self._loss_inputs, self.args
        others_train = self.beta != 0 or self._entropy_bonus_enabled or args.importance_sampling_level != "token"
        if inputs is None or not self._selects_before_step() or others_train:
            return None
        position, completion = self._position(), inputs["completion_mask"] != 0
        log_prob, entropy = self._scores[position]
        known = self._tokens[position].mask[completion], log_prob[completion], entropy[completion]
        # With soft prompts (PEFT), TRL scores one more token of each sequence.
        return known if len(known[0]) == scored else None


class _Coefficients:
    """One coefficient for each token, [B, T], in place of TRL's `beta`: TRL's loss asks whether it is 0, and multiplies
    it with the tokens' estimates."""

    def __init__(self, of_tokens: Tensor) -> None:
        self.of_tokens = of_tokens

    def __ne__(self, other: object) -> bool:
        return True

    def __mul__(self, estimates: Tensor) -> Tensor:
        return self.of_tokens * estimates


@contextlib.contextmanager
def _lm_head(score: Any) -> Iterator[None]:
    """Context in which the fused LM head that TRL gives to models computes its outputs with `score`.

    Everything around the head (sharded and split weights, adapters, experts) remains TRL's.
    """
    module = trl.trainer.utils
    # TRL skips the positions that are not scored only if it would use Triton, which it does on CUDA only.
    replaced = {"_ChunkedLogProbFunction": SimpleNamespace(apply=score), "_use_triton": lambda device: True}
    originals = {name: getattr(module, name) for name in replaced}
    vars(module).update(replaced)
    try:
        yield
    finally:
        vars(module).update(originals)


def _or_one(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, 1)


def _advantages(inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """[B, T]: the advantage of each token."""
    advantages: Tensor = inputs["advantages"]
    return advantages if advantages.dim() == 2 else advantages[:, None].expand(mask.shape)


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    """[B, T]: the completion tokens that enter the loss."""
    mask: Tensor = inputs["completion_mask"]
    return mask if inputs.get("tool_mask") is None else mask * inputs["tool_mask"]
