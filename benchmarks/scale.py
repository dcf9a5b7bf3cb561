"""Simulates the collectives of one selection over many processes, hop by hop: the figures of docs/scale.md.

    python -m benchmarks.scale

The payloads are those that `python -m benchmarks.selection_over_ranks --counts` has counted with 2 to 16 processes; the
latencies and bandwidths are NCCL's own, which docs/scale.md lists. A simulated time is that of the latency along the
slowest path plus that of the bytes, as in NCCL's model. Nothing here communicates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MACHINES, GPUS = 128, 8
TOKENS = 2**20  # of a rank


class Protocol(NamedTuple):
    """µs to begin, and for a hop within a machine and between two; bytes that a machine moves in a µs."""

    begin: float
    inside: float
    between: float
    bandwidth: float


LL_TREE = Protocol(6.8, 0.6, 5.0, 20_400 / 2)
LL_RING = Protocol(6.6, 1.0, 2.7, 20_400 / 2)
SIMPLE_RING = Protocol(8.4, 3.4, 14.0, 400_000)


class Sent(NamedTuple):
    """The result of a collective."""

    microseconds: float  # until the last rank has finished, without the time of the bytes
    bytes: Tensor  # [ranks] int64: sent by each rank


def payloads(ranks: int) -> list[int]:
    """Bytes of each all-reduce of a selection of float32 entropies with `topk`: three histograms and the ties."""
    return [16_384, 16_384, 8_192, 8 * ranks]


def ring(steps: int, parts: Tensor, hops: Tensor) -> Sent:
    """Passes parts of a buffer on around a ring.

    In each step every rank sends one part, in the first the part with its own number, then the one that it has just
    received.

    Args:
        steps: how often.
        parts: [ranks] int64, bytes.
        hops: [ranks] float64, µs from each rank to the next one.
    """
    ready = torch.zeros_like(hops)
    sent = torch.zeros_like(parts)
    for _ in range(steps):
        sent += parts
        parts = parts.roll(1)
        ready = torch.maximum(ready, (ready + hops).roll(1))
    return Sent(ready.max().item(), sent)


def ring_all_reduce(payload: int, hops: Tensor) -> Sent:
    """Adds up a part on its way around, then hands on the sum. Parts are equal, up to 4 bytes."""
    ranks, words = len(hops), payload // 4
    parts = torch.full((ranks,), words // ranks)
    parts[: words % ranks] += 1
    return ring(2 * (ranks - 1), 4 * parts, hops)


def ring_all_gather(payload: int, hops: Tensor) -> Sent:
    return ring(len(hops) - 1, torch.full((len(hops),), payload), hops)


def ring_hops(machines: int, gpus: int, protocol: Protocol) -> Tensor:
    """[ranks] float64: µs from each rank to the next one; the last rank of a machine sends to another machine."""
    last = torch.arange(1, machines * gpus + 1) % gpus == 0
    return torch.where(last, protocol.between, protocol.inside).double()


def tree_all_reduce(payload: int, machines: int, gpus: int, protocol: Protocol) -> Sent:
    """Sends the payload up a tree, where it is added, and down again.

    The GPUs of a machine are a chain to its first one, and these are a binary tree, as in NCCL.
    """
    sent = torch.zeros(machines * gpus, dtype=torch.int64)
    microseconds = [0.0]
    for rank in range(1, machines * gpus):
        sent[rank] += payload
        sent[parent(rank, machines, gpus)] += payload
        to_root = 0.0
        while rank != 0:
            to_root += protocol.inside if rank % gpus else protocol.between
            rank = parent(rank, machines, gpus)
        microseconds.append(2 * to_root)
    return Sent(max(microseconds), sent)


def parent(rank: int, machines: int, gpus: int) -> int:
    """Of a rank above 0. A machine whose number ends with the bit 2^i has a parent that ends with 2^(i + 1)."""
    machine, gpu = divmod(rank, gpus)
    if gpu:
        return rank - 1
    bit = machine & -machine
    up = (machine ^ bit) | (bit << 1)
    return gpus * (up if up < machines else machine ^ bit)


class Plan(NamedTuple):
    """Of one selection, or of what takes its place: µs, and bytes that a rank sends, on average."""

    microseconds: float
    bytes: float


def selection(machines: int, gpus: int = GPUS) -> Plan:
    """This package's all-reduces, as trees."""
    sent = [(payload, tree_all_reduce(payload, machines, gpus, LL_TREE)) for payload in payloads(machines * gpus)]
    return Plan(
        sum(LL_TREE.begin + one.microseconds + payload / LL_TREE.bandwidth for payload, one in sent),
        sum(one.bytes.double().mean().item() for _, one in sent),
    )


def ring_latency(machines: int, gpus: int = GPUS) -> float:
    """µs of one small all-reduce as a ring."""
    return LL_RING.begin + ring_all_reduce(8 * machines * gpus, ring_hops(machines, gpus, LL_RING)).microseconds


def tree_latency(machines: int, gpus: int = GPUS) -> float:
    """µs of one small all-reduce as a tree."""
    return LL_TREE.begin + tree_all_reduce(8, machines, gpus, LL_TREE).microseconds


def gather_of_entropies(machines: int, gpus: int = GPUS) -> Plan:
    """An all-gather of all float32 entropies as a ring."""
    sent = ring_all_gather(4 * TOKENS, ring_hops(machines, gpus, SIMPLE_RING))
    of_rank = sent.bytes.double().mean().item()
    return Plan(SIMPLE_RING.begin + sent.microseconds + of_rank / SIMPLE_RING.bandwidth, of_rank)


def figures() -> dict[str, str]:
    """What is computed, and as docs/scale.md prints it."""
    ours, gather, twice = selection(MACHINES), gather_of_entropies(MACHINES), selection(2 * MACHINES)
    latency = gather.microseconds - gather.bytes / SIMPLE_RING.bandwidth
    return {
        "bytes of a selection": f"{ours.bytes:,.0f} bytes a rank on average",
        "a selection": f"**{ours.microseconds / 1e3:.2f} ms an optimizer step**",
        "one all-reduce as a tree": f"= {tree_latency(MACHINES):.0f} µs",
        "one all-reduce as a ring": f"{ring_latency(MACHINES):,.0f} µs",
        "twice the machines add": f"{twice.microseconds - ours.microseconds:.0f} µs",
        "bytes of a gather": f"= {gather.bytes / 1e9:.2f} GB",
        "latency of a gather": f"= {latency:,.0f} µs",
        "a gather": f"**{gather.microseconds / 1e3:.1f} ms**",
        "a gather against a selection": f"{gather.microseconds / ours.microseconds:.0f} times as long",
    }


if __name__ == "__main__":
    for name, figure in figures().items():
        print(f"{name}: {figure}")
