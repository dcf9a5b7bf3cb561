"""Changes to verl's engines for `entropy_top_ratio`.

The actor's configuration calls `install` in the process that trains, before its engine is built. A plugin must not
import verl's engines: that would fix the platform before others have registered theirs.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.experimental import torch_functional
from verl.utils.kernel import linear_cross_entropy
from verl.utils.ulysses import ulysses_pad_and_slice_inputs
from verl.workers.engine.fsdp import transformer_impl as fsdp
from verl.workers.utils.padding import no_padding_2_padding, response_from_nested

from entropy_rl.integrations.verl import loss
from entropy_rl.lm_head import patched_forward
from entropy_rl.selection import StepSelection, prepass
from entropy_rl_ext import linear_logprob_entropy, logprob_entropy

_MARK = "_entropy_rl"


def install(kernel: str) -> None:
    """Changes the engines of this process. A second call changes nothing more.

    Args:
        kernel: what computes log-probs and entropies. "entropy_rl": this package's `logprob_entropy` in FSDP engines,
            and with use_fused_kernels `linear_logprob_entropy` in both. "verl": verl's own functions.
    """
    for name, engine in (("fsdp", "FSDPEngine"), ("megatron", "MegatronEngine")):
        module = sys.modules.get(f"verl.workers.engine.{name}.transformer_impl")
        if module is not None:
            _replace(module, "prepare_micro_batches", _with_numbers)
            _replace(getattr(module, engine), "forward_backward_batch", _with_selection)
    if kernel == "entropy_rl":
        _replace(fsdp.FSDPEngineWithLMHead, "prepare_model_outputs", _with_logprob_entropy)
        _replace(fsdp.FSDPEngineWithLMHead, "forward_step", _with_fused_head)
        # The fused forwards of the models call the first with impl_backend torch or liger, the second with triton.
        _replace(torch_functional.FusedLinearForPPO, "forward", _with_fused_linear)
        _replace(linear_cross_entropy, "linear_cross_entropy", _with_linear_cross_entropy)
        megatron = sys.modules.get("verl.workers.engine.megatron.transformer_impl")
        if megatron is not None:
            _replace(megatron.MegatronEngineWithLMHead, "forward_step", _with_sharded_head)
            fused = sys.modules["verl.models.mcore.model_forward_fused"]
            _replace(fused, "preprocess_thd_engine", _with_packed_rows)
            _replace(fused, "gather_from_sequence_parallel_region", _with_full_gradient)
            _replace(fused, "linear_cross_entropy", _with_sharded_linear)


def _replace(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    if not hasattr(original, _MARK):
        wrapped = functools.wraps(original)(wrap(original))
        setattr(wrapped, _MARK, True)
        setattr(owner, name, wrapped)


def _with_numbers(prepare_micro_batches: Callable[..., Any]) -> Callable[..., Any]:
    """Numbers the micro-batches of an optimizer step, and tells its selection how many response tokens each has.

    The engine then computes entropies, whatever `calculate_entropy` says.
    """

    def wrapped(data: TensorDict, dp_group: Any = None, **options: Any) -> tuple[list[TensorDict], Any]:
        micro_batches, indices = prepare_micro_batches(data, dp_group=dp_group, **options)
        step = tu.get_non_tensor_data(data, loss.STEP, None)
        if step is not None:
            # verl gives every rank the same number of micro-batches.
            counts = [_values(micro_batch["response_mask"]).bool().sum() for micro_batch in micro_batches]
            seed = _seed() if step.draws and not step.before_step else 0
            step.count_tokens(torch.stack(counts).to(get_device_id()), seed=seed)
            own_seed = seed + (0 if dp_group is None else dist.get_rank(dp_group)) * len(micro_batches)
            for number, micro_batch in enumerate(micro_batches):
                fields = {loss.NUMBER: number, loss.SEED: own_seed + number}
                tu.assign_non_tensor(micro_batch, **fields, calculate_entropy=True)
        return micro_batches, indices

    return wrapped


def _with_selection(forward_backward_batch: Callable[..., Any]) -> Callable[..., Any]:
    """Adds a StepSelection to the batch of an optimizer step and, unless the scope is micro_batch, makes the selection.

    The selection of each token is in fields of the batch, of which verl gives each micro-batch its rows.
    """

    def wrapped(self: Any, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
        config = getattr(loss_function, "keywords", {}).get("config")
        if not forward_only and loss.applies(config):
            step = StepSelection(config, self.get_data_parallel_group())
            if step.before_step:
                # The loss of a distillation reads all tokens.
                only_selected = loss_function.func is loss.ppo_loss and loss.only_selected(config)
                forward = functools.partial(forward_backward_batch, self, data, None, forward_only=True)
                _select_mini_batch(step, data, config, forward, only_selected)
            tu.assign_non_tensor(data, **{loss.STEP: step})
        return forward_backward_batch(self, data, loss_function, forward_only)

    return wrapped


def _select_mini_batch(
    step: StepSelection, data: TensorDict, config: Any, forward: Callable[[], Any], only_selected: bool
) -> None:
    mask = data["response_mask"]  # [B, S], nested or padded
    log_prob, entropy = _old_policy(data) if step.old_policy else _prepass(data, forward)
    batch = (log_prob, entropy, mask, data["old_log_probs"], data["advantages"])
    log_prob, entropy, response_mask, old_log_prob, advantages = (_padded(x).to(get_device_id()) for x in batch)
    tokens = step.select_mini_batch(
        log_prob,
        entropy,
        response_mask,
        old_log_prob=old_log_prob,
        advantages=advantages,
        seed=_seed() if step.draws else 0,
        only_selected=only_selected,
    )
    for name, key in loss.TOKENS.items():
        value = getattr(tokens, name)
        if value is not None:
            value = value.to(mask.device, _values(mask).dtype if value.dtype == torch.bool else None)
            data[key] = _nested(value, mask.offsets()) if mask.is_nested else value


def _old_policy(data: TensorDict) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, [B, S], that the trainer computed with the old policy."""
    if "entropy" not in data:
        raise RuntimeError(
            "actor_rollout_ref.actor.entropy_top_source=old_policy, but the batch has no entropies of the old policy: "
            "the trainer keeps none (algorithm.rollout_correction.bypass_mode, or trainer.use_v1=false); "
            "entropy_top_source must be prepass here"
        )
    return data["old_log_probs"], data["entropy"]


def _prepass(data: TensorDict, forward: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, [B, S], from a forward before the optimizer step."""
    tu.assign_non_tensor(data, calculate_entropy=True)
    with prepass(torch.device(get_device_name())):
        output = forward()["model_output"]
    mask = data["response_mask"]
    log_prob, entropy = (
        response_from_nested(output[name], mask) if mask.is_nested else no_padding_2_padding(output[name], data)
        for name in ("log_probs", "entropy")
    )
    return log_prob, entropy


def _seed() -> int:
    """A random number that all ranks get: those with the same tokens must draw the same. A collective."""
    seed = torch.randint(2**62, ()).to(get_device_id())
    dist.broadcast(seed, 0)
    return int(seed)


def _values(tensor: Tensor) -> Tensor:
    return tensor.values() if tensor.is_nested else tensor


def _padded(tensor: Tensor) -> Tensor:
    return tensor.to_padded_tensor(0) if tensor.is_nested else tensor


def _nested(padded: Tensor, offsets: Tensor) -> Tensor:
    """The inverse of `_padded`: [B, S] and [B + 1] to a nested tensor."""
    inside = torch.arange(padded.shape[1], device=offsets.device) < offsets.diff()[:, None]
    return torch.nested.nested_tensor_from_jagged(padded[inside], offsets)


def _with_logprob_entropy(prepare_model_outputs: Callable[..., Any]) -> Callable[..., Any]:
    """Computes log-probs and entropies in one float32 pass over the logits, if the engine has logits.

    verl computes its entropy in the dtype of the logits. In bfloat16 it is up to 0.1 nat wrong, and many entropies tie
    at the threshold.
    """

    def wrapped(
        self: fsdp.FSDPEngine, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, **options: Any
    ) -> dict[str, Tensor]:
        others = ("use_fused_kernels", "distillation_use_topk", "distillation_only", "calculate_sum_pi_squared")
        if any(tu.get_non_tensor_data(data=micro_batch, key=key, default=False) for key in others):
            return prepare_model_outputs(self, output, output_args, micro_batch, **options)
        logits = output.logits
        if isinstance(logits, DTensor):  # sharded over the vocabulary
            logits = logits.full_tensor()
        offsets = micro_batch["input_ids"].offsets()
        targets = output_args["input_ids_rmpad_rolled"]
        if tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
            values: Sequence[Tensor] = log_prob_and_entropy(
                logits.squeeze(0), targets, output_args["temperature_rmpad"]
            )
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
    """`logprob_entropy` of [..., V] logits. The entropy's gradient costs nothing if the loss detaches the entropy."""
    return logprob_entropy(logits, targets, mask=mask, temperature=temperature, entropy_grad=torch.is_grad_enabled())


class _FusedHead(NamedTuple):
    """The LM head of the model whose forward runs."""

    module: Any  # an FSDP engine's
    rows: tuple[Tensor, int] | None = None  # mask of the rows that the loss reads, and their number; None: all rows
    # A Megatron engine's: the rows as a nested tensor, before verl packs them; entries of the unpadded vocabulary.
    unpacked_rows: Tensor | None = None
    vocab_size: int | None = None


_fused_head: ContextVar[_FusedHead | None] = ContextVar("_fused_head", default=None)


def _with_fused_head(forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """Tells the fused kernels which head they compute and, when the actor trains, which rows the loss reads."""

    def wrapped(self: Any, micro_batch: TensorDict, *args: Any, **options: Any) -> Any:
        if not tu.get_non_tensor_data(data=micro_batch, key="use_fused_kernels", default=False):
            return forward_step(self, micro_batch, *args, **options)
        trains = "advantages" in micro_batch
        head = _FusedHead(self.module.get_output_embeddings(), _rows(self, micro_batch) if trains else None)
        token = _fused_head.set(head)
        try:
            return forward_step(self, micro_batch, *args, **options)
        finally:
            _fused_head.reset(token)

    return wrapped


def _rows(engine: Any, micro_batch: TensorDict) -> tuple[Tensor, int] | None:
    """The rows that the loss reads, and their number.

    Both are of this rank's inputs: under Ulysses of its slice of the packed sequences.
    """
    rows = _unpacked_rows(micro_batch)
    if rows is None:
        return None
    if tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
        # As the engine pads and slices the input ids.
        packed = rows.values()[None]
        mask = nn.functional.pad(packed, (0, engine._get_packed_pad_size(packed.shape[1])))
        if engine.use_ulysses_sp:
            mask, _, _ = ulysses_pad_and_slice_inputs(mask, sp_size=engine.ulysses_sequence_parallel_size)
    else:
        # verl pads to the longest sequence of the micro-batch; a nested tensor may remember a longer one.
        lengths = micro_batch["input_ids"].offsets().diff()
        mask = rows.to_padded_tensor(0, output_size=(len(lengths), int(lengths.max())))
    count = int(mask.sum())  # on the CPU: verl moves the micro-batch to the device later
    return mask.to(get_device_id()), count


def _unpacked_rows(micro_batch: TensorDict) -> Tensor | None:
    """1 for the rows of the selected tokens if only those meet the LM head, else of the response tokens: nested as the
    input ids, int64."""
    only_selected = loss.TOKENS["log_prob"] in micro_batch
    mask = micro_batch[loss.TOKENS["mask"] if only_selected else "response_mask"]
    input_ids = micro_batch["input_ids"]
    if not mask.is_nested:
        return None
    # A response is the end of its sequence, and each row scores the token after it.
    shift = input_ids.offsets()[1:] - 1 - mask.offsets()[1:]
    index = torch.arange(len(mask.values()), device=shift.device) + shift.repeat_interleave(mask.offsets().diff())
    rows = torch.zeros_like(input_ids.values())
    rows[index] = mask.values().bool().to(rows.dtype)
    return torch.nested.nested_tensor_from_jagged(rows, input_ids.offsets())


def _with_sharded_head(forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """`_with_fused_head` for the Megatron engine."""

    def wrapped(self: Any, micro_batches: Iterator[TensorDict], *args: Any, **options: Any) -> Any:
        micro_batch = next(micro_batches)
        trains = "advantages" in micro_batch
        head = _FusedHead(
            module=None,
            unpacked_rows=_unpacked_rows(micro_batch) if trains else None,
            vocab_size=self.model_config.hf_config.get_text_config().vocab_size,
        )
        token = _fused_head.set(head)
        try:
            return forward_step(self, iter([micro_batch]), *args, **options)
        finally:
            _fused_head.reset(token)

    return wrapped


def _with_packed_rows(preprocess_thd_engine: Callable[..., Any]) -> Callable[..., Any]:
    """Packs the rows that the loss reads as verl packs the labels: with its padding and its slice of the context."""

    def wrapped(input_ids: Tensor, *args: Any, need_roll: bool = False, **options: Any) -> Any:
        head = _fused_head.get()
        if need_roll and head is not None and head.unpacked_rows is not None:
            unpacked = head.unpacked_rows
            packed, *_ = preprocess_thd_engine(unpacked.to(input_ids.device), *args, **options)
            # Of the whole context, so at least those of this rank.
            count = int(unpacked.values().sum())
            _fused_head.set(head._replace(rows=(packed, count)))
        return preprocess_thd_engine(input_ids, *args, need_roll=need_roll, **options)

    return wrapped


def _with_full_gradient(gather: Callable[..., Any]) -> Callable[..., Any]:
    """The fused forward gathers hidden states with this for its head only, whose backward already adds up the ranks."""

    def wrapped(hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        return gather(hidden, *args, **options | {"tensor_parallel_output_grad": False})

    return wrapped


def _with_sharded_linear(linear_cross_entropy: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        reduction: str,
        dist_process_group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        assert reduction == "none"
        return fused_log_prob_and_entropy(
            hidden.flatten(0, -2), weight, labels.flatten(), temperature, dist_process_group
        )

    return wrapped


def _with_fused_linear(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        return fused_log_prob_and_entropy(hidden_states, vocab_weights, input_ids, temperature)

    return wrapped


def _with_linear_cross_entropy(linear_cross_entropy: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if reduction != "none" or dist_process_group is not None:  # not from the fused forward of a model of FSDP's
            return linear_cross_entropy(hidden, weight, labels, temperature, reduction, dist_process_group)
        return fused_log_prob_and_entropy(hidden, weight, labels, temperature)

    return wrapped


def fused_log_prob_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """`linear_logprob_entropy` of [..., H] hidden states on the rows that the loss reads: both [...], 0 elsewhere.

    With `group`, `weight` is this rank's shard of a vocabulary that is split evenly.
    """
    head = _fused_head.get()
    mask = count = None
    if head is not None and head.rows is not None:
        mask, count = head.rows
        mask = mask.view_as(targets)
    shard: dict[str, Any] = {}
    if group is not None:
        start, padded = dist.get_rank(group) * weight.shape[0], dist.get_world_size(group) * weight.shape[0]
        vocab_size = padded if head is None or head.vocab_size is None else head.vocab_size
        shard = {"vocab_start": start, "vocab_size": vocab_size, "group": group}

    def score(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, entropy = linear_logprob_entropy(
            hidden,
            weight,
            targets,
            mask=mask,
            max_mask_rows=count,
            temperature=temperature,
            entropy_grad=torch.is_grad_enabled(),
            **shard,
        )
        return log_prob, entropy

    if head is None or not isinstance(weight, DTensor):
        return score(hidden, weight)
    # FSDP2 shards an LM head that is not tied to the embeddings separately, and gathers it during its forward only.
    with patched_forward(head.module, lambda hidden: torch.stack(score(hidden, head.module.weight), -1)):
        log_prob, entropy = head.module(hidden).unbind(-1)
    return log_prob, entropy
