"""linear_logprob_entropy: log-probability and entropy of the LM head's logits, which are never held whole.

The products hidden @ weight.T are made by PyTorch, a tile of [rows, vocabulary] at a time; the kernels fold a tile
into each row's running (max, sum, dot, target logit), and in the backward turn it into its own gradient. Rows that
the mask leaves out never meet the head; rows whose incoming gradients are zero never meet its backward.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ._autograd import register_no_derivative
from ._fakes import check_same_device
from ._temperature import split_temperature, temperature_tensor

# Rows and vocabulary of a tile, and so the memory that it takes, whatever its shape. On the CPU a tile stays in the
# last-level cache between its GEMM and its kernel; on a GPU it is as large as its GEMM needs to fill the device.
_TILE = {"cpu": (1024, 2048), "cuda": (4096, 8192)}

# The columns of the state of a row: csrc/kernels/linear_logprob_entropy.h.
_MAX, _SUM, _DOT, _SQUARES, _BEFORE_TARGET, _TARGET = range(6)
_NEUTRAL = (-torch.inf, 0.0, 0.0, 0.0, -torch.inf, 0.0)


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

    Never holds [rows, V]. Of 2·H·V operations a product: the forward takes one for every row of the mask, the
    backward three for every row with a non-zero gradient (recompute, and one for each gradient), and no others.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64.
        weight: [V, H], of the same dtype. Under autocast both may be of any dtype, and the products are made in
            autocast's.
        targets: [...], integer, in the vocabulary. Where `mask` is 0 a target may be anything (-100, say).
        bias: [V].
        mask: [...], any dtype, nonzero = in. Rows left out are not read; they give 0 and a zero gradient.
        temperature: a number above 0, or a tensor that broadcasts to [...], one value a row.
        entropy_grad: whether the entropy carries a gradient: selection needs none, an entropy bonus does.
        chunk_rows: rows of a tile; None chooses. A tile takes chunk_rows * min(V, 2048) * 4 bytes on the CPU and
            chunk_rows * min(V, 8192) * 4 on CUDA (8 instead of 4 for float64).
        max_grad_rows: a bound on the rows that will have a non-zero gradient: then the backward does not wait for
            the device to count them, which on CUDA it otherwise does, once.
        max_mask_rows: the same for the rows of the mask, in the forward.
        logit_scale: above 0 (Cohere, Granite).
        softcap: above 0 (Gemma 2's final_logit_softcapping).
        vocab_start: with `group`, index in the vocabulary of the first row of this rank's `weight`.
        vocab_size: entries of the whole vocabulary. Rows of `weight` beyond it are padding: not read, with a zero
            gradient. None: all rows of `weight`; with `group` it must be given.
        group: process group over which the vocabulary is sharded. Every rank calls with the same `hidden`,
            `targets` and `mask` and its own rows of `weight` and `bias`, any number of them; all get the same
            results. Two all-reduces of a few numbers a row in the forward; in the backward, one that sums
            `hidden`'s gradient over the ranks (the rows with a gradient alone).
        token_statistics: also return two values a row that carry no gradient, below.

    Returns:
        (log_prob, entropy), both [...], in nats, float32 (float64 for float64 inputs). Products are summed in
        float32 and not rounded before the softmax; both gradients are summed in float32, then rounded to the dtype
        of their tensor. With `token_statistics` also is_top1 [...] bool, whether the target is the first largest
        logit, and sum_squared_probs [...], sum p^2.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, numbers out of range, a target outside the
            vocabulary. On CUDA, where looking would wait for the device, a bad target or per-row temperature gives
            NaN for its own row instead. More rows than `max_grad_rows` or `max_mask_rows`: at once on the CPU; on
            CUDA everything that this call returns is NaN, and the next call raises (its forward if the device
            has come so far, its backward in any case).

    Source: the idea of a fused linear log-probability is that of Liger Kernel, cut-cross-entropy and TRL; that of
    leaving out the rows without a gradient follows from "Beyond the 80/20 Rule", arXiv 2506.01939.
    """
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
        temperature_tensor(temperature, row_temperature),
        compute_dtype=compute_dtype,
        **options,
    )
    return log_prob, entropy if entropy_grad else entropy.detach(), is_top1, sum_squared_probs


# ---- The loops over tiles


@dataclass(frozen=True)
class _Options:
    """The keyword arguments that forward and backward share, as the schemas have them."""

    chunk_rows: int | None = None
    max_grad_rows: int | None = None
    max_mask_rows: int | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_start: int = 0
    vocab_size: int | None = None
    group: str | None = None
    compute_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class _Head:
    """The LM head of a call, and how it is cut into tiles."""

    weight: Tensor  # [valid, H]: this rank's rows, without padding
    bias: Tensor | None  # [valid], accumulate dtype
    vocab_start: int
    vocab_size: int
    logit_scale: float
    softcap: float  # 0: none
    dtype: torch.dtype  # of the GEMMs' inputs
    accumulate: torch.dtype  # of tiles, sums and results
    chunk_rows: int
    chunk_vocab: int
    group: dist.ProcessGroup | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: _Options) -> "_Head":
        accumulate = _accumulate_dtype(hidden)
        # A CPU has no GEMM of 16-bit inputs that leaves its result in float32.
        narrow = hidden.is_cuda and accumulate == torch.float32
        vocab_size = options.vocab_size
        if vocab_size is None:
            if options.group is not None:
                raise ValueError("vocab_size is None; with group it must be the size of the whole vocabulary")
            vocab_size = weight.shape[0]
        valid = min(max(vocab_size - options.vocab_start, 0), weight.shape[0])
        rows, chunk_vocab = _TILE["cuda" if hidden.is_cuda else "cpu"]
        if valid < chunk_vocab:  # more rows of a small vocabulary make a tile of the same size
            rows, chunk_vocab = rows * chunk_vocab // max(valid, 1), valid
        return _Head(
            weight[:valid],
            None if bias is None else bias[:valid].to(accumulate).contiguous(),
            options.vocab_start,
            vocab_size,
            options.logit_scale,
            options.softcap or 0.0,
            (options.compute_dtype or hidden.dtype) if narrow else accumulate,
            accumulate,
            options.chunk_rows or rows,
            chunk_vocab,
            None if options.group is None else dist.distributed_c10d._resolve_process_group(options.group),  # type: ignore[attr-defined,arg-type]
        )

    def vocab_tiles(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """(columns, weight [width, H] in the GEMMs' dtype, bias [width]) of each tile."""
        valid = self.weight.shape[0]
        for start in range(0, valid, max(self.chunk_vocab, 1)):
            columns = slice(start, min(start + self.chunk_vocab, valid))
            yield columns, self.weight[columns].to(self.dtype), None if self.bias is None else self.bias[columns]

    def row_chunks(self, rows: int) -> Iterator[slice]:
        for start in range(0, rows, self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, rows))

    def buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        # Rows begin where four elements are read or written at once.
        shape = min(self.chunk_rows, rows), -(-self.chunk_vocab // 4) * 4
        return torch.empty(shape, dtype=dtype, device=self.weight.device)


def _accumulate_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor,
    options: _Options,
) -> None:
    """Raises ValueError for all that can be seen without looking at device values."""
    floating = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for name, tensor in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        if tensor is not None and tensor.dtype not in floating:
            raise ValueError(f"{name} is {_name(tensor.dtype)}; it must be float32, float64, bfloat16 or float16")
    check_same_device(hidden=hidden, weight=weight, targets=targets, bias=bias, mask=mask)
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
        if not 0 < temperature.item() < torch.inf:
            raise ValueError(f"temperature is {temperature.item():g}; it must be a finite number above 0")
    elif temperature.shape != rows or temperature.dtype not in floating:
        raise ValueError(
            f"temperature is {_name(temperature.dtype)} of shape {list(temperature.shape)}; it must be a number, or "
            f"floating and of shape {list(rows)}, one value for each row"
        )
    for name, least in {"chunk_rows": 1, "max_grad_rows": 0, "max_mask_rows": 0}.items():
        bound = getattr(options, name)
        if bound is not None and bound < least:
            raise ValueError(f"{name} is {bound}; it must be {least} or above, or None")
    if not 0 < options.logit_scale < torch.inf:
        raise ValueError(f"logit_scale is {options.logit_scale}; it must be a finite number above 0")
    if options.softcap is not None and not 0 < options.softcap < torch.inf:
        raise ValueError(f"softcap is {options.softcap}; it must be a finite number above 0, or None")
    vocab_start, vocab_size, whole = options.vocab_start, options.vocab_size, options.group is None
    if vocab_start < 0 or (vocab_start > 0 and whole):
        raise ValueError(f"vocab_start is {vocab_start}; it must be 0, or with group 0 or above")
    if vocab_size is not None and (vocab_size < 1 or (whole and vocab_size > weight.shape[0])):
        allowed = f"in [1, {weight.shape[0]}], the rows of weight" if whole else "1 or above"
        raise ValueError(f"vocab_size is {vocab_size}; it must be {allowed}")


def _is_number(temperature: Tensor) -> bool:
    """Whether it is one number for all rows: see `temperature_tensor`."""
    return temperature.dim() == 0 and temperature.device.type == "cpu" and temperature.dtype == torch.float64


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_values(targets: Tensor, inside: Tensor | None, temperature: Tensor, vocab_size: int) -> None:
    """On the CPU alone, where looking at values waits for nothing. All are [rows]."""
    outside = (targets < 0) | (targets >= vocab_size)
    if inside is not None:
        outside &= inside
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"targets[{row}] (flat index) is {int(targets[row])}; it must be in [0, {vocab_size}), the vocabulary"
        )
    if temperature.dim():
        bad = ~((temperature > 0) & temperature.isfinite())
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(f"temperature[{row}] is {float(temperature[row])}; it must be a finite number above 0")


# Counts that the device has not yet told the host: (event, count on the host, name of the bound, bound).
_unheard: deque[tuple[torch.cuda.Event, Tensor, str, int]] = deque()


def _raise_overflow(*, wait: bool) -> None:
    """Raises for a bound that an earlier call on CUDA found too small, as far as the device has told."""
    while _unheard:
        event, count, name, bound = _unheard[0]
        if not wait and not event.query():  # type: ignore[no-untyped-call]
            return
        event.synchronize()
        _unheard.popleft()
        _check_count(int(count), name, bound)


def _check_count(count: int, name: str, bound: int) -> None:
    if count > bound:
        what = "are in the mask" if name == "max_mask_rows" else "have a non-zero gradient"
        raise ValueError(f"{name} is {bound}, but {count} rows {what}; it must be at least as many, or None")


def _bounded_index(active: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """([bound] the first rows where `active` is true, in order, then [rows] in empty places; their count, 0-dim)."""
    total = active.shape[0]
    position = active.cumsum(0)
    # The rows that have no place share one more.
    place = torch.where(active & (position <= bound), position - 1, bound)
    index = torch.full((bound + 1,), total, dtype=torch.int64, device=active.device)
    index.scatter_(0, place, torch.arange(total, device=active.device))
    index[bound] = total
    return index[:bound], active.sum()


@dataclass
class _Index:
    """Which of `total` rows take part, in order."""

    total: int
    index: Tensor | None  # [n] int64; `total` marks an empty place. None: all rows
    overflow: Tensor | None = None  # 0-dim bool: there were more rows than places

    @staticmethod
    def of(active: Tensor, name: str, bound: int | None) -> "_Index":
        """The rows where `active` [rows] is true; waits for the device where they are not bounded."""
        total = active.shape[0]
        if bound is None or not active.is_cuda:
            index = active.nonzero().squeeze(1)
            if bound is not None:
                _check_count(index.shape[0], name, bound)
            return _Index(total, None if index.shape[0] == total else index)
        index, count = _bounded_index(active, bound)
        if not torch.cuda.is_current_stream_capturing():
            on_host = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(count, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            _unheard.append((event, on_host, name, bound))
        return _Index(total, index, count > bound)

    @property
    def count(self) -> int:
        return self.total if self.index is None else self.index.shape[0]

    def take(self, values: Tensor) -> Tensor:
        """[total, ...] -> [n, ...]"""
        if self.index is None:
            return values
        index = self.index if self.overflow is None else self.index.clamp(max=max(self.total - 1, 0))
        return values.index_select(0, index)

    def put(self, values: Tensor) -> Tensor:
        """[n, ...] -> [total, ...], 0 in the other rows, NaN everywhere after an overflow."""
        if self.index is None:
            return values
        # One row more, where the empty places go.
        out = values.new_zeros((self.total + (self.overflow is not None), *values.shape[1:]))
        out.index_copy_(0, self.index, values)
        if self.overflow is not None:
            out = out[: self.total]
            if out.is_floating_point():
                out.masked_fill_(self.overflow, torch.nan)
        return out


def _gemm(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """out (+)= a @ b, in place; the products of 16-bit factors reach a float32 `out` without being rounded."""
    options = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, out=out, **options)  # type: ignore[call-overload]
    else:
        torch.mm(a, b, out=out, **options)


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
    options = _Options(**keywords)
    _check(hidden, weight, targets, bias, mask, temperature, options)
    _raise_overflow(wait=False)
    head = _Head.of(hidden, weight, bias, options)
    shape = hidden.shape[:-1]
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    inside = None if mask is None else mask.reshape(-1) != 0
    if not _is_number(temperature):
        temperature = temperature.reshape(-1).to(head.accumulate)
    if not hidden.is_cuda:
        _check_values(targets, inside, temperature, head.vocab_size)

    rows = (
        _Index(hidden.shape[0], None) if inside is None else _Index.of(inside, "max_mask_rows", options.max_mask_rows)
    )
    hidden, targets = rows.take(hidden).to(head.dtype), rows.take(targets)
    temperature = rows.take(temperature) if temperature.dim() else temperature
    state = torch.tensor(_NEUTRAL, dtype=torch.float64, device=hidden.device).repeat(rows.count, 1)
    buffer = head.buffer(rows.count, head.accumulate)
    for columns, tile_weight, tile_bias in head.vocab_tiles():
        for chunk in head.row_chunks(rows.count):
            tile = buffer[: chunk.stop - chunk.start, : columns.stop - columns.start]
            _gemm(tile, hidden[chunk], tile_weight.t())
            torch.ops.entropy_rl.linear_logprob_entropy_tile_forward(
                tile,
                targets[chunk],
                temperature[chunk] if temperature.dim() else temperature,
                tile_bias,
                head.vocab_start + columns.start,
                head.logit_scale,
                head.softcap,
                token_statistics,
                state[chunk],
            )

    row_temperature = temperature.to(hidden.device, torch.float64)
    if head.group is not None:
        _combine_shards(state, targets, row_temperature, head)
    maximum, total, dot, squares, before_target, target = state.unbind(1)
    log_sum = total.log()
    shift = torch.where(maximum == -torch.inf, 0.0, maximum)
    # The exact entropy is never negative; a rounding residue is.
    entropy = (log_sum - dot / total).clamp(min=0)
    log_prob = (target - shift) / row_temperature - log_sum
    log_prob = torch.where((targets >= 0) & (targets < head.vocab_size), log_prob, torch.nan)
    is_top1, sum_squared_probs = hidden.new_empty(0, dtype=torch.bool), hidden.new_empty(0, dtype=head.accumulate)
    if token_statistics:
        is_top1 = rows.put((target >= maximum) & (target > before_target)).view(shape)
        sum_squared_probs = rows.put((squares / total**2).to(head.accumulate)).view(shape)
    return (
        rows.put(log_prob.to(head.accumulate)).view(shape),
        rows.put(entropy.to(head.accumulate)).view(shape),
        is_top1,
        sum_squared_probs,
        rows.put(torch.stack([maximum, log_sum], 1).to(head.accumulate)).view(*shape, 2),
    )


def _combine_shards(state: Tensor, targets: Tensor, temperature: Tensor, head: _Head) -> None:
    """Every rank's state of the same rows becomes that of the whole vocabulary, in place."""
    largest = state[:, [_MAX, _BEFORE_TARGET]]
    dist.all_reduce(largest, dist.ReduceOp.MAX, head.group)
    shift = torch.where(largest[:, 0] == -torch.inf, 0.0, largest[:, 0])
    d = (state[:, _MAX] - shift) / temperature
    scale = d.exp()
    here = (targets >= head.vocab_start) & (targets < head.vocab_start + head.weight.shape[0])
    sums = torch.stack(
        [
            state[:, _SUM] * scale,
            # An empty shard has d = -inf, and 0 * inf would be NaN.
            scale * (state[:, _DOT] + state[:, _SUM] * d.clamp(min=torch.finfo(torch.float64).min)),
            state[:, _SQUARES] * scale**2,
            torch.where(here, state[:, _TARGET], 0.0),
        ],
        1,
    )
    dist.all_reduce(sums, dist.ReduceOp.SUM, head.group)
    state[:, [_MAX, _BEFORE_TARGET]] = largest
    state[:, [_SUM, _DOT, _SQUARES, _TARGET]] = sums


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
    statistics: Tensor,
    needs: list[bool],
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    options = _Options(**keywords)
    needs_hidden, needs_weight, needs_bias = needs[0], needs[1], needs[2] and bias is not None
    _raise_overflow(wait=True)
    head = _Head.of(hidden, weight, bias, options)
    valid = head.weight.shape[0]
    shape, hidden_dtype = hidden.shape, hidden.dtype

    def by_row(values: Tensor, *columns: int) -> Tensor:
        return values.reshape(-1, *columns).to(head.accumulate)

    gradients = [None if grad is None else by_row(grad) for grad in (grad_log_prob, grad_entropy)]
    hidden = hidden.reshape(-1, shape[-1])
    active = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    for gradient in gradients:
        if gradient is not None:
            active |= gradient != 0
    if mask is not None:
        active &= mask.reshape(-1) != 0
    bound = options.max_mask_rows if options.max_grad_rows is None else options.max_grad_rows
    rows = _Index.of(active, "max_grad_rows", bound)

    hidden, targets = rows.take(hidden).to(head.dtype), rows.take(targets.reshape(-1).long())
    if not _is_number(temperature):
        temperature = rows.take(by_row(temperature))
    entropy, statistics = rows.take(by_row(entropy)), rows.take(by_row(statistics, 2))
    gradients = [None if gradient is None else rows.take(gradient) for gradient in gradients]
    if rows.overflow is not None and rows.index is not None:
        # An empty place has no gradient; where rows found none, what is left must not pass for the whole.
        empty = rows.index == rows.total
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                gradients[i] = gradient.masked_fill(empty, 0.0).masked_fill(rows.overflow, torch.nan)

    grad_hidden = hidden.new_zeros(rows.count if needs_hidden else 0, shape[-1], dtype=head.accumulate)
    # Padding and, where no row has a gradient, everything stays 0; the rest is overwritten.
    whole = rows.count > 0 and valid == weight.shape[0]
    new = weight.new_empty if whole else weight.new_zeros
    grad_weight = new(weight.shape if needs_weight else (0,))
    grad_bias = weight.new_zeros(weight.shape[0] if needs_bias else 0, dtype=head.accumulate)
    tile_buffer = head.buffer(rows.count, head.accumulate)
    narrow_buffer = head.buffer(rows.count, head.dtype) if head.dtype != head.accumulate else None
    # A weight's gradient that takes several GEMMs is summed before it is rounded.
    one_gemm = rows.count <= head.chunk_rows and grad_weight.dtype in (head.dtype, head.accumulate)
    direct = one_gemm or grad_weight.dtype == head.accumulate
    weight_buffer = None
    if needs_weight and not direct:
        weight_buffer = hidden.new_empty(head.chunk_vocab, shape[-1], dtype=head.accumulate)

    for columns, tile_weight, tile_bias in head.vocab_tiles():
        width = columns.stop - columns.start
        grad_tile_weight = grad_weight[columns] if weight_buffer is None else weight_buffer[:width]
        for chunk in head.row_chunks(rows.count):
            tile = tile_buffer[: chunk.stop - chunk.start, :width]
            narrow = None if narrow_buffer is None else narrow_buffer[: chunk.stop - chunk.start, :width]
            _gemm(tile, hidden[chunk], tile_weight.t())
            torch.ops.entropy_rl.linear_logprob_entropy_tile_backward(
                *(None if gradient is None else gradient[chunk] for gradient in gradients),
                entropy[chunk],
                statistics[chunk],
                targets[chunk],
                temperature[chunk] if temperature.dim() else temperature,
                tile_bias,
                head.vocab_start + columns.start,
                head.logit_scale,
                head.softcap,
                tile,
                narrow,
            )
            grad_tile = tile if narrow is None else narrow
            if needs_hidden:
                _gemm(grad_hidden[chunk], grad_tile, tile_weight, accumulate=True)
            if needs_weight:
                _gemm(grad_tile_weight, grad_tile.t(), hidden[chunk], accumulate=chunk.start > 0)
            if needs_bias:
                grad_bias[columns] += grad_tile.sum(0, dtype=head.accumulate)
        if weight_buffer is not None and rows.count > 0:
            grad_weight[columns] = grad_tile_weight

    if needs_hidden and head.group is not None:
        dist.all_reduce(grad_hidden, group=head.group)
    return (
        rows.put(grad_hidden.to(hidden_dtype)).view(shape) if needs_hidden else grad_hidden.to(hidden_dtype),
        grad_weight,
        grad_bias if bias is None else grad_bias.to(bias.dtype),
    )


for _device in ("CPU", "CUDA"):
    torch.library.impl("entropy_rl::linear_logprob_entropy_forward", _device)(_forward)
    torch.library.impl("entropy_rl::linear_logprob_entropy_backward", _device)(_backward)


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
    dtype, rows = _accumulate_dtype(hidden), hidden.shape[:-1]
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
    statistics: Tensor,
    needs: list[bool],
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0, hidden.shape[-1])),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        weight.new_empty(0, dtype=_accumulate_dtype(hidden))
        if bias is None
        else bias.new_empty(bias.shape if needs[2] else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    hidden, weight, targets, bias, mask, temperature = inputs
    _, entropy, is_top1, sum_squared_probs, statistics = output
    ctx.mark_non_differentiable(is_top1, sum_squared_probs, statistics)
    ctx.set_materialize_grads(False)
    ctx.options = {name: value for name, value in keyword_only_inputs.items() if name != "token_statistics"}
    ctx.save_for_backward(hidden, weight, targets, bias, mask, temperature, entropy, statistics)


def _autograd(ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    hidden, weight, targets, bias, mask, temperature, entropy, statistics = ctx.saved_tensors
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
        statistics,
        needs,
        **ctx.options,
    )
    grad_hidden, grad_weight, grad_bias = (
        gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
    )
    return grad_hidden, grad_weight, None, grad_bias, None, None


torch.library.register_autograd("entropy_rl::linear_logprob_entropy_forward", _autograd, setup_context=_setup_context)
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
