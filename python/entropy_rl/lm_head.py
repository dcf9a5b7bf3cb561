"""The LM head by `linear_logprob_entropy`, inside the model's own forward.

For one call the head answers with log-probabilities and entropies in place of logits. It is the model that calls it:
whatever its forward does around the head still happens, and so do the hooks by which FSDP and DDP see a forward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from entropy_rl_ext import linear_logprob_entropy

_reasons: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def why_not(model: nn.Module) -> str | None:
    """Why the op cannot stand for the model's head; None: it can.

    The first time it is asked of a model it runs it on one token, without gradient: on every rank, if it is sharded.
    """
    if model not in _reasons:
        _reasons[model] = _why_not(model)
    return _reasons[model]


def _why_not(model: nn.Module) -> str | None:
    head = _head(model)
    if head is None:
        return "it names no output embeddings"
    # FSDP2 makes a subclass of every module's class; an adapter (LoRA) brings a forward of its own.
    if getattr(type(head), "forward", None) is not nn.Linear.forward or "forward" in vars(head):
        return f"its LM head is a {type(head).__name__} with a forward of its own, not a plain torch.nn.Linear"
    marker = torch.tensor([[[-2.0, 0.5]]], device=head.weight.device)
    token = torch.zeros(1, 1, dtype=torch.int64, device=head.weight.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), answering(head, lambda hidden: marker):
            logits = model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False).logits
    finally:
        model.train(training)
    if logits.shape != marker.shape or not torch.equal(logits.to(marker.dtype), marker):
        return "it changes its logits behind the head (a soft-cap or a scale)"
    return None


def _head(model: nn.Module) -> nn.Linear | None:
    model = getattr(model, "module", model)  # what DDP wraps
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


@contextmanager
def scoring(
    model: nn.Module, targets: Tensor, mask: Tensor, temperature: float, *, entropy_grad: bool = False
) -> Iterator[None]:
    """While it is open, the model's `logits` are [B, S + 1, 2]: log-probability of the target, and entropy.

    Args:
        model: one of which `why_not` is None. Its forward must keep S + 1 positions (`logits_to_keep`): each but the
            last scores the target that follows it, and the last gives 0.
        targets, mask: [B, S], as in `linear_logprob_entropy`.
    """
    head = _head(model)
    assert head is not None
    # The last position is one that the mask leaves out: cut off, the others would no longer be contiguous.
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

    with answering(head, score):
        yield


@contextmanager
def answering(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it is open, `head` computes `forward`, with the hooks around it as ever."""
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
