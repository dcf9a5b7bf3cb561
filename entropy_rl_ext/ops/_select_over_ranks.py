"""Selection of the largest values among those that several processes hold.

Few values on the CPU are gathered, and every process selects from all of them. Other values are not exchanged: a radix
select finds the key of the k-th largest value in rounds of 11 bits. Each round all-reduces one histogram of the keys
that share the digits found so far. Every number stays on the device, so nothing waits for it. Keys are integers, so
the result does not depend on how the values are split over the processes, nor on which of the two ways is taken.

Four ops do the work of one process. `values` are float32, bfloat16, float16 or float64 of any shape. `mask` has their
shape and any dtype; values where it is 0 are ignored. A key is the unsigned integer that stands for a value
(csrc/kernels): 32 bits, or 64 for float64, in a 0-dim int64 tensor. It is found one digit at a time, at each of
`digit_shifts` in turn.

  counts(values, mask, key, shift) -> counts, [digits] int64
      The histogram of the digit at `shift`, over the keys whose higher digits equal those of `key`. For the first digit
      `key` is None and all keys are counted.
  key(counts, key, k, shift) -> (key, k)
      `key` with the digit of the k-th largest of the counted keys, and the rank of that value among the keys with this
      digit. k is 0-dim int64, clamped to [0, number of keys]. For k = 0 all bits of the key are set, as for NaN.
  next_key(values, mask, key) -> 0-dim int32, int64 for float64
      The smallest key above `key`, or the key of NaN, as the signed integer of the same order: the minimum over the
      processes is the smallest of all.
  at_key(values, mask, key, k, ties, process, next_key, weight) -> (mask, lowest)
      Keeps the values whose key is `key` or above. With `ties`, [processes] int64, the number of values that have `key`
      on each process, only the first k of those are kept: process after process, and by flat index on this one, number
      `process`. With `next_key` and `weight`, 0-dim float64, the threshold is the value that lies `weight` of the way
      from the value of `key` to that of `next_key`. Keeps nothing where k is 0. `lowest`, float32 (float64 for float64
      values), is the lowest value that any process keeps: inf where all of them are NaN, 0 where there is none.

All raise ValueError for shapes, dtypes or devices that do not fit, a shift at which no digit begins, a key missing for
a digit below the first or given for the first, ties with a next_key, and a next_key without a weight.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ._autograd import register_constant
from ._fakes import check_same_device

_DIGIT_BITS = 11

# Up to this number of values on each process, those outside the mask included, they are gathered. That is the faster
# way at 2^13 values (benchmarks/selection_over_ranks.py), and its bytes grow with their number.
_FEW = 2**15

# For each process group, for how many values the next message has room. Its ranks agree on it, because it follows from
# the numbers in their last messages.
_ROOM: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()

_HEADER = 8  # bytes of the number that begins a message


class Ranks:
    """The ranks of a process group, or this process alone for None."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.own = 0 if group is None else dist.get_rank(group)

    def all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        if self._group is not None:
            dist.all_reduce(tensor, operation, group=self._group)

    def gather_if_few(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """Every rank's values and bool mask, if no rank has more than _FEW values; None on all ranks if one has.

        Both are [ranks, room], where the room that a rank does not need is outside its mask.

        A rank does not know how many values the others have, yet all messages of a gather must have one size. So a
        message has its rank's number of values, then room for as many values as were needed last time. Where a rank
        has more, all ranks see its number and send again with more room.

        Only on the CPU: elsewhere, reading how many each rank has would wait for the device.
        """
        if self._group is None or self.size == 1 or not values.is_cpu:
            return None
        room = _ROOM.get(self._group, 0)
        # all_gather_into_tensor has this name since torch 2.13.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        while True:
            message = _message(values, mask, room)
            messages = torch.empty(self.size * len(message), dtype=torch.uint8)
            all_gather(messages, message, group=self._group)
            messages = messages.view(self.size, len(message))
            most = int(messages[:, :_HEADER].view(torch.int64).amax())
            needed = _room_for(most) if most <= _FEW else 0
            if needed <= room:
                break
            room = needed
        _ROOM[self._group] = needed
        if most > _FEW:
            return None
        end = _HEADER + room * values.itemsize
        return messages[:, _HEADER:end].view(values.dtype), messages[:, end:].view(torch.bool)


def _message(values: Tensor, mask: Tensor, room: int) -> Tensor:
    """[bytes] uint8: the number of values, then the values and the mask, each with zeros to fill its room.

    Zeros alone where there are more values than room.
    """
    count = values.numel()
    header = torch.tensor([count], dtype=torch.int64).view(torch.uint8)
    if count > room:
        return torch.cat([header, header.new_zeros(room * (values.itemsize + 1))])
    parts = [header]
    for tensor in (values, mask):
        parts.append(tensor.contiguous().view(-1).view(torch.uint8))
        if count < room:
            parts.append(header.new_zeros((room - count) * tensor.itemsize))
    return torch.cat(parts)


def _room_for(count: int) -> int:
    """A power of two, so that few more values need no more room, and whole words of 8 bytes; 0 for none."""
    return max(8, 1 << (count - 1).bit_length()) if count else 0


@torch.no_grad()
def select_over_ranks(
    values: Tensor,
    mask: Tensor,
    rank_of: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    ratio_of: Callable[[Tensor], Tensor],
    rule: str,
    ranks: Ranks,
    *,
    need_lowest: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """This rank's part of the mask over all ranks' values, and the lowest value that the rule keeps on any rank.

    Args:
        values: any shape, float32, bfloat16, float16 or float64.
        mask: the same shape, bool (another dtype would be converted in every round).
        rank_of: from the number of values in the mask over all ranks, 0-dim int64, to (k, weight): the rule needs the
            k-th largest value, and the quantile lies `weight` of the way from it to the next larger one.
        ratio_of: the same for values that are all on this rank: from the mask of all to the `top_ratio` of
            `global_top_mask_forward`, 0-dim float64.
        rule: "topk", "threshold" or "quantile". Only "quantile" uses the weight.
        ranks: whose values compete. Every rank must call, with the same rule and dtype.
        need_lowest: if False, the lowest value may be None.
    """
    ops = torch.ops.entropy_rl
    gathered = ranks.gather_if_few(values, mask)
    if gathered is not None:
        everywhere, masks = gathered
        kept = ops.global_top_mask_forward(everywhere, masks, ratio_of(masks), rule, "batch", None)
        lowest = _lowest(everywhere.masked_select(kept)) if need_lowest else None
        return kept[ranks.own, : values.numel()].view(values.shape), lowest

    values, mask = values.contiguous(), mask.contiguous()
    key = k = weight = None
    for shift in digit_shifts(values.dtype):
        own_counts = ops.global_top_mask_counts(values, mask, key, shift)
        counts = own_counts.clone()
        ranks.all_reduce(counts)
        if k is None:
            k, weight = rank_of(counts.sum())
        key, k = ops.global_top_mask_key(counts, key, k, shift)
    assert key is not None

    ties = next_key = None
    if rule == "topk":
        # The last round counted the keys that share all higher digits, so those with this last digit have this key.
        ties = torch.zeros(ranks.size, dtype=torch.int64, device=values.device)
        ties[ranks.own] = own_counts.take(key & (len(counts) - 1))
        ranks.all_reduce(ties)
    elif rule == "quantile":
        next_key = ops.global_top_mask_next_key(values, mask, key)
        ranks.all_reduce(next_key, dist.ReduceOp.MIN)
    selected, lowest = ops.global_top_mask_at_key(values, mask, key, k, ties, ranks.own, next_key, weight)
    return selected, lowest


def _lowest(kept: Tensor) -> Tensor:
    """[]: the `lowest` of at_key, from all values that are kept."""
    dtype = torch.float64 if kept.dtype == torch.float64 else torch.float32
    if len(kept) == 0:
        return torch.zeros((), dtype=dtype)
    lowest = kept.to(dtype).nan_to_num_(torch.inf, torch.inf, -torch.inf).amin()
    return lowest + 0.0  # of the two zeros, the positive one


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
    register_constant(f"global_top_mask_{_op}")
