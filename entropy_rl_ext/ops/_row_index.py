"""The rows of a call that take part: those in the mask, or those with a gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowIndex:
    """Which of `total` rows take part, in order."""

    total: int
    index: Tensor | None = None  # [n] int64; `total` marks an empty place. None: all rows
    overflow: Tensor | None = None  # 0-dim bool: there are more rows than places. None: there are not

    @staticmethod
    def of(active: Tensor, name: str, bound: int | None) -> "RowIndex":
        """The rows where `active` [total] is true. On CUDA, waits for the device unless they are bounded.

        Args:
            name: name of the bound, for errors.
            bound: at most so many rows are active. More raise ValueError on the CPU; on CUDA they set `overflow`.
        """
        if bound is not None and active.is_cuda:
            return bounded_index(active, bound)
        total = active.shape[0]
        index = active.nonzero().squeeze(1)
        count = index.shape[0]
        if bound is not None and count > bound:
            what = "are in the mask" if name == "max_mask_rows" else "have a non-zero gradient"
            raise ValueError(f"{name} is {bound}, but {count} rows {what}; it must be at least {count}, or None")
        return RowIndex(total, None if count == total else index)

    @property
    def count(self) -> int:
        return self.total if self.index is None else self.index.shape[0]

    def take(self, values: Tensor) -> Tensor:
        """[total, ...] -> [n, ...], 0 in empty places."""
        if self.index is None:
            return values
        if self.overflow is None:
            return values.index_select(0, self.index)
        empty = (self.index == self.total).view(-1, *[1] * (values.dim() - 1))
        return values.index_select(0, self.index.clamp(max=self.total - 1)).masked_fill_(empty, 0)

    def put(self, values: Tensor) -> Tensor:
        """[n, ...] -> [total, ...], 0 in the other rows. After an overflow NaN everywhere, or False."""
        if self.index is None:
            return values
        # One more row, for the empty places.
        out = values.new_zeros((self.total + (self.overflow is not None), *values.shape[1:]))
        out.index_copy_(0, self.index, values)
        if self.overflow is not None:
            out = out[: self.total].masked_fill_(self.overflow, torch.nan if out.is_floating_point() else False)
        return out


def bounded_index(active: Tensor, bound: int) -> RowIndex:
    """`RowIndex.of` with a place for `bound` rows, without waiting for the device to count the active rows."""
    total = active.shape[0]
    # At least one place, so that an overflow reaches the gradients that are sums over rows.
    places = min(max(bound, 1), total)
    position = active.cumsum(0)
    placed = active & (position <= places)
    # Rows without a place share one more place, which is cut off.
    index = torch.full((places + 1,), total, dtype=torch.int64, device=active.device)
    rows = torch.arange(total, device=active.device)
    index.scatter_(0, torch.where(placed, position - 1, places), torch.where(placed, rows, total))
    return RowIndex(total, index[:places], active.sum() > bound)
