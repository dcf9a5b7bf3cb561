"""The LM head by `linear_logprob_entropy`, inside the model's own forward.

`scoring` makes the head return log-probabilities and entropies instead of logits. The model still calls its head, so
everything else that its forward does still happens, and so do the hooks of FSDP and DDP.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from entropy_rl_ext import linear_logprob_entropy

_reasons: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def unsupported_reason(model: nn.Module) -> str | None:
    """Why the op cannot replace the model's LM head; None if it can.

    The first call for a model runs it on one token, without gradient. If the model is sharded, all ranks must call.
    """
    if model not in _reasons:
        _reasons[model] = _find_reason(model)
    return _reasons[model]


def _find_reason(model: nn.Module) -> str | None:
    head = _head(model)
    if head is None:
        return "it has no output embeddings"
    # FSDP2 makes a subclass of every module's class; an adapter (LoRA) overrides the forward.
    if getattr(type(head), "forward", None) is not nn.Linear.forward or "forward" in vars(head):
        return f"its LM head is a {type(head).__name__} with its own forward, not a plain torch.nn.Linear"
    marker = torch.tensor([[[-2.0, 0.5]]], device=head.weight.device)
    token = torch.zeros(1, 1, dtype=torch.int64, device=head.weight.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), patched_forward(head, lambda hidden: marker):
            logits = model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False).logits
    finally:
        model.train(training)
    if logits.shape != marker.shape or not torch.equal(logits.to(marker.dtype), marker):
        return "it changes the logits after the LM head (a soft-cap or a scale)"
    return None


def _head(model: nn.Module) -> nn.Linear | None:
    inner: Any = getattr(model, "module", model)  # what DDP wraps
    return inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None


@contextmanager
def scoring(
    model: nn.Module, targets: Tensor, mask: Tensor, temperature: float, *, entropy_grad: bool = False
) -> Iterator[None]:
    """Context in which the model's `logits` are [B, S + 1, 2]: the log-probability of the target, and the entropy.

    Args:
        model: a model for which `unsupported_reason` is None. Its forward must keep S + 1 positions
            (`logits_to_keep`). Each position scores the target that follows it; the last has no target and gives 0.
        targets, mask: [B, S], as in `linear_logprob_entropy`.
    """
    head = _head(model)
    assert head is not None
    # The mask leaves the last position out. Slicing it off would make the hidden states non-contiguous.
    targets, mask = nn.functional.pad(targets, (0, 1)), nn.functional.pad(mask, (0, 1))

    def score(hidden: Tensor) -> Tensor:
        outputs = linear_logprob_entropy(
            hidden,
            head.weight,
            targets,
            bias=head.bias,
            mask=mask,
            temperature=temperature,
            entropy_grad=entropy_grad,
        )
        return torch.stack(outputs, -1)

    with patched_forward(head, score):
        yield


@contextmanager
def patched_forward(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Context in which `head` computes `forward`. The hooks of the module still run."""
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
