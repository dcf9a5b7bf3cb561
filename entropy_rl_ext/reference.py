"""Plain-torch oracle of every op: float64 inside, written for reading, independent of the C++ code.

Each function has the name and arguments of the op it stands for and is differentiable by autograd where
the op is.
"""

import torch
from torch import Tensor

# --- token_entropy, logprob_entropy ---------------------------------------------------------------


def _log_softmax(logits: Tensor, mask: Tensor | None, temperature: float | Tensor) -> Tensor:
    logits = logits.to(torch.float64)
    if mask is not None:  # a masked row is not read: whatever it holds becomes 0
        logits = torch.where((mask != 0).unsqueeze(-1), logits, 0.0)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(torch.float64).expand(logits.shape[:-1]).unsqueeze(-1)
    return torch.log_softmax(logits / temperature, dim=-1)


def _masked_rows(values: Tensor, mask: Tensor | None, logits: Tensor) -> Tensor:
    if mask is not None:
        values = torch.where(mask != 0, values, 0.0)
    return values if logits.dtype == torch.float64 else values.to(torch.float32)


def token_entropy(
    logits: Tensor, *, mask: Tensor | None = None, temperature: float | Tensor = 1.0
) -> Tensor:
    """Entropy of softmax(logits / temperature): [..., V] -> [...]."""
    log_p = _log_softmax(logits, mask, temperature)
    # p log p tends to 0 with p; log p is replaced before the product, or its gradient would be NaN.
    finite = torch.where(log_p == -torch.inf, 0.0, log_p)
    return _masked_rows(-(log_p.exp() * finite).sum(-1), mask, logits)


def logprob_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """(log-probability of the target, entropy): [..., V], [...] -> [...], [...]."""
    if mask is not None:
        targets = torch.where(mask != 0, targets, 0)
    log_p = _log_softmax(logits, mask, temperature)
    log_prob = log_p.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    entropy = token_entropy(logits, mask=mask, temperature=temperature)
    return _masked_rows(log_prob, mask, logits), entropy if entropy_grad else entropy.detach()


# --- global_top_mask -------------------------------------------------------------------------------


def _keep_top(values: Tensor, ratio: float, rule: str, dtype: torch.dtype) -> Tensor:
    """Which of the response entropies of one scope are kept: [n] float64 -> [n] bool."""
    n = values.numel()
    if n == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    k = min(n, max(1, int(n * ratio + 0.9999)))
    ascending = values.sort().values  # NaN last
    if rule == "topk":
        keep = torch.zeros_like(values, dtype=torch.bool)
        keep[values.sort(descending=True, stable=True).indices[:k]] = True
        return keep
    if rule == "threshold":
        threshold = ascending[n - k]
    else:
        position = (1 - ratio) * (n - 1)
        lower = int(position)
        threshold, upper = ascending[lower], ascending[min(lower + 1, n - 1)]
        # A step of zero width or from -inf leads nowhere, and inf - inf would be NaN.
        if position > lower and upper != threshold and threshold != -torch.inf:
            threshold = torch.minimum(threshold + (position - lower) * (upper - threshold), upper)
            threshold = threshold.to(dtype).to(torch.float64)
    return (values >= threshold) | values.isnan()


def global_top_mask(
    entropy: Tensor,
    response_mask: Tensor,
    top_ratio: float = 0.2,
    *,
    rule: str = "topk",
    scope: str = "batch",
    group_ids: Tensor | None = None,
) -> Tensor:
    """The highest-entropy response tokens of each scope: [..., S] -> bool of the same shape."""
    rows = torch.arange(entropy.shape[:-1].numel(), device=entropy.device).view(entropy.shape[:-1])
    segments = {"batch": torch.zeros_like(rows), "sequence": rows, "group": group_ids}[scope]
    assert segments is not None
    segments = segments.unsqueeze(-1).expand(entropy.shape)
    dtype = torch.float64 if entropy.dtype == torch.float64 else torch.float32
    result = torch.zeros(entropy.shape, dtype=torch.bool, device=entropy.device)
    for segment in segments.unique():
        inside = (response_mask != 0) & (segments == segment)
        result[inside] = _keep_top(entropy[inside].to(torch.float64), top_ratio, rule, dtype)
    return result
