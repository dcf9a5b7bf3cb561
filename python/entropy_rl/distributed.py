"""The processes of a run: this process alone, or those that torchrun started, each with its share of every batch.

Without torchrun there is one rank, and each function does the obvious thing: a sum over ranks is the value itself.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from entropy_rl.errors import UserError


def local_rank() -> int:
    """The number of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def process_group(device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """Joins the ranks that torchrun started. The run ends if a collective takes longer than the timeout."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_seconds)
    )
    yield
    # Not after an error: this process would wait here for ranks that wait for it in another collective.
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def seed_of_rank(seed: int) -> int:
    """A different seed for each rank; rank 0 keeps `seed`."""
    return seed + (rank() << 40)


def reduce(value: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """`value` combined over all ranks. It has the same shape on each."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value, operation)
    return value


def gather(value: Any) -> list[Any]:
    """The values of all ranks in their order, on every rank. Takes anything that pickle does. Syncs with the host."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def gather_on_first(value: Any) -> list[Any]:
    """The values of all ranks in their order, on rank 0; the other ranks get an empty list. Takes what pickle does."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def from_first(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    return gather(value)[0]


def on_first(action: Callable[[], None]) -> None:
    """Runs `action` on rank 0. A UserError that it raises is raised on every rank, so that none waits for another."""
    error = None
    if rank() == 0:
        try:
            action()
        except UserError as raised:
            error = raised
    error = from_first(error)
    if error is not None:
        raise error


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


# ---- The model


def distribute(model: nn.Module, strategy: str, device: torch.device) -> nn.Module:
    """Distributes a model over all ranks: "fsdp2" shards it in place, layer by layer; "ddp" gives each rank a copy.

    Gradients are averaged over the ranks.
    """
    if not dist.is_initialized():
        return model
    if strategy == "ddp":
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            # They are the same on every rank from the start.
            broadcast_buffers=False,
        )
    mesh = init_device_mesh(device.type, (size(),))
    layers = set(cast(Any, model)._no_split_modules or ())  # the classes that transformers keeps on one device
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def reduces_gradients(model: nn.Module, wanted: bool) -> None:
    """Sets whether the next forward and backward reduces gradients over ranks. The last one of a step must.

    FSDP2 reduces every time, because a rank has no memory for the gradients of the other shards.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = wanted


@contextmanager
def unsharded(model: nn.Module) -> Iterator[Any]:
    """The model with all of its parameters on every rank, so that each rank can run it as often as it needs.

    The forward of a sharded model is a collective: it hangs unless all ranks run it.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield unwrapped(model)
    finally:
        for module in sharded:
            module.reshard()
            # fully_shard's default: the root keeps its parameters from the forward to the backward.
            module.set_reshard_after_forward(module is not model, recurse=False)


def full_norm(norm: Tensor) -> Tensor:
    """The norm of sharded gradients as a plain tensor."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


# ---- Unsharded states


def full_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Unsharded weights and optimizer state by parameter name, on the CPU of rank 0; empty on the other ranks."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    # A tied parameter only once: transformers does not recognize two gathered copies as one and would write both.
    own = {name for name, _ in [*unwrapped(model).named_parameters(), *unwrapped(model).named_buffers()]}
    weights = {name: weight for name, weight in weights.items() if name in own}
    return cast(dict[str, Tensor], weights), get_optimizer_state_dict(model, optimizer, options=options)


def load_optimizer(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads an optimizer state of `full_state`, which every rank must have."""
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
