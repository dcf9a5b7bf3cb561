"""The loops of linear_logprob_entropy over tiles of the LM head's logits, which are never all in memory.

PyTorch multiplies hidden @ weight.T one tile of [rows, vocabulary] at a time. In the forward, a kernel folds each tile
into its rows' running (max, sum, dot, target logit). In the backward, a kernel turns the recomputed tile into its own
gradient.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from ._bfloat16_products import bfloat16_products

# Rows and vocabulary entries of a tile, and so its memory. On the CPU a tile stays in the last-level cache between its
# GEMM and its kernel; on a GPU it is as large as its GEMM needs to fill the device.
_TILE = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
# In the backward a GPU takes more rows: of several chunks, each adds its part to the weight's gradient in float32, and
# so reads and writes all of it; one chunk writes it in its own dtype.
_BACKWARD_TILE = _TILE | {"cuda": (8192, 8192)}

# Elements to which a buffer's rows are padded: 16 bytes of a 16-bit dtype, which cuBLAS needs for its fastest GEMMs.
_PADDING = 8

# The columns of a row's state: csrc/kernels/linear_logprob_entropy_math.h.
MAX, SUM, DOT, SQUARES, BEFORE_TARGET, TARGET = range(6)


@dataclass(frozen=True)
class Options:
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
class Head:
    """The LM head of a call, and how it is cut into tiles."""

    weight: Tensor  # [valid, H]: this rank's rows, without padding
    bias: Tensor | None  # [valid], accumulate dtype
    vocab_start: int
    vocab_size: int
    logit_scale: float
    softcap: float  # 0: none
    factor_dtype: torch.dtype  # to which the factors of the GEMMs are rounded
    dtype: torch.dtype  # of the GEMMs' inputs, which hold the factors
    accumulate: torch.dtype  # of tiles, sums and results
    chunk_rows: int
    chunk_vocab: int
    group: dist.ProcessGroup | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: Options, *, backward: bool = False) -> "Head":
        accumulate = accumulate_dtype(hidden)
        factor_dtype = (options.compute_dtype or hidden.dtype) if accumulate == torch.float32 else accumulate
        vocab_size = options.vocab_size
        if vocab_size is None:
            if options.group is not None:
                raise ValueError("vocab_size is None; with group it must be the size of the unsharded vocabulary")
            vocab_size = weight.shape[0]
        valid = min(max(vocab_size - options.vocab_start, 0), weight.shape[0])
        rows, chunk_vocab = (_BACKWARD_TILE if backward else _TILE)["cuda" if hidden.is_cuda else "cpu"]
        if valid < chunk_vocab:  # more rows of a small vocabulary make a tile of the same size
            rows, chunk_vocab = rows * chunk_vocab // max(valid, 1), valid
        return Head(
            weight[:valid],
            None if bias is None else bias[:valid].to(accumulate).contiguous(),
            options.vocab_start,
            vocab_size,
            options.logit_scale,
            options.softcap or 0.0,
            factor_dtype,
            # The CPU's GEMMs of 16-bit inputs round their result to 16 bits as well.
            factor_dtype if hidden.is_cuda else accumulate,
            accumulate,
            options.chunk_rows or rows,
            chunk_vocab,
            None if options.group is None else dist.distributed_c10d._resolve_process_group(options.group),  # type: ignore[attr-defined,arg-type]
        )

    def factors(self, matrix: Tensor) -> Tensor:
        """A matrix as an input of the GEMMs."""
        return matrix.to(self.factor_dtype).to(self.dtype)

    def vocab_tiles(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """(columns, weight [width, H] as `factors` gives it, bias [width]) of each tile."""
        valid = self.weight.shape[0]
        for start in range(0, valid, max(self.chunk_vocab, 1)):
            columns = slice(start, min(start + self.chunk_vocab, valid))
            yield columns, self.factors(self.weight[columns]), None if self.bias is None else self.bias[columns]

    def row_chunks(self, rows: int) -> Iterator[slice]:
        for start in range(0, rows, self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, rows))

    def buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        shape = min(self.chunk_rows, rows), -(-self.chunk_vocab // _PADDING) * _PADDING
        return torch.empty(shape, dtype=dtype, device=self.weight.device)


def accumulate_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def forward_tiles(
    head: Head, hidden: Tensor, targets: Tensor, temperature: Tensor, token_statistics: bool
) -> tuple[Tensor, ...]:
    """The six columns of the rows' state over the unsharded vocabulary, each [n] float64.

    `hidden` is [n, H] as `head.factors` gives it, `targets` [n], `temperature` [n] or one number.
    """
    rows = hidden.shape[0]
    state = torch.zeros(rows, 6, dtype=torch.float64, device=hidden.device)
    for column in (MAX, BEFORE_TARGET):
        state[:, column].fill_(-torch.inf)
    buffer = head.buffer(rows, head.accumulate)
    for columns, tile_weight, tile_bias in head.vocab_tiles():
        for chunk in head.row_chunks(rows):
            tile = _tile_of(buffer, chunk, columns)
            gemm(tile, hidden[chunk], tile_weight.t(), dtype=head.factor_dtype)
            torch.ops.entropy_rl.linear_logprob_entropy_tile_forward(
                tile,
                targets[chunk],
                _rows_of(temperature, chunk),
                tile_bias,
                head.vocab_start + columns.start,
                head.logit_scale,
                head.softcap,
                token_statistics,
                state[chunk],
            )
    state_columns = state.unbind(1)
    return state_columns if head.group is None else _combine_shards(state_columns, targets, temperature, head)


def _combine_shards(state: tuple[Tensor, ...], targets: Tensor, temperature: Tensor, head: Head) -> tuple[Tensor, ...]:
    """Every rank's state of the same rows, combined to that of the unsharded vocabulary."""
    largest = torch.stack([state[MAX], state[BEFORE_TARGET]], 1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, head.group)
    maximum, before_target = largest.unbind(1)
    d = (state[MAX] - torch.where(maximum == -torch.inf, 0.0, maximum)) / temperature
    scale = d.exp()
    here = (targets >= head.vocab_start) & (targets < head.vocab_start + head.weight.shape[0])
    sums = torch.stack(
        [
            state[SUM] * scale,
            # An empty shard has d = -inf, and 0 * inf would be NaN.
            scale * (state[DOT] + state[SUM] * d.clamp(min=torch.finfo(torch.float64).min)),
            state[SQUARES] * scale**2,
            torch.where(here, state[TARGET], 0.0),
        ],
        1,
    )
    dist.all_reduce(sums, dist.ReduceOp.SUM, head.group)
    total, dot, squares, target = sums.unbind(1)
    return maximum, total, dot, squares, before_target, target


def backward_tiles(
    head: Head, hidden: Tensor, row_values: list[Tensor | None], weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the n rows that have one: of `hidden` and the bias in head.accumulate, of `weight` in its dtype.

    Args:
        hidden: [n, H], as `head.factors` gives it.
        row_values: the first arguments of the tile op: the gradients of the log-prob and the entropy, the entropy, the
            forward's max_log_sum [n, 2], targets and temperature.
        weight: [V, H], including padding, whose gradient is 0.
        needs: whether the gradient of hidden, weight and bias is needed; one that is not is empty.
    """
    rows, width = hidden.shape
    grad_hidden = hidden.new_zeros(rows if needs[0] else 0, width, dtype=head.accumulate)
    # Without padding every element is overwritten, where there are rows.
    new = weight.new_empty if rows > 0 and weight.shape == head.weight.shape else weight.new_zeros
    grad_weight = new(weight.shape if needs[1] else (0,))
    grad_bias = weight.new_zeros(weight.shape[0] if needs[2] else 0, dtype=head.accumulate)
    tile_buffer = head.buffer(rows, head.accumulate)
    narrow_buffer = head.buffer(rows, head.dtype) if head.dtype != head.accumulate else None
    # A weight gradient that takes several GEMMs is summed in head.accumulate before it is rounded.
    one_gemm = rows <= head.chunk_rows and grad_weight.dtype in (head.dtype, head.accumulate)
    weight_buffer = None
    if needs[1] and not one_gemm and grad_weight.dtype != head.accumulate:
        weight_buffer = hidden.new_empty(head.chunk_vocab, width, dtype=head.accumulate)

    for columns, tile_weight, tile_bias in head.vocab_tiles():
        tile_grad_weight = grad_weight[columns]
        if weight_buffer is not None:
            tile_grad_weight = weight_buffer[: columns.stop - columns.start]
        for chunk in head.row_chunks(rows):
            tile = _tile_of(tile_buffer, chunk, columns)
            narrow = None if narrow_buffer is None else _tile_of(narrow_buffer, chunk, columns)
            gemm(tile, hidden[chunk], tile_weight.t(), dtype=head.factor_dtype)
            torch.ops.entropy_rl.linear_logprob_entropy_tile_backward(
                *(None if values is None else _rows_of(values, chunk) for values in row_values),
                tile_bias,
                head.vocab_start + columns.start,
                head.logit_scale,
                head.softcap,
                tile,
                narrow,
            )
            grad_tile = tile if narrow is None else narrow
            if needs[0]:
                gemm(grad_hidden[chunk], grad_tile, tile_weight, accumulate=True, dtype=head.factor_dtype)
            if needs[1]:
                begun = chunk.start > 0
                gemm(tile_grad_weight, grad_tile.t(), hidden[chunk], accumulate=begun, dtype=head.factor_dtype)
            if needs[2]:
                grad_bias[columns] += grad_tile.sum(0, dtype=head.accumulate)
        if weight_buffer is not None and rows > 0:
            grad_weight[columns] = tile_grad_weight
    return grad_hidden, grad_weight, grad_bias


def gemm(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False, dtype: torch.dtype) -> None:
    """out (+)= a @ b, in place; products of 16-bit factors are added to a float32 `out` without rounding.

    `dtype` is what factors in float32 may be rounded to.
    """
    options = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    with bfloat16_products() if dtype == torch.bfloat16 and out.is_cpu else nullcontext():
        if accumulate:
            torch.addmm(out, a, b, out=out, **options)  # type: ignore[call-overload]
        else:
            torch.mm(a, b, out=out, **options)


def _tile_of(buffer: Tensor, chunk: slice, columns: slice) -> Tensor:
    return buffer[: chunk.stop - chunk.start, : columns.stop - columns.start]


def _rows_of(values: Tensor, chunk: slice) -> Tensor:
    """The chunk of [n, ...] values; one number is the same for all rows."""
    return values[chunk] if values.dim() else values
