"""PTX instructions and loads per element of every kernel that streams, as docs/cuda_instructions.md.

    tests/emulator/run.sh python tools/instruction_counts.py docs/cuda_instructions.md

writes the page. tests/emulator/test_instruction_counts.py compares it with the kernels. Inputs are large enough that
the main loops outweigh what a kernel does once.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compile_report
import device
import torch
from torch import Tensor

import entropy_rl_ext as ext

TOLERANCE = 1.03
PAGE = """# PTX instructions of the CUDA kernels

Written by `make instruction-counts` (`tools/instruction_counts.py`) from a run on the [emulated
device](emulation.md). `make test-emulated` fails where a kernel runs over 3 % more instructions or
loads per element than here. Counts are of PTX; [cuda_kernels.md](cuda_kernels.md) describes the
machine code that ptxas makes of it. An instruction counts once for each thread that runs it, a load
once whatever its width.

| work | kernel | instructions per element | global loads per element |
|---|---|---:|---:|
"""
ops = torch.ops.entropy_rl
Counts = dict[tuple[str, str], tuple[float, float]]  # (work, kernel): instructions and loads per element


def logits(rows: int, vocab: int, offset: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Logits that begin `offset` elements after an aligned address."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows * vocab + offset, generator=generator).to(dtype)
    return device.to_device(values)[offset:].view(rows, vocab)


def entropy_work(x: Tensor) -> Callable[[], Any]:
    def run() -> None:
        leaf = x.detach().requires_grad_()
        ext.token_entropy(leaf).sum().backward()

    return run


def linear_work(rows: int, vocab: int) -> Callable[[], Any]:
    hidden, weight = logits(rows, 8), logits(vocab, 8)
    targets = torch.zeros(rows, dtype=torch.int64, device="cuda")

    def run() -> None:
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        log_prob, _ = ext.linear_logprob_entropy(*leaves, targets)
        log_prob.sum().backward()

    return run


def selection_work(rows: int, columns: int, scope: str, algorithm: str, groups: int = 0) -> Callable[[], Any]:
    x = logits(rows, columns, dtype=torch.float32).abs()
    mask = x > -1
    ratio = torch.tensor(0.2, dtype=torch.float64)
    group_ids = device.to_device(torch.arange(rows) % groups) if groups else None
    return lambda: ops.global_top_mask_forward(x, mask, ratio, "topk", scope, group_ids, algorithm)


def loss_work(loss_mode: str, rows: int, columns: int) -> Callable[[], Any]:
    log_prob, old, advantages = (logits(rows, columns, dtype=torch.float32) for _ in range(3))
    mask = log_prob > -10

    def run() -> None:
        leaf = log_prob.detach().requires_grad_()
        options = {"dro_beta": 0.1} if loss_mode == "dro" else {}
        ext.policy_loss(leaf, old, advantages, mask, loss_mode=loss_mode, **options)[0].backward()

    return run


def make_work() -> dict[str, tuple[int, Callable[[], Any]]]:
    """What is counted: how many elements it has, and a function that runs it."""
    tokens = 1 << 17
    work = {
        "token_entropy bf16 [2, 65536]": (2 << 16, entropy_work(logits(2, 1 << 16))),
        "token_entropy bf16 [2, 65536], misaligned": (2 << 16, entropy_work(logits(2, 1 << 16, offset=1))),
        "token_entropy bf16 [800, 2048]": (800 << 11, entropy_work(logits(800, 2048))),
        "token_entropy bf16 [2, 151936]": (2 * 151936, entropy_work(logits(2, 151936))),
        "token_entropy fp32 [2, 65536]": (2 << 16, entropy_work(logits(2, 1 << 16, dtype=torch.float32))),
        "linear_logprob_entropy bf16 [8, 65536]": (8 << 16, linear_work(8, 1 << 16)),
        "global_top_mask fp32 [1, 131072], radix": (tokens, selection_work(1, tokens, "batch", "radix")),
        "global_top_mask fp32 [1, 131072], sort": (tokens, selection_work(1, tokens, "batch", "sort")),
        "global_top_mask fp32 [32, 4096] by row, radix": (tokens, selection_work(32, 4096, "sequence", "radix")),
        "global_top_mask fp32 [128, 1024] in 2 groups": (tokens, selection_work(128, 1024, "group", "radix", 2)),
        "global_top_mask fp32 [128, 1024] in 16 groups": (tokens, selection_work(128, 1024, "group", "radix", 16)),
    }
    for mode in ("vanilla", "gspo", "cispo"):
        work[f"policy_loss {mode} fp32 [64, 2048]"] = (tokens, loss_work(mode, 64, 2048))
    return work


def is_global_load(opcode: str) -> bool:
    return opcode.startswith("ld.global") or opcode.startswith("ld.volatile.global")


def count() -> Counts:
    counts: Counts = {}
    for name, (elements, run) in make_work().items():
        device.profile()
        run()
        profile = [(kernel, opcode, int(times)) for kernel, _, opcode, _, times in device.profile()]
        mangled = sorted({kernel for kernel, _, _ in profile})
        names = {kernel: name.split("<")[0] for kernel, name in compile_report.readable(mangled).items()}
        for kernel, opcode, times in profile:
            instructions, loads = counts.get((name, names[kernel]), (0.0, 0.0))
            loads += times / elements * is_global_load(opcode)
            counts[name, names[kernel]] = instructions + times / elements, loads
    # A kernel that costs next to nothing says nothing about a loop.
    return {key: value for key, value in counts.items() if value[0] >= 0.5}


def page(counts: Counts) -> str:
    return PAGE + "".join(f"| {work} | `{k}` | {i:.2f} | {loads:.3f} |\n" for (work, k), (i, loads) in counts.items())


def parse(text: str) -> Counts:
    rows = re.findall(r"^\| (.+?) \| `([\w:]+)` \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    return {(work, kernel): (float(i), float(loads)) for work, kernel, i, loads in rows}


def problems(old: Counts, new: Counts) -> list[str]:
    """Kernels over 3 % longer than they were, and those that are only in one of both."""
    found = [f"{work}, {kernel}: in the page and not run" for work, kernel in old.keys() - new.keys()]
    found += [f"{work}, {kernel}: runs and is not in the page" for work, kernel in new.keys() - old.keys()]
    for key in old.keys() & new.keys():
        for what, before, after in zip(("instructions", "loads"), old[key], new[key], strict=True):
            if after > before * TOLERANCE + 0.01:
                found.append(f"{', '.join(key)}: {after:.3f} {what} per element, were {before:.3f}")
    return sorted(found)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    Path(sys.argv[1]).write_text(page(count()))


if __name__ == "__main__":
    main()
