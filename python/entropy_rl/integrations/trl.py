"""TRL's GRPO on the tokens of highest entropy: `EntropyGRPOConfig` and `EntropyGRPOTrainer` (docs/trl.md).

The trainer is TRL's, with two of its methods replaced: the one that scores a batch computes log-probabilities and
entropies with this package's ops, and the one that chooses high-entropy tokens chooses them with its selection. The
loss stays TRL's own, whatever the loss_type.
"""

import contextlib
import inspect
import math
import operator
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from entropy_rl.integrations import SUPPORTED, is_supported
from entropy_rl.selection import prepass, select_mini_batch, select_tokens, top_k_count
from entropy_rl_ext import linear_logprob_entropy

_INSTALL = f"pip install 'trl=={SUPPORTED['trl']}.*'"
try:
    import trl
except ImportError as error:
    raise ImportError(f"entropy_rl.integrations.trl needs TRL {SUPPORTED['trl']}: {_INSTALL}") from error
if not is_supported("trl", trl.__version__):
    raise ImportError(
        f"trl {trl.__version__} is installed; entropy_rl.integrations.trl supports TRL {SUPPORTED['trl']}: {_INSTALL}"
    )

import trl.trainer.utils  # noqa: E402
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.models.utils import disable_gradient_checkpointing  # noqa: E402

Rule = Literal["topk", "threshold", "quantile"]
Scope = Literal["micro_batch", "mini_batch"]
Ranks = Literal["local", "global"]
Normalize = Literal["selected", "response"]
LMHead = Literal["selected_rows", "trl"]
CHOICES = {
    "entropy_top_rule": get_args(Rule),
    "entropy_top_scope": get_args(Scope),
    "entropy_top_ranks": get_args(Ranks),
    "entropy_top_normalize": get_args(Normalize),
    "entropy_lm_head": get_args(LMHead),
}

# Over which tokens a loss_type takes its mean. dr_grpo and luspo divide by no number of tokens. Under the scope
# mini_batch bnpo's are those of the optimizer step.
MEAN_OVER = {
    "dapo": "batch",
    "cispo": "batch",
    "vespo": "batch",
    "bnpo": "micro_batch",
    "grpo": "sequence",
    "sapo": "sequence",
}

# TRL's metrics that are means over tokens, or over sequences under importance_sampling_level="sequence".
CLIP_RATIO_MEANS = {"cispo_clip_ratio", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}


@dataclass
class EntropyGRPOConfig(GRPOConfig):
    """`GRPOConfig` with what selects the tokens that train, each documented in its `help`.

    Raises:
        ValueError: a value that is not allowed, or does not go together with others; the message names them.
    """

    entropy_top_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of the completion tokens, those of highest entropy, that carry the policy gradient, in "
            "(0, 1]. None: all tokens, and the trainer is TRL's own."
        },
    )
    entropy_top_rule: Rule = field(
        default="topk",
        metadata={
            "help": "topk: exactly k = max(1, int(n * ratio + 0.9999)) of n tokens. threshold: the ties of the k-th "
            "too. quantile: TRL's rule, all tokens from the (1 - ratio) quantile up."
        },
    )
    entropy_top_scope: Scope = field(
        default="micro_batch",
        metadata={
            "help": "Which tokens compete: those of a micro_batch, or of the mini_batch of an optimizer step, all its "
            "micro-batches, at the cost of one more forward without gradient."
        },
    )
    entropy_top_ranks: Ranks = field(
        default="local", metadata={"help": "Over which processes tokens compete: local, each its own; global, all."}
    )
    entropy_top_normalize: Normalize = field(
        default="selected",
        metadata={
            "help": "What a mean over tokens divides by: selected tokens (Eq. 6 of the paper), or all tokens of the "
            "response (TRL). At ratio 0.2 the first gives a gradient five times the second's."
        },
    )
    entropy_lm_head: LMHead = field(
        default="selected_rows",
        metadata={
            "help": "What computes log-probabilities and entropies where entropy_top_ratio is set, in tiles. "
            "selected_rows: this package's op, whose backward multiplies the tokens with a gradient alone. trl: TRL's "
            "own, which multiplies all."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        ratio = self.entropy_top_ratio
        if ratio is None:
            return
        if not 0 < ratio <= 1:
            raise ValueError(f"entropy_top_ratio is {ratio}; it must be above 0 and at most 1, or None")
        if self.top_entropy_quantile != 1:
            raise ValueError(
                f"entropy_top_ratio is {ratio} and top_entropy_quantile is {self.top_entropy_quantile}; set one of "
                "them: the first is this trainer's, the second TRL's own choice of tokens"
            )
        window = self.gradient_accumulation_steps
        if self.entropy_top_scope == "mini_batch" and self.steps_per_generation % window:
            raise ValueError(
                f"entropy_top_scope is 'mini_batch' and steps_per_generation is {self.steps_per_generation}; it must "
                f"be a multiple of gradient_accumulation_steps, {window}, so that the completions of an optimizer "
                "step exist when it begins"
            )
        if self.importance_sampling_level == "sequence":
            warnings.warn(
                "importance_sampling_level is 'sequence': a sequence has one ratio for all its tokens, so that the "
                "selection weighs sequences by their selected tokens, and all of their tokens train",
                stacklevel=3,
            )
        bonus = self.entropy_coef != 0 or self.use_adaptive_entropy
        if bonus and self.entropy_top_normalize == "selected" and MEAN_OVER.get(self.loss_type) == "sequence":
            raise ValueError(
                f"entropy_top_normalize is 'selected' with an entropy bonus and loss_type {self.loss_type!r}; it must "
                "be 'response' there, because TRL would weigh the bonus by sequence, as it weighs the loss"
            )


class EntropyGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer`, the policy gradient on the tokens of highest entropy.

    Takes what `GRPOTrainer` takes, with an `EntropyGRPOConfig` as `args`. Beside TRL's metrics it logs
    `entropy_token_ratio`, the share of the completion tokens that train, and `entropy_threshold`, the lowest entropy
    among them in nats; both over all processes and micro-batches of an optimizer step, weighed by tokens.
    """

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: EntropyGRPOConfig | None = None, *rest: Any, **named: Any
    ):
        if not isinstance(args, EntropyGRPOConfig):
            raise TypeError(f"args is {type(args).__name__}; an EntropyGRPOConfig was expected")
        super().__init__(model, reward_funcs, args, *rest, **named)
        if args.entropy_top_ratio is not None:
            self.top_entropy_quantile = 0.0  # below 1, TRL's loss asks for the mask
        self._lm_head_is_ours = args.entropy_top_ratio is not None and args.entropy_lm_head == "selected_rows"
        if self._lm_head_is_ours and is_deepspeed_zero3_enabled():
            self._lm_head_is_ours = False
            warnings.warn(
                "entropy_lm_head is 'selected_rows' under DeepSpeed ZeRO-3, whose LM head is whole during the forward "
                "alone; TRL's own, which gathers it again for the backward, computes log-probabilities and entropies",
                stacklevel=2,
            )
        self._loss_inputs: dict[str, Any] | None = None  # of the micro-batch whose loss is being computed
        self._mini_batch: _Selection | None = None  # held for an optimizer step
        self._bonus_correction: Tensor | float = 0.0  # [], of the micro-batch whose loss is being computed
        self._selected_tokens: Tensor | None = None  # [3]: sums over the step that `_log_selection` reports

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.args.entropy_top_ratio is None:
            return super()._compute_loss(model, inputs)
        mini_batch, loss_type = self._is_mini_batch_scope(), self.loss_type
        if mini_batch and self._position() == 0:
            self._mini_batch = self._select_mini_batch()
        self._loss_inputs, entropy_coef = inputs, self._applied_entropy_coef()
        if mini_batch and loss_type == "bnpo":  # the same loss by another number, which can be given
            self.loss_type, inputs = "dapo", inputs | {"num_items_in_batch": self._num_items_of_bnpo()}
        try:
            loss = super()._compute_loss(model, inputs) - entropy_coef * self._bonus_correction
        finally:
            self._loss_inputs, self._bonus_correction, self.loss_type = None, 0.0, loss_type
        if mini_batch and self._position() == self.args.gradient_accumulation_steps - 1:
            self._join_metrics()
        return loss

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """The tokens of a micro-batch that train, by this trainer's rule and over its ranks.

        Args:
            entropies: [B, T] float, nats.
            mask: [B, T], nonzero = completion token.
            threshold: 1 - the share to keep, in [0, 1]; 1 keeps what the smallest share keeps. Within the loss
                `entropy_top_ratio` decides.

        Returns:
            [B, T] bool. Within the loss, with `entropy_top_normalize="selected"`, float: the factor of each token
            that turns TRL's mean over completion tokens into one over selected tokens.
        """
        inputs = self._loss_inputs
        if inputs is None:
            return self._select(entropies, mask, max(1 - threshold, sys.float_info.min))[0]
        if self._is_mini_batch_scope():
            selected, lowest = self._mini_batch.masks[self._position()], self._mini_batch.lowest
            if self._entropy_bonus_enabled:
                self._bonus_correction = self._correct_bonus(entropies, selected)
        else:
            selected, lowest = self._select(entropies, mask, self.args.entropy_top_ratio)
        self._log_selection(selected, mask, lowest)
        if self.args.entropy_top_normalize == "response":
            return selected
        return selected * self._normalization(selected, mask, inputs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if not self._lm_head_is_ours:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with _lm_head(self._score):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    # ---- Which tokens

    def _is_mini_batch_scope(self) -> bool:
        return self.model.training and self.args.entropy_top_scope == "mini_batch"  # evaluation has no optimizer steps

    def _position(self) -> int:
        """Of this micro-batch in its optimizer step."""
        return self._step % self.args.gradient_accumulation_steps

    def _select(self, entropies: Tensor, mask: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """The mask [B, T] of a micro-batch, and the lowest entropy that was selected."""
        args = self.args
        selected, metrics = select_tokens(entropies, mask, ratio, args.entropy_top_rule, args.entropy_top_ranks)
        return selected, metrics["actor/entropy_threshold"]

    def _select_mini_batch(self) -> "_Selection":
        """Of the optimizer step that begins."""
        args, begin = self.args, self._step % self.args.steps_per_generation
        micro_batches = self._buffered_inputs[begin : begin + args.gradient_accumulation_steps]
        with (
            prepass(self.accelerator.device),
            disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs),
        ):
            scores = [self._log_probs_and_entropies(inputs) for inputs in micro_batches]
        loss_masks = [_loss_mask(inputs) for inputs in micro_batches]
        masks, metrics = select_mini_batch(
            [entropy for _, entropy in scores],
            loss_masks,
            args.entropy_top_ratio,
            args.entropy_top_rule,
            args.entropy_top_ranks,
        )
        counts = torch.stack([part.sum() for part in (*loss_masks, *masks)]).view(2, -1)
        everywhere = self.accelerator.reduce(counts, reduction="sum")
        tokens, selected = (everywhere if args.entropy_top_ranks == "global" else counts).sum(1).clamp(min=1)
        return _Selection(masks, metrics["actor/entropy_threshold"], tokens, selected, everywhere[0], scores)

    def _log_probs_and_entropies(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        # Beside tokens and masks, images and the like, under the names that the method has for them.
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

    # ---- What their loss is divided by

    def _normalization(self, selected: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Tensor | float:
        """Completion tokens per selected token, of those that this loss_type takes its mean over: [], [B, 1] or 1."""
        mini_batch = self._mini_batch if self._is_mini_batch_scope() else None
        match MEAN_OVER.get(self.args.loss_type):
            case "sequence":
                return mask.sum(-1, keepdim=True) / selected.sum(-1, keepdim=True).clamp(min=1)
            case "micro_batch" if mini_batch is not None:
                return mini_batch.tokens / mini_batch.selected
            case "micro_batch":
                return mask.sum() / selected.sum().clamp(min=1)
            case "batch":
                here, everywhere = self._topk_counts(inputs)
                factor = inputs["num_items_in_batch"] / everywhere.clamp(min=1)
                if self.args.entropy_top_rule == "topk":
                    return factor
                # The other rules may keep more tokens than topk, and how many of the later micro-batches is not known
                # yet: those that competed together weigh by their topk count.
                count = selected.sum() if mini_batch is None else mini_batch.selected
                if mini_batch is None and self.args.entropy_top_ranks == "global":
                    count = self.accelerator.reduce(count, reduction="sum")
                return factor * here / count.clamp(min=1)
            case _:
                return 1.0

    def _topk_counts(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """How many tokens topk keeps, from lengths alone: of those that compete here, and over the span of
        `num_items_in_batch`, which is all that was generated at a time."""
        args, here = self.args, 0
        micro_batches: Sequence[dict[str, Any]] = [inputs]
        if self.model.training:
            micro_batches, here = self._buffered_inputs, self._step % args.steps_per_generation
        tokens = torch.stack([_loss_mask(micro_batch).sum() for micro_batch in micro_batches])
        if self._is_mini_batch_scope():
            tokens = tokens.view(-1, args.gradient_accumulation_steps).sum(-1)
            here //= args.gradient_accumulation_steps
        if args.entropy_top_ranks == "global":
            counts = top_k_count(self.accelerator.reduce(tokens, reduction="sum"), args.entropy_top_ratio)
            return counts[here], counts.sum()
        counts = top_k_count(tokens, args.entropy_top_ratio)
        return counts[here], self.accelerator.reduce(counts.sum(), reduction="sum")

    def _competing_processes(self) -> int:
        return self.accelerator.num_processes if self.args.entropy_top_ranks == "global" else 1

    # ---- Means that TRL takes over a micro-batch, over the optimizer step

    def _num_items_of_bnpo(self) -> Tensor:
        """[]: the `num_items_in_batch` with which dapo, the KL penalty too, is the mean over the completion tokens of
        the optimizer step. TRL scales it from all processes to one, and from all that was generated to a step."""
        processes = self.accelerator.num_processes / self._competing_processes()
        steps = self.args.steps_per_generation / self.current_gradient_accumulation_steps
        return self._mini_batch.tokens * processes * steps

    def _correct_bonus(self, entropies: Tensor, selected: Tensor) -> Tensor:
        """[]: what makes the mean entropy of a micro-batch, TRL's bonus, its share of the mean over the step."""
        total = (entropies * selected).sum()
        theirs = total / selected.sum().clamp(min=1) / self.current_gradient_accumulation_steps
        return total * self._competing_processes() / self._mini_batch.selected - theirs

    def _applied_entropy_coef(self) -> float:
        """What TRL multiplies the bonus with in this optimizer step, at whose end it may adapt the coefficient."""
        applied = not self.use_adaptive_entropy or self._last_world_entropy <= self.args.entropy_target
        return self.entropy_coef if applied else 0.0

    # ---- Metrics

    def _log_selection(self, selected: Tensor, mask: Tensor, lowest: Tensor) -> None:
        tokens = mask.sum()
        sums = torch.stack([selected.sum(), tokens, lowest * tokens]).double()
        self._selected_tokens = sums if self._selected_tokens is None else self._selected_tokens + sums
        mode = "train" if self.model.training else "eval"
        if mode == "train" and not self.accelerator.sync_gradients:
            return
        selected, tokens, threshold = self.accelerator.reduce(self._selected_tokens, reduction="sum").tolist()
        self._selected_tokens = None
        self._metrics[mode]["entropy_token_ratio"].append(selected / max(tokens, 1))
        self._metrics[mode]["entropy_threshold"].append(threshold / max(tokens, 1))

    def _join_metrics(self) -> None:
        """Makes of TRL's metrics of the micro-batches, of which it would log the plain mean, those of their whole."""
        args, tokens = self.args, self._mini_batch.micro_batch_tokens.tolist()
        means = {"entropy", "kl"} | (CLIP_RATIO_MEANS if args.importance_sampling_level == "token" else set())
        if self._mini_batch.masks[-1].shape[1] == 1:
            # TRL takes one column for a value of each sequence, and micro-batches have the same number of sequences.
            means = set()
        for name, values in self._metrics["train"].items():
            parts = values[-args.gradient_accumulation_steps :]
            if name in means:
                whole = sum(map(operator.mul, parts, tokens)) / max(sum(tokens), 1)
            elif name == "clip_ratio/low_min":  # NaN where a micro-batch has no tokens
                whole = min((part for part in parts if not math.isnan(part)), default=math.nan)
            elif name == "clip_ratio/high_max":
                whole = max((part for part in parts if not math.isnan(part)), default=math.nan)
            elif name == "policy_loss" and MEAN_OVER.get(args.loss_type) in ("batch", "micro_batch"):
                whole = sum(parts)  # each is what its micro-batch adds to the mean over the step
            else:
                continue
            values[-len(parts) :] = [whole]

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
        """Where the rest need not meet the head again: the tokens that train, and the prepass's log-probabilities and
        entropies, each [N]. None: outside the loss, or where other tokens may have a gradient too."""
        inputs, args = self._loss_inputs, self.args
        others_train = self.beta != 0 or self._entropy_bonus_enabled or args.importance_sampling_level != "token"
        if inputs is None or not self._is_mini_batch_scope() or others_train:
            return None
        position, completion = self._position(), inputs["completion_mask"] != 0
        log_prob, entropy = self._mini_batch.scores[position]
        known = self._mini_batch.masks[position][completion], log_prob[completion], entropy[completion]
        # Soft prompts (PEFT) make TRL score a token more of each sequence.
        return known if len(known[0]) == scored else None


@dataclass
class _Selection:
    """Of an optimizer step; lists have a [B, T] for each of its micro-batches."""

    masks: list[Tensor]
    lowest: Tensor  # []: entropy of a selected token
    tokens: Tensor  # []: how many competed, at least 1
    selected: Tensor  # []: how many of them train, at least 1
    micro_batch_tokens: Tensor  # [micro-batches]: how many tokens each has, over all processes
    scores: list[tuple[Tensor, Tensor]]  # log-probabilities and entropies of the prepass


@contextlib.contextmanager
def _lm_head(score: Any) -> Iterator[None]:
    """Within it, models that TRL has given a fused LM head compute log-probabilities and entropies by `score`.

    All that surrounds the head (sharded and split weights, adapters, experts) remains TRL's.
    """
    module = trl.trainer.utils
    # TRL asks for Triton to decide whether to leave out the positions that are not scored: it does on CUDA alone.
    replaced = {"_ChunkedLogProbFunction": SimpleNamespace(apply=score), "_use_triton": lambda device: True}
    originals = {name: getattr(module, name) for name in replaced}
    vars(module).update(replaced)
    try:
        yield
    finally:
        vars(module).update(originals)


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    """[B, T]: the completion tokens that the loss is over."""
    mask: Tensor = inputs["completion_mask"]
    return mask if inputs.get("tool_mask") is None else mask * inputs["tool_mask"]
