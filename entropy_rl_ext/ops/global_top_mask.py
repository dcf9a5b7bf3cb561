"""global_top_mask: the response tokens of highest entropy, exactly, over a batch, sequence or group."""

from typing import Literal

import torch
from torch import Tensor

from ._autograd import register_no_derivative
from ._fakes import check_same_device


def global_top_mask(
    entropy: Tensor,
    response_mask: Tensor,
    top_ratio: float = 0.2,
    *,
    rule: Literal["topk", "threshold", "quantile"] = "topk",
    scope: Literal["batch", "sequence", "group"] = "batch",
    group_ids: Tensor | None = None,
) -> Tensor:
    """Marks the highest-entropy response tokens of each scope.

    With n response tokens in a scope, k = max(1, int(n * top_ratio + 0.9999)) in float64, the expression of
    the paper's authors (a ceiling, but for products within 1e-4 above an integer). A scope without response
    tokens selects nothing.

    Args:
        entropy: [B, S], or any shape whose last dimension is the sequence; float32, bfloat16, float16 or
            float64.
        response_mask: same shape, any dtype, nonzero = response token. Other tokens' entropy is ignored.
        top_ratio: share of the response tokens to keep, in (0, 1].
        rule: "topk" keeps exactly k tokens, at ties those of the lowest flat index. "threshold" keeps every
            token whose entropy is at least the k-th largest, ties included. "quantile" keeps every token
            whose entropy is at least the (1 - top_ratio) quantile, linear between its two neighbours.
        scope: what competes: "batch" the whole tensor, "sequence" each row, "group" the rows of one group id.
        group_ids: [B] (the shape of `entropy` without its last dimension), integer; for scope "group" alone.

    Returns:
        Bool, the shape of `entropy`, contiguous, without gradient; the same on CPU and CUDA, bit for bit.

        Entropies compare as numbers, bfloat16 and float16 ones after widening to float32: -0.0 equals 0.0,
        and NaN ranks highest, as in `torch.topk`. The quantile is taken at rank (1 - top_ratio) * (n - 1) in
        float64, interpolated in float64 (a step up from -inf stays there), then rounded to float32 (float64
        for float64 entropies). `torch.quantile` computes the rank in the entropy's own dtype, so in float32
        it may land between other neighbours for large n, and it refuses more than 2**24 tokens. A quantile
        of NaN keeps the NaN tokens alone.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a ratio outside (0, 1] or NaN, an unknown rule
            or scope, `group_ids` missing for scope "group" or given for another.

    Source: rule "topk" is the authors' implementation, "threshold" Eq. 6 of arXiv 2506.01939, "quantile" that
    of TRL.
    """
    mask: Tensor = torch.ops.entropy_rl.global_top_mask(entropy, response_mask, top_ratio, rule, scope, group_ids)
    return mask


def get_global_entropy_top_mask(entropy: Tensor, response_mask: Tensor, top_ratio: float = 0.2) -> Tensor:
    """`global_top_mask` over the batch under the name, and with the result, of the paper's own code.

    Args:
        entropy: [B, S], token entropies.
        response_mask: [B, S], nonzero = response token.
        top_ratio: share of the response tokens to keep, in (0, 1].

    Returns:
        [B, S] int64: 1 for the k = max(1, int(n * top_ratio + 0.9999)) response tokens of highest entropy,
        where n is their number and ties go to the lowest flat index; 0 elsewhere.

    Raises:
        ValueError: as `global_top_mask`.
    """
    return global_top_mask(entropy, response_mask, top_ratio).to(torch.int64)


@torch.library.impl("entropy_rl::global_top_mask", "CompositeImplicitAutograd")
def _global_top_mask(
    entropy: Tensor,
    response_mask: Tensor,
    top_ratio: float = 0.2,
    rule: str = "topk",
    scope: str = "batch",
    group_ids: Tensor | None = None,
) -> Tensor:
    # A product keeps a symbolic ratio symbolic, where a fill value would be specialised on.
    ratio = torch.ones((), dtype=torch.float64, device="cpu") * top_ratio
    mask: Tensor = torch.ops.entropy_rl.global_top_mask_forward(entropy, response_mask, ratio, rule, scope, group_ids)
    return mask


@torch.library.register_fake("entropy_rl::global_top_mask_forward")
def _(
    entropy: Tensor,
    response_mask: Tensor,
    top_ratio: Tensor,
    rule: str,
    scope: str,
    group_ids: Tensor | None,
    algorithm: str = "auto",
) -> Tensor:
    check_same_device(entropy=entropy, response_mask=response_mask, group_ids=group_ids)
    return entropy.new_empty(entropy.shape, dtype=torch.bool)


register_no_derivative("global_top_mask_forward", "a choice of tokens has none")


# ---- The steps over values that several processes hold
#
# Four ops that do not communicate: `entropy_rl.selection` adds up over the processes what they give. Nothing waits for
# the device. `values` are float32, bfloat16, float16 or float64 of any shape; `mask`, of that shape and any dtype,
# leaves values out. A key is the integer that stands for a value (csrc/kernels/selection.h): unsigned bits, 32 or for
# float64 64, in a 0-dim int64 tensor. It is found a digit at a time, at each of `digit_shifts` in turn.
#
#   counts(values, mask, key, shift) -> counts, [digits] int64
#       Of the keys that share their digits above `shift` with `key` (None for the first digit: of all keys), how many
#       have which digit there.
#   key(counts, key, k, shift) -> (key, k)
#       `key` with the digit of the k-th largest of the counted keys, and which of the keys with this digit that is.
#       k is 0-dim int64, held between 0 and the number of keys; for 0 all bits of the key are set, as for NaN.
#   next_key(values, mask, key) -> 0-dim int32, for float64 int64
#       The smallest key above `key`, or that of NaN, as the signed integer of the same order: so that the minimum over
#       the processes is the smallest.
#   at_key(values, mask, key, k, ties, process, next_key, weight) -> (mask, lowest)
#       Keeps the values of `key` and above. With `ties`, [processes] int64, how many values of each process have `key`:
#       of these the first k alone, process after process, and in this one, number `process`, by flat index. Or with
#       `next_key` and `weight`, 0-dim float64: the values from the one on that lies so much of the way from the key's
#       value to the next one up. Nothing where k is 0. `lowest` is the lowest value that any process keeps, float32
#       (float64): inf where all are NaN, 0 where there is none.
#
# They raise ValueError for shapes, dtypes or devices that do not fit, a shift at which no digit begins, a key missing
# for a digit below the first or given for that, ties with a next_key, and a next_key without a weight.

_DIGIT_BITS = 11


def digit_shifts(dtype: torch.dtype) -> tuple[int, ...]:
    """Where the digits of the keys of `dtype` begin, from the highest."""
    return (*range(_key_bits(dtype) - _DIGIT_BITS, 0, -_DIGIT_BITS), 0)


def _key_bits(dtype: torch.dtype) -> int:
    return 64 if dtype == torch.float64 else 32


@torch.library.register_fake("entropy_rl::global_top_mask_counts")
def _(values: Tensor, mask: Tensor, key: Tensor | None, shift: int) -> Tensor:
    check_same_device(values=values, mask=mask, key=key)
    bits = _DIGIT_BITS if shift > 0 else (_key_bits(values.dtype) - 1) % _DIGIT_BITS + 1
    return values.new_empty(1 << bits, dtype=torch.int64)


@torch.library.register_fake("entropy_rl::global_top_mask_key")
def _(counts: Tensor, key: Tensor | None, k: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    check_same_device(counts=counts, key=key, k=k)
    return torch.empty_like(k), torch.empty_like(k)


@torch.library.register_fake("entropy_rl::global_top_mask_next_key")
def _(values: Tensor, mask: Tensor, key: Tensor) -> Tensor:
    check_same_device(values=values, mask=mask, key=key)
    return values.new_empty((), dtype=torch.int64 if values.dtype == torch.float64 else torch.int32)


@torch.library.register_fake("entropy_rl::global_top_mask_at_key")
def _(
    values: Tensor,
    mask: Tensor,
    key: Tensor,
    k: Tensor,
    ties: Tensor | None = None,
    process: int = 0,
    next_key: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_same_device(values=values, mask=mask, key=key, k=k, ties=ties, next_key=next_key, weight=weight)
    lowest = values.new_empty((), dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)
    return values.new_empty(values.shape, dtype=torch.bool), lowest


for _op in ("counts", "key", "next_key", "at_key"):
    register_no_derivative(f"global_top_mask_{_op}", "a choice of tokens has none")
