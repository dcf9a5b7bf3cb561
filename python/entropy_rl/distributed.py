"""The processes of a run: this one alone, or those that torchrun started, each with its share of every batch.

Without torchrun there is one rank, and every function here is its plain case: a sum over ranks is the value itself.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

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


def local_rank() -> int:
    """The number of this process on its machine, by which it takes a GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def process_group(device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """Joins the ranks that torchrun started. A collective that takes longer than the timeout ends the run."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_seconds)
    )
    yield
    # After an error the process ends without: it would wait here for ranks that wait for it elsewhere.
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def seed_of_rank(seed: int) -> int:
    """Another one for each rank; of rank 0 the same."""
    return seed + (rank() << 40)


def reduce(value: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """`value` combined over all ranks, of the same shape on each."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value, operation)
    return value


def gather(value: Any) -> list[Any]:
    """What each rank gives, in their order, on all of them. Anything that pickle takes; the host waits for it."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """What rank 0 gives."""
    return gather(value)[0]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


# ---- The model


def distribute(model: nn.Module, strategy: str, device: torch.device) -> nn.Module:
    """The model over all ranks: "fsdp2" shards it, in place, layer by layer; "ddp" gives each rank all of it.

    Gradients are averaged over the ranks.
    """
    if not dist.is_initialized():
        return model
    if strategy == "ddp":
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            # The same on every rank from the start.
            broadcast_buffers=False,
        )
    mesh = init_device_mesh(device.type, (size(),))
    layers = set(model._no_split_modules or ())  # transformers' name for what must stay on one device
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def reduces_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next forward and backward reduces gradients over ranks: the last one of a step must.

    Sharded gradients have no room for those of the other shards, and are reduced every time.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = wanted


@contextmanager
def whole(model: nn.Module) -> Iterator[nn.Module]:
    """The model itself, with all of its parameters on every rank: ranks may run it as often as each of them likes.

    A sharded model's forward is a collective: one that not all ranks run would hang.
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
            # The root keeps its own from the forward to the backward, as fully_shard decides by itself.
            module.set_reshard_after_forward(module is not model, recurse=False)


def full_norm(norm: Tensor) -> Tensor:
    """A norm over sharded gradients, as a plain number."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


# ---- States, which do not depend on the number of ranks


def full_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and optimizer state, whole and by parameter name, on the CPU of rank 0; empty on the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    # A tied parameter once: gathered twice, transformers would not know it for one and would write both.
    own = {name for name, _ in [*unwrapped(model).named_parameters(), *unwrapped(model).named_buffers()]}
    weights = {name: weight for name, weight in weights.items() if name in own}
    return weights, get_optimizer_state_dict(model, optimizer, options=options)


def load_optimizer(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Takes up the optimizer state that `full_state` gave, whole on every rank."""
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
