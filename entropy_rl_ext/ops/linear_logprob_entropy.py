"""linear_logprob_entropy: log-probability and entropy of the LM head's logits, without holding all of them.

Rows outside the mask are not multiplied with the head; rows whose incoming gradients are zero are left out of the
backward (`_row_index.py`). The others are multiplied one tile of rows and vocabulary at a time (`_linear_tiles.py`).
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ._autograd import register_autograd, register_no_derivative
from ._fakes import check_same_device, check_tensors
from ._linear_tiles import (
    BEFORE_TARGET,
    DOT,
    MAX,
    SQUARES,
    SUM,
    TARGET,
    Head,
    Options,
    accumulate_dtype,
    backward_tiles,
    forward_tiles,
)
from ._mask import check_mask
from ._options import check_options
from ._row_index import RowIndex
from ._temperature import split_temperature, temperature_tensor


@check_options
def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy_grad: bool = False,
    chunk_rows: int | None = None,
    max_grad_rows: int | None = None,
    max_mask_rows: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    token_statistics: bool = False,
) -> tuple[Tensor, ...]:
    """`logprob_entropy` of an LM head's logits: of softmax(z / temperature), where

        y = logit_scale * (hidden @ weight.T + bias),   z = softcap * tanh(y / softcap), or y without a soft-cap.

    Never holds [rows, V]. In matrix products of 2·rows·H·V operations, the forward takes one over the rows of the mask,
    and the backward three over the rows with a non-zero gradient: one recomputes the logits, two give the gradients.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64.
        weight: [V, H], of the same dtype. Under autocast both may be of any of these dtypes, and are multiplied in
            autocast's.
        targets: [...], any integer dtype, in the vocabulary. Where `mask` is 0 a target may be anything (-100, say).
        bias: [V].
        mask: [...], any dtype, nonzero = in. Other rows are not read; they give 0 and a zero gradient. Floats must be 0
            or 1.
        temperature: a number in [2^-126, 2^126], or a tensor that broadcasts to [...], one value a row. Where `mask`
            is 0 a row's may be anything.
        entropy_grad: whether the entropy carries a gradient. An entropy bonus needs it; selection does not.
        chunk_rows: rows of a tile; None chooses. A tile takes chunk_rows * min(V, 2048) * 4 bytes on the CPU and
            chunk_rows * min(V, 8192) * 4 on CUDA (8 instead of 4 for float64).
        max_grad_rows: an upper bound on the rows with a non-zero gradient. Without it the backward on CUDA waits once
            for the device to count them. None: `max_mask_rows`.
        max_mask_rows: the same for the rows of the mask, in the forward.
        logit_scale: above 0 (Cohere, Granite).
        softcap: above 0 (Gemma 2's final_logit_softcapping).
        vocab_start: with `group`, index in the vocabulary of the first row of this rank's `weight`.
        vocab_size: entries of the unsharded vocabulary. Rows of `weight` beyond it are padding: they are not read, and
            their gradient is 0. None: all rows of `weight`; required with `group`.
        group: process group over which the vocabulary is sharded. Every rank calls with the same `hidden`,
            `targets` and `mask` and its own rows of `weight` and `bias`, any number of them; all get the same
            results. The forward all-reduces a few numbers a row, twice. The backward all-reduces the gradient of
            `hidden`, over the rows that have one.
        token_statistics: also return two values a row, described below, that carry no gradient.

    Returns:
        (log_prob, entropy), both [...], in nats, float32 (float64 for float64 inputs). Products are summed in
        float32 and not rounded before the softmax; both gradients are summed in float32, then rounded to the dtype
        of their tensor. With `token_statistics` also is_top1 [...] bool, whether the target is the first largest
        logit, and sum_squared_probs [...], sum p^2.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, numbers out of range, a target outside the
            vocabulary, a float in `mask` that is neither 0 nor 1, more rows than `max_grad_rows` or `max_mask_rows`.
        TypeError: an argument of another type, such as a list.

    On CUDA, looking at values would wait for the device. There a bad target, per-row temperature or value of `mask`
    gives NaN for its row (is_top1 is not affected). With more mask rows than `max_mask_rows` all outputs are NaN
    (is_top1 is False); with more gradient rows than `max_grad_rows` all gradients are NaN.

    The backward multiplies gradients of the logits that are rounded to a 16-bit dtype of the inputs on CUDA, and to
    bfloat16 on a CPU with AMX. There `torch.set_float32_matmul_precision("highest")` keeps them in float32. Each
    product sets PyTorch's precision of float32 products, which is one for all threads, to bfloat16 while it runs.

    Source: the idea of a fused linear log-probability is that of Liger Kernel, cut-cross-entropy and TRL; leaving out
    the rows without a gradient follows from "Beyond the 80/20 Rule", arXiv 2506.01939.
    """
    check_tensors(hidden=hidden, weight=weight, targets=targets, optional={"bias": bias, "mask": mask})
    number, row_temperature = split_temperature(temperature, hidden)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.entropy_rl.linear_logprob_entropy(
        hidden,
        weight,
        targets,
        bias,
        mask,
        number,
        row_temperature,
        entropy_grad,
        chunk_rows=chunk_rows,
        max_grad_rows=max_grad_rows,
        max_mask_rows=max_mask_rows,
        logit_scale=logit_scale,
        softcap=softcap,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        group=None if group is None else group.group_name,
        token_statistics=token_statistics,
    )
    return outputs if token_statistics else outputs[:2]


@torch.library.impl("entropy_rl::linear_logprob_entropy", "CompositeImplicitAutograd")
def _linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    row_temperature: Tensor | None = None,
    entropy_grad: bool = False,
    *,
    compute_dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device = hidden.device.type
    if compute_dtype is None and hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        compute_dtype = torch.get_autocast_dtype(device)
    log_prob, entropy, is_top1, sum_squared_probs, _ = torch.ops.entropy_rl.linear_logprob_entropy_forward(
        hidden,
        weight,
        targets,
        bias,
        mask,
        temperature_tensor(temperature, row_temperature, mask),
        compute_dtype=compute_dtype,
        **options,
    )
    return log_prob, entropy if entropy_grad else entropy.detach(), is_top1, sum_squared_probs


# ---- Forward and backward


def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor,
    *,
    token_statistics: bool = False,
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = Options(**keywords)
    _check_tensors(hidden, weight, targets, bias, mask, temperature, options)
    _check_options(weight, options)
    head = Head.of(hidden, weight, bias, options)
    shape = hidden.shape[:-1]
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    check_mask("mask", mask)
    inside = None if mask is None else mask.reshape(-1) != 0
    if not _is_number(temperature):
        temperature = temperature.reshape(-1).to(head.accumulate)
    if not hidden.is_cuda:
        _check_values(targets, inside, temperature, head.vocab_size)

    rows = RowIndex(hidden.shape[0])
    if inside is not None:
        rows = RowIndex.of(inside, "max_mask_rows", options.max_mask_rows)
    targets = rows.take(targets)
    temperature = rows.take(temperature) if temperature.dim() else temperature
    state = forward_tiles(head, head.factors(rows.take(hidden)), targets, temperature, token_statistics)
    maximum, total, dot, target = (state[column] for column in (MAX, SUM, DOT, TARGET))
    log_sum = total.log()
    # Rounding can make the entropy negative, which the exact one never is.
    entropy = (log_sum - dot / total).clamp(min=0)
    log_prob = (target - torch.where(maximum == -torch.inf, 0.0, maximum)) / temperature.double() - log_sum
    log_prob = torch.where((targets >= 0) & (targets < head.vocab_size), log_prob, torch.nan)
    is_top1, sum_squared_probs = hidden.new_empty(0, dtype=torch.bool), hidden.new_empty(0, dtype=head.accumulate)
    if token_statistics:
        is_top1 = rows.put((target >= maximum) & (target > state[BEFORE_TARGET])).view(shape)
        sum_squared_probs = rows.put((state[SQUARES] / total**2).to(head.accumulate)).view(shape)
    return (
        rows.put(log_prob.to(head.accumulate)).view(shape),
        rows.put(entropy.to(head.accumulate)).view(shape),
        is_top1,
        sum_squared_probs,
        rows.put(torch.stack([maximum, log_sum], 1).to(head.accumulate)).view(*shape, 2),
    )


def _backward(
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor,
    entropy: Tensor,
    max_log_sum: Tensor,
    needs: list[bool],
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(**keywords)
    _check_tensors(hidden, weight, targets, bias, mask, temperature, options)
    _check_options(weight, options)
    _check_row_values(
        hidden, grad_log_prob=grad_log_prob, grad_entropy=grad_entropy, entropy=entropy, max_log_sum=max_log_sum
    )
    needs_hidden, needs_weight, needs_bias = needs[0], needs[1], needs[2] and bias is not None
    head = Head.of(hidden, weight, bias, options, backward=True)
    shape, hidden_dtype = hidden.shape, hidden.dtype

    def by_row(values: Tensor, *columns: int) -> Tensor:
        return values.reshape(-1, *columns).to(head.accumulate)

    gradients = [None if gradient is None else by_row(gradient) for gradient in (grad_log_prob, grad_entropy)]
    hidden = hidden.reshape(-1, shape[-1])
    active = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    for gradient in gradients:
        if gradient is not None:
            active |= gradient != 0
    if mask is not None:
        active &= mask.reshape(-1) != 0
    bound = options.max_mask_rows if options.max_grad_rows is None else options.max_grad_rows
    rows = RowIndex.of(active, "max_grad_rows", bound)

    gradients = [None if gradient is None else rows.take(gradient) for gradient in gradients]
    if rows.overflow is not None:
        gradients = [None if g is None else g.masked_fill_(rows.overflow, torch.nan) for g in gradients]
    row_values = [
        *gradients,
        rows.take(by_row(entropy)),
        rows.take(by_row(max_log_sum, 2)),
        rows.take(targets.reshape(-1).long()),
        temperature if _is_number(temperature) else rows.take(by_row(temperature)),
    ]
    grad_hidden, grad_weight, grad_bias = backward_tiles(
        head, head.factors(rows.take(hidden)), row_values, weight, [needs_hidden, needs_weight, needs_bias]
    )
    if needs_hidden and head.group is not None:
        dist.all_reduce(grad_hidden, group=head.group)
    grad_hidden = grad_hidden.to(hidden_dtype)
    return (
        rows.put(grad_hidden).view(shape) if needs_hidden else grad_hidden,
        grad_weight,
        grad_bias if bias is None else grad_bias.to(bias.dtype),
    )


for _device in ("CPU", "CUDA"):
    torch.library.impl("entropy_rl::linear_logprob_entropy_forward", _device)(_forward)
    torch.library.impl("entropy_rl::linear_logprob_entropy_backward", _device)(_backward)


# ---- Checks


_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# As kTemperatureRange and is_temperature in csrc.
_TEMPERATURE_RANGE = "it must be a finite number above 0 that float32 can invert, in [2^-126, 2^126]"
_TEMPERATURES = (2.0**-126, 2.0**126)


def _check_tensors(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor,
    options: Options,
) -> None:
    """Raises ValueError for tensors that do not fit, without looking at their values."""
    for name, tensor in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        if tensor is not None and tensor.dtype not in _FLOATING:
            raise ValueError(f"{name} is {_name(tensor.dtype)}; it must be float32, float64, bfloat16 or float16")
    row_temperature = None if _is_number(temperature) else temperature
    check_same_device(hidden=hidden, weight=weight, targets=targets, bias=bias, mask=mask, temperature=row_temperature)
    if hidden.dim() < 1:
        raise ValueError("hidden has no dimension; it must be [..., H]")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight has shape {list(weight.shape)}; it must be [V, {hidden.shape[-1]}], the last dimension of hidden"
        )
    if weight.shape[0] == 0 and options.group is None:
        raise ValueError(f"weight has shape {list(weight.shape)}; the vocabulary must hold at least one entry")
    if options.compute_dtype is None and weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight is {_name(weight.dtype)} and hidden {_name(hidden.dtype)}; outside autocast they must have the "
            "same dtype"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets is {_name(targets.dtype)}; it must be an integer dtype")
    rows = hidden.shape[:-1]
    for name, tensor in {"targets": targets, "mask": mask}.items():
        if tensor is not None and tensor.shape != rows:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {list(rows)}, one value for each row")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {list(bias.shape)}; it must be {list(weight.shape[:1])}, one a vocabulary entry"
        )
    if _is_number(temperature):
        if not _TEMPERATURES[0] <= temperature.item() <= _TEMPERATURES[1]:
            raise ValueError(f"temperature is {temperature.item():g}; {_TEMPERATURE_RANGE}")
    elif temperature.shape != rows or temperature.dtype not in _FLOATING:
        raise ValueError(
            f"temperature is {_name(temperature.dtype)} of shape {list(temperature.shape)}; it must be a number, or "
            f"floating and of shape {list(rows)}, one value for each row"
        )


def _check_row_values(hidden: Tensor, **values: Tensor | None) -> None:
    """Raises ValueError for gradients, or results of the forward, that do not fit the rows of `hidden`."""
    check_same_device(hidden=hidden, **values)
    for name, tensor in values.items():
        shape = (*hidden.shape[:-1], 2) if name == "max_log_sum" else hidden.shape[:-1]
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in _FLOATING):
            raise ValueError(
                f"{name} is {_name(tensor.dtype)} of shape {list(tensor.shape)}; it must be floating and of shape "
                f"{list(shape)}"
            )


def _check_options(weight: Tensor, options: Options) -> None:
    for name, least in {"chunk_rows": 1, "max_grad_rows": 0, "max_mask_rows": 0}.items():
        bound = getattr(options, name)
        if bound is not None and bound < least:
            raise ValueError(f"{name} is {bound}; it must be {least} or above, or None")
    if not 0 < options.logit_scale < torch.inf:
        raise ValueError(f"logit_scale is {options.logit_scale}; it must be a finite number above 0")
    if options.softcap is not None and not 0 < options.softcap < torch.inf:
        raise ValueError(f"softcap is {options.softcap}; it must be a finite number above 0, or None")
    vocab_start, vocab_size, unsharded = options.vocab_start, options.vocab_size, options.group is None
    if vocab_start < 0 or (vocab_start > 0 and unsharded):
        raise ValueError(f"vocab_start is {vocab_start}; it must be 0, or with group 0 or above")
    if vocab_size is not None and (vocab_size < 1 or (unsharded and vocab_size > weight.shape[0])):
        allowed = f"in [1, {weight.shape[0]}], the rows of weight" if unsharded else "1 or above"
        raise ValueError(f"vocab_size is {vocab_size}; it must be {allowed}")


def _is_number(temperature: Tensor) -> bool:
    """Whether it is one number for all rows, as `temperature_tensor` makes it."""
    return temperature.dim() == 0 and temperature.device.type == "cpu" and temperature.dtype == torch.float64


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_values(targets: Tensor, inside: Tensor | None, temperature: Tensor, vocab_size: int) -> None:
    """Raises ValueError for bad values on the CPU, where looking at them waits for nothing. All are [rows]."""
    outside = (targets < 0) | (targets >= vocab_size)
    if inside is not None:
        outside &= inside
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"targets[{row}] (flat index) is {int(targets[row])}; it must be in [0, {vocab_size}), the vocabulary"
        )
    if temperature.dim():
        bad = ~((temperature >= _TEMPERATURES[0]) & (temperature <= _TEMPERATURES[1]))
        if inside is not None:
            bad &= inside
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(f"temperature[{row}] (flat index) is {float(temperature[row]):g}; {_TEMPERATURE_RANGE}")


# ---- Fakes and autograd


@torch.library.register_fake("entropy_rl::linear_logprob_entropy_forward")
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor,
    *,
    token_statistics: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_same_device(hidden=hidden, weight=weight, targets=targets, bias=bias, mask=mask)
    dtype, rows = accumulate_dtype(hidden), hidden.shape[:-1]
    optional = rows if token_statistics else (0,)
    return (
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(optional, dtype=torch.bool),
        hidden.new_empty(optional, dtype=dtype),
        hidden.new_empty((*rows, 2), dtype=dtype),
    )


@torch.library.register_fake("entropy_rl::linear_logprob_entropy_backward")
def _(
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor,
    entropy: Tensor,
    max_log_sum: Tensor,
    needs: list[bool],
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0, hidden.shape[-1])),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        weight.new_empty(0, dtype=accumulate_dtype(hidden))
        if bias is None
        else bias.new_empty(bias.shape if needs[2] else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
    hidden, weight, targets, bias, mask, temperature = inputs
    _, entropy, is_top1, sum_squared_probs, max_log_sum = outputs
    ctx.mark_non_differentiable(is_top1, sum_squared_probs, max_log_sum)
    ctx.set_materialize_grads(False)
    ctx.options.pop("token_statistics", None)
    ctx.save_for_backward(hidden, weight, targets, bias, mask, temperature, entropy, max_log_sum)


def _autograd(ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    hidden, weight, targets, bias, mask, temperature, entropy, max_log_sum = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    gradients = torch.ops.entropy_rl.linear_logprob_entropy_backward(
        grad_log_prob,
        grad_entropy,
        hidden,
        weight,
        targets,
        bias,
        mask,
        temperature,
        entropy,
        max_log_sum,
        needs,
        **ctx.options,
    )
    grad_hidden, grad_weight, grad_bias = (
        gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
    )
    return grad_hidden, grad_weight, None, grad_bias, None, None


# hidden, weight, targets and bias; targets are integers.
register_autograd("linear_logprob_entropy_forward", _autograd, _setup_context, differentiable=4)
register_no_derivative("linear_logprob_entropy_backward", "second derivatives are not offered")


def _register_tile_op(name: str) -> None:
    """A tile op changes its argument and is called below autograd: it has no result to describe and no derivative."""
    op = getattr(torch.ops.entropy_rl, name)

    def fake(*_: Any) -> None:
        return None

    def autograd(*arguments: Any) -> None:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            raise RuntimeError(f"entropy_rl::{name} has no derivative: linear_logprob_entropy has")
        with torch._C._AutoDispatchBelowAutograd():
            op(*arguments)

    torch.library.register_fake(f"entropy_rl::{name}")(fake)
    torch.library.impl(f"entropy_rl::{name}", "Autograd")(autograd)


_register_tile_op("linear_logprob_entropy_tile_forward")
_register_tile_op("linear_logprob_entropy_tile_backward")
