"""Time and bytes sent of one selection over several processes, ours and TRL's.

    python -m benchmarks.selection_over_ranks [--quick] [--json FILE]

Writes benchmarks/results/distributed/selection.json and, from it, the table of docs/distributed.md; with --json, only
FILE. The processes are gloo ranks on one machine, one thread each, started by torchrun. The bytes are the counters of
the loopback interface, so nothing else may use it during the measurement.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import ROOT, environment
from benchmarks.report import _median, _spread, _time, with_table
from entropy_rl_ext import global_top_mask

RESULT = ROOT / "benchmarks" / "results" / "distributed" / "selection.json"
PAGE = ROOT / "docs" / "distributed.md"
RANKS = (2, 4)
RATIO = 0.2
ROWS, LENGTH = (2, 256), 4096  # 2^13 and 2^20 tokens per rank, padding included
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")

Contender = Callable[[Tensor, Tensor], Tensor]


def ours(rule: str) -> Contender:
    return lambda entropy, mask: global_top_mask(entropy, mask, RATIO, rule=rule, group=dist.group.WORLD)


def gathered(entropy: Tensor, mask: Tensor) -> Tensor:
    """The same mask as ours with topk, from all entropies gathered on every rank."""
    rows, ranks = len(entropy), dist.get_world_size()
    entropies, masks = (tensor.new_empty(ranks * rows, LENGTH) for tensor in (entropy, mask))
    dist.all_gather_into_tensor(entropies, entropy)
    dist.all_gather_into_tensor(masks, mask)
    return global_top_mask(entropies, masks, RATIO).split(rows)[dist.get_rank()]


def trl_quantile() -> Contender:
    """TRL's own method, which uses only the accelerator of its trainer."""
    from accelerate import Accelerator
    from trl import GRPOTrainer

    trainer: Any = SimpleNamespace(accelerator=Accelerator(cpu=True))
    return lambda entropy, mask: GRPOTrainer.get_high_entropy_mask(trainer, entropy, mask, 1 - RATIO)


def alone(entropy: Tensor, mask: Tensor) -> Tensor:
    """Each rank selects from its own tokens. Only the barriers of the measurement are sent."""
    return global_top_mask(entropy, mask, RATIO)


def inputs(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Entropies and response mask, [rows, LENGTH], of responses of LENGTH / 2 to LENGTH tokens."""
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (rows, 1), generator=generator)
    # Few tokens of high entropy among many of low entropy.
    return torch.rand(rows, LENGTH, generator=generator).pow(4) * 3, torch.arange(LENGTH) < lengths


def measure(contender: Contender, entropy: Tensor, mask: Tensor) -> tuple[float, float]:
    """The seconds of the slowest rank, and the bytes that all ranks sent."""
    dist.barrier()
    before = int(LOOPBACK.read_text())
    dist.barrier()
    begin = time.perf_counter()
    contender(entropy, mask)
    seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    dist.barrier()
    sent = int(LOOPBACK.read_text()) - before
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item(), float(sent)


def rank_main(quick: bool) -> None:
    """Runs on each rank. The first prints the record of each number of tokens as a line of JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for rows in ROWS[:1] if quick else ROWS:
        record = compare(rows, 2 if quick else 9)
        if dist.get_rank() == 0:
            print(json.dumps(record))
    dist.destroy_process_group()


def compare(rows: int, repetitions: int) -> dict[str, Any]:
    """The times and bytes of every contender with `rows` rows per rank."""
    contenders: dict[str, Contender] = {"ours, topk": ours("topk"), "ours, quantile": ours("quantile")}
    records: dict[str, dict[str, Any]] = {name: {} for name in contenders}
    try:
        contenders["TRL, quantile of a gather"] = trl_quantile()
    except ImportError as error:
        records["TRL, quantile of a gather"] = {"error": str(error)}
    contenders |= {"gather, then global_top_mask": gathered, "each rank alone": alone}
    generator = torch.Generator().manual_seed(dist.get_rank())
    batch = inputs(rows, generator)
    assert torch.equal(contenders["ours, topk"](*batch), gathered(*batch))
    if "TRL, quantile of a gather" in contenders:
        assert torch.equal(contenders["ours, quantile"](*batch), contenders["TRL, quantile of a gather"](*batch))
    for name in contenders:
        contenders[name](*batch)
        records.setdefault(name, {}).update(seconds=[], wire_bytes=[])
    order = list(contenders)
    for _ in range(repetitions):
        batch = inputs(rows, generator)
        order = order[1:] + order[:1]  # so that no contender always follows the same one
        for name in order:
            for values, value in zip(records[name].values(), measure(contenders[name], *batch), strict=True):
                values.append(value)
    return {"ranks": dist.get_world_size(), "tokens": rows * LENGTH, "contenders": records}


def table(result: dict[str, Any]) -> str:
    """A result file as Markdown."""
    lines = [
        f"{result['device_name']}, {result['cores']} cores, gloo, float32, ratio {RATIO}, "
        f"torch {result['versions']['torch']}, TRL {result['versions']['trl']}, commit "
        f"{(result['commit'] or 'unknown')[:10]}{' with changes' if result['modified'] else ''}, {result['date']}; "
        "time of the slowest rank, median and quartiles of "
        f"{len(result['runs'][0]['contenders']['ours, topk']['seconds'])}.",
        "",
        "| ranks | tokens a rank | who | time | quartiles | bytes sent, a rank |",
        "|---|---:|---|---|---|---|",
    ]
    for run in result["runs"]:
        batch = f"| {run['ranks']} | {run['tokens']:,} |"
        for name, record in run["contenders"].items():
            if "error" in record:
                lines.append(f"{batch} {name} | failed: {record['error']} | | |")
                continue
            sent = round(statistics.median(record["wire_bytes"]) / run["ranks"])
            lines.append(f"{batch} {name} | {_time(_median(record))} | {_spread(record)} | {sent:,} |")
    return "\n".join(lines) + "\n"


def page(result: dict[str, Any]) -> str:
    """docs/distributed.md with the table of `result`."""
    return with_table(PAGE, __spec__.name, table(result))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection_over_ranks")
    parser.add_argument(
        "--quick", action="store_true", help="two ranks, few tokens, two repetitions; writes with --json alone"
    )
    parser.add_argument("--json", type=Path, help=f"where the result goes; default: {RESULT.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if dist.is_torchelastic_launched():
        rank_main(arguments.quick)
        return
    runs = []
    for ranks in RANKS[:1] if arguments.quick else RANKS:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", __spec__.name]
        answer = subprocess.run(
            [sys.executable, *command, *(["--quick"] if arguments.quick else [])],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        runs += [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    result = {**environment("cpu"), "cores": os.cpu_count(), "runs": runs}
    print(table(result))
    path = arguments.json or (None if arguments.quick else RESULT)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    if path == RESULT:
        PAGE.write_text(page(result))


if __name__ == "__main__":
    main()
