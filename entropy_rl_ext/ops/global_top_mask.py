"""global_top_mask: the response tokens of highest entropy, exactly, over a batch, sequence or group."""

from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ._autograd import call_composite, register_constant
from ._fakes import check_same_device, check_tensors
from ._mask import any_wrong, check_mask, empty_if, nan_if
from ._options import check_options, host_number
from ._select_over_ranks import Ranks, select_over_ranks

_Rule = Literal["topk", "threshold", "quantile"]
_Scope = Literal["batch", "sequence", "group"]


@overload
def global_top_mask(
    entropy: Tensor,
    response_mask: Tensor,
    top_ratio: float = ...,
    *,
    rule: _Rule = ...,
    scope: _Scope = ...,
    group_ids: Tensor | None = ...,
    group: dist.ProcessGroup | None = ...,
    return_threshold: Literal[False] = ...,
) -> Tensor: ...


@overload
def global_top_mask(
    entropy: Tensor,
    response_mask: Tensor,
    top_ratio: float = ...,
    *,
    rule: _Rule = ...,
    scope: _Scope = ...,
    group_ids: Tensor | None = ...,
    group: dist.ProcessGroup | None = ...,
    return_threshold: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@check_options
def global_top_mask(
    entropy: Tensor,
    response_mask: Tensor,
    top_ratio: float = 0.2,
    *,
    rule: _Rule = "topk",
    scope: _Scope = "batch",
    group_ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    return_threshold: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Marks the highest-entropy response tokens of each scope.

    With n response tokens in a scope, k = max(1, int(n * top_ratio + 0.9999)) in float64, the expression of
    the paper's authors (a ceiling, except for products within 1e-4 above an integer). A scope without response
    tokens selects nothing.

    Args:
        entropy: [B, S], or any shape whose last dimension is the sequence; float32, bfloat16, float16 or
            float64.
        response_mask: same shape, any dtype, nonzero = response token. Other tokens' entropy is ignored. Floats must be
            0 or 1.
        top_ratio: share of the response tokens to keep, in (0, 1].
        rule: "topk" keeps exactly k tokens; ties go to the lowest flat index. "threshold" keeps every token
            whose entropy is at least the k-th largest, ties included. "quantile" keeps every token whose
            entropy is at least the (1 - top_ratio) quantile, interpolated linearly.
        scope: what competes: "batch" the whole tensor, "sequence" each row, "group" the rows of one group id.
        group_ids: [B] (the shape of `entropy` without its last dimension), integer; for scope "group" only.
        group: process group whose ranks' tokens compete as one batch, rank after rank; for scope "batch" only.
            Every rank calls, also one without tokens, with the same top_ratio, rule and dtype; shapes may
            differ. The ranks exchange histograms, not entropies; on the CPU they gather the entropies if no rank
            has more than 32,768 response tokens. The backend must reduce tensors of this device. None: this process
            alone. `torch.distributed.group.WORLD` is the default group.
        return_threshold: also return the lowest entropy that the rule keeps; for scope "batch" only.

    Returns:
        The mask: bool, the shape of `entropy`, contiguous, without gradient; the same on CPU and CUDA, bit for
        bit, and with `group` the same as on the concatenated batch.

        With `return_threshold`, (mask, threshold). The threshold is the lowest entropy that the rule keeps on
        any rank: 0-dim, float32 (float64 for float64 entropies), on the device. It is inf where only NaN is
        kept, and 0 where nothing is.

        Entropies compare as numbers, bfloat16 and float16 ones after widening to float32: -0.0 equals 0.0,
        and NaN ranks highest, as in `torch.topk`. The quantile is taken at rank (1 - top_ratio) * (n - 1) in
        float64, interpolated in float64 (-inf stays -inf, whatever the next value), then rounded to float32
        (float64 for float64 entropies). `torch.quantile` computes the rank in the entropy's own dtype, so in
        float32 it may fall between other neighbours for large n, and it refuses more than 2**24 tokens. Where
        the quantile is NaN, only NaN tokens are kept.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a ratio outside (0, 1] or NaN, an unknown rule
            or scope, `group_ids` missing for scope "group" or given for another, `group` or
            `return_threshold` with a scope other than "batch", a float in `response_mask` that is neither 0 nor 1. On
            CUDA, where reading the values would wait for the device, such a float gives a mask without any token
            instead, and with `return_threshold` a threshold of NaN.
        TypeError: an argument of another type, such as a list.

    Source: rule "topk" is the authors' implementation, "threshold" Eq. 6 of arXiv 2506.01939, "quantile" that
    of TRL.
    """
    check_tensors(entropy=entropy, response_mask=response_mask, optional={"group_ids": group_ids})
    if group is None and not return_threshold:
        return call_composite(
            "global_top_mask", _global_top_mask, entropy, response_mask, top_ratio, rule, scope, group_ids
        )

    if scope != "batch":
        option = "return_threshold" if group is None else "group"
        raise ValueError(f"scope is {scope!r}; with {option} it must be 'batch'")
    if response_mask.shape != entropy.shape:
        raise ValueError(
            f"response_mask has shape {list(response_mask.shape)}; it must be {list(entropy.shape)}, the shape of "
            "entropy"
        )
    # The op checks the other arguments, before anything is sent.
    ratio = host_number(top_ratio)
    _forward(entropy.new_empty(0), response_mask.new_empty(0), ratio, rule, scope, group_ids)

    check_mask("response_mask", response_mask)
    wrong = any_wrong(response_mask)
    inside = empty_if(wrong, response_mask if response_mask.dtype == torch.bool else response_mask != 0)

    def rank_of(n: Tensor) -> tuple[Tensor, Tensor | None]:
        if rule != "quantile":
            return top_k_count(n, top_ratio).long(), None
        position = (n - 1).clamp(min=0).double() * (1.0 - top_ratio)
        return n - position.long(), position.frac()

    selected, threshold = select_over_ranks(
        entropy, inside, rank_of, lambda _: ratio, rule, Ranks(group), need_lowest=return_threshold
    )
    return selected if threshold is None or not return_threshold else (selected, nan_if(wrong, threshold))


def get_global_entropy_top_mask(entropy: Tensor, response_mask: Tensor, top_ratio: float = 0.2) -> Tensor:
    """`global_top_mask` over the batch under the name, and with the result type, of the paper's own code.

    Args:
        entropy: [B, S], token entropies.
        response_mask: [B, S], nonzero = response token.
        top_ratio: share of the response tokens to keep, in (0, 1].

    Returns:
        [B, S] int64: 1 for the k = max(1, int(n * top_ratio + 0.9999)) response tokens of highest entropy,
        where n is the number of response tokens and ties go to the lowest flat index; 0 elsewhere.

    Raises:
        ValueError: as `global_top_mask`.
    """
    return global_top_mask(entropy, response_mask, top_ratio).to(torch.int64)


def top_k_count(response_tokens: Tensor, ratio: float, *, complement: bool = False) -> Tensor:
    """The number of tokens that rule "topk" keeps of so many response tokens, or with `complement` leaves out.

    Args:
        response_tokens: numbers of response tokens, any shape and dtype.
        ratio: `top_ratio` of `global_top_mask`.

    Returns:
        float64, the shape of `response_tokens`, on its device.
    """
    count = torch.floor(response_tokens.double() * ratio + 0.9999).clamp(min=1).minimum(response_tokens.double())
    return response_tokens - count if complement else count


def _global_top_mask(
    entropy: Tensor,
    response_mask: Tensor,
    top_ratio: float = 0.2,
    rule: str = "topk",
    scope: str = "batch",
    group_ids: Tensor | None = None,
) -> Tensor:
    mask: Tensor = _forward(entropy, response_mask, host_number(top_ratio), rule, scope, group_ids)
    return empty_if(any_wrong(response_mask), mask)


torch.library.impl("entropy_rl::global_top_mask", "CompositeImplicitAutograd", _global_top_mask)


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


_forward = register_constant("global_top_mask_forward")
