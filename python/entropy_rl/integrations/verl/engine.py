"""What verl's engines do when the ratio is set.

`install` is called by the actor's configuration, in the process that trains and before its engine is built: importing
verl's engines any earlier, as a plugin, would settle on a platform before others have registered theirs.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine.fsdp import transformer_impl as fsdp

from entropy_rl.integrations.verl.loss import MICRO_BATCH_TOKENS
from entropy_rl_ext import logprob_entropy

_MARK = "_entropy_rl"


def install(kernel: str) -> None:
    """Prepares this process's engines; a second time is harmless.

    Args:
        kernel: what computes log-probs and entropies: "entropy_rl", `logprob_entropy` of this package, or "verl".
    """
    for name in ("fsdp", "megatron"):
        module = sys.modules.get(f"verl.workers.engine.{name}.transformer_impl")
        if module is not None:
            _replace(module, "prepare_micro_batches", _with_token_counts)
    if kernel == "entropy_rl":
        _replace(fsdp.FSDPEngineWithLMHead, "prepare_model_outputs", _with_logprob_entropy)


def _replace(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    if not hasattr(original, _MARK):
        wrapped = functools.wraps(original)(wrap(original))
        setattr(wrapped, _MARK, True)
        setattr(owner, name, wrapped)


def _with_token_counts(prepare_micro_batches: Callable[..., Any]) -> Callable[..., Any]:
    """Tells each micro-batch how many response tokens every micro-batch of the optimizer step has, on all ranks.

    The number of tokens to be selected follows from that alone, so that the divisor of the loss is known before the
    first forward. And the engine is asked for entropies, whatever `calculate_entropy` says.
    """

    def wrapped(data: TensorDict, dp_group: Any = None, **options: Any) -> tuple[list[TensorDict], Any]:
        micro_batches, indices = prepare_micro_batches(data, dp_group=dp_group, **options)
        if "advantages" in data:  # what trains the actor, and no inference or critic
            counts = _all_gather(torch.stack([_tokens(micro_batch) for micro_batch in micro_batches]), dp_group)
            for micro_batch in micro_batches:
                tu.assign_non_tensor(micro_batch, **{MICRO_BATCH_TOKENS: counts}, calculate_entropy=True)
        return micro_batches, indices

    return wrapped


def _tokens(micro_batch: TensorDict) -> Tensor:
    mask = micro_batch["response_mask"]
    return (mask.values() if mask.is_nested else mask).bool().sum()


def _all_gather(counts: Tensor, group: Any) -> tuple[int, ...]:
    """[M] on each rank -> all ranks' counts. verl gives every rank the same number of micro-batches."""
    counts = counts.to(get_device_id())
    ranks = [torch.empty_like(counts) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(ranks, counts, group=group)
    return tuple(torch.cat(ranks).tolist())


def _with_logprob_entropy(prepare_model_outputs: Callable[..., Any]) -> Callable[..., Any]:
    """Log-probs and entropies in one float32 pass over the logits, where verl has logits to offer.

    verl's own entropy is in the dtype of the logits: in bfloat16 it is up to 0.1 nat off, and ties at the threshold.
    """

    def wrapped(
        self: fsdp.FSDPEngine, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, **options: Any
    ) -> dict[str, Tensor]:
        others = ("use_fused_kernels", "distillation_use_topk", "distillation_only", "calculate_sum_pi_squared")
        if any(tu.get_non_tensor_data(data=micro_batch, key=key, default=False) for key in others):
            return prepare_model_outputs(self, output, output_args, micro_batch, **options)
        logits = output.logits
        if isinstance(logits, DTensor):  # split over the vocabulary
            logits = logits.full_tensor()
        offsets = micro_batch["input_ids"].offsets()
        targets = output_args["input_ids_rmpad_rolled"]
        if tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
            values = log_prob_and_entropy(logits.squeeze(0), targets, output_args["temperature_rmpad"])
            values = [self._gather_and_unpad_packed(value, output_args["pad_size"]) for value in values]
        else:
            inside = torch.arange(logits.shape[1], device=logits.device) < offsets.diff()[:, None]
            targets = torch.zeros_like(inside, dtype=targets.dtype).masked_scatter(inside, targets)
            values = log_prob_and_entropy(logits, targets, output_args["temperature"][:, None], inside)
            values = [value[inside] for value in values]
        log_prob, entropy = (torch.nested.nested_tensor_from_jagged(value, offsets) for value in values)
        outputs = {"log_probs": log_prob}
        if tu.get_non_tensor_data(data=micro_batch, key="calculate_entropy", default=False):
            outputs["entropy"] = entropy
        return outputs

    return wrapped


def log_prob_and_entropy(
    logits: Tensor, targets: Tensor, temperature: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`logprob_entropy` of [..., V] logits. The loss detaches an entropy that needs no gradient, which then is free."""
    return logprob_entropy(logits, targets, mask=mask, temperature=temperature, entropy_grad=torch.is_grad_enabled())
