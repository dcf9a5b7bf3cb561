"""Time and bytes sent of one selection over several processes, ours and TRL's; or, with --counts, what it sends.

    python -m benchmarks.selection_over_ranks [--counts] [--quick] [--json FILE]

Writes benchmarks/results/distributed/selection.json and, from it, the table of docs/distributed.md; with --counts
counts.json there and the table of docs/scale.md; with --json, only FILE. The processes are gloo ranks on one machine,
one thread each, started by torchrun. The bytes beside the times are the counters of the loopback interface, so nothing
else may use it during the measurement. --counts reads the counters of each rank's own connections instead, in forks of
one process: 16 processes that import torch would take minutes to start.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import ROOT, environment
from benchmarks.report import _median, _spread, _time, commit_of, with_table
from benchmarks.scale import ring_all_gather, ring_all_reduce
from entropy_rl_ext import global_top_mask

RESULT = ROOT / "benchmarks" / "results" / "distributed" / "selection.json"
PAGE = ROOT / "docs" / "distributed.md"
RANKS = (2, 4)
COUNTS = RESULT.with_name("counts.json")
SCALE = ROOT / "docs" / "scale.md"
COUNTED_RANKS = (2, 4, 8, 16)
RATIO = 0.2
LENGTH = 4096
REPETITIONS = {2: 101, 256: 15}  # of each number of rows per rank: 2^13 and 2^20 tokens, padding included
HEADER = 48  # bytes of gloo before each message
COUNTED_ROWS = (2, 32)  # few tokens, which are gathered, and many
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


@contextlib.contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """The collectives that begin within it: names, and bytes that this rank puts in."""
    begun: list[tuple[str, int]] = []
    names = {"all_reduce", "all_gather_into_tensor", "all_gather_single"}  # the last since torch 2.13
    originals = {name: getattr(dist, name) for name in names & vars(dist).keys()}

    def recorded(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            begun.append((name, arguments[0 if name == "all_reduce" else 1].nbytes))
            return originals[name](*arguments, **options)

        return call

    vars(dist).update({name: recorded(name) for name in originals})
    try:
        yield begun
    finally:
        vars(dist).update(originals)


def sent_over_tcp() -> int:
    """Bytes that this process has sent on its open TCP connections, each once."""
    sent = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
        except OSError:  # closed by now, or not of TCP
            continue
        # Of struct tcp_info in linux/tcp.h: tcpi_bytes_sent and tcpi_bytes_retrans.
        total, again = struct.unpack_from("QQ", info, 200)
        sent += total - again
    return sent


def count(rows: int, repetitions: int) -> dict[str, Any]:
    """What every contender sends with `rows` rows per rank."""
    contenders = {"ours, topk": ours("topk"), "ours, quantile": ours("quantile")}
    contenders["gather, then global_top_mask"] = gathered
    batch = inputs(rows, torch.Generator().manual_seed(dist.get_rank()))
    records: dict[str, Any] = {}
    for name, contender in contenders.items():
        contender(*batch)  # so that ours knows how many values to expect
        wire_bytes = []
        for _ in range(repetitions):
            dist.barrier()
            time.sleep(0.2)  # until the barrier's last message is sent; below, until the contender's is
            before = sent_over_tcp()
            with collectives() as begun:
                contender(*batch)
            time.sleep(0.2)
            sent = torch.tensor(sent_over_tcp() - before)
            dist.all_reduce(sent)
            wire_bytes.append(int(sent))
        records[name] = {"collectives": begun, "wire_bytes": wire_bytes}
    return {"ranks": dist.get_world_size(), "tokens": rows * LENGTH, "contenders": records}


def count_on_rank(rank: int, ranks: int, store: str, records: Any) -> None:
    """Runs on each rank of --counts. The first puts the record of each number of tokens into the queue."""
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    for rows in COUNTED_ROWS:
        record = count(rows, 5)
        if rank == 0:
            records.put(record)
    dist.destroy_process_group()


def counted(ranks: int) -> list[dict[str, Any]]:
    """The records of that many processes, one for each number of tokens."""
    context = multiprocessing.get_context("fork")
    records = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, f"{folder}/store", records)
        processes = [context.Process(target=count_on_rank, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"one of {ranks} processes failed; its error is above")
    return [records.get() for _ in COUNTED_ROWS]


def rank_main(quick: bool) -> None:
    """Runs on each rank. The first prints the record of each number of tokens as a line of JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for rows, repetitions in REPETITIONS.items():
        record = compare(rows, 2 if quick else repetitions)
        if dist.get_rank() == 0:
            print(json.dumps(record))
        if quick:
            break
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
        f"torch {result['versions']['torch']}, TRL {result['versions']['trl']}, "
        f"{commit_of(result)}, {result['date']}; "
        f"time of the slowest rank, median and quartiles of {_repetitions(result)}.",
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


def _repetitions(result: dict[str, Any]) -> str:
    """How often each number of tokens was measured."""
    times = {run["tokens"]: len(run["contenders"]["ours, topk"]["seconds"]) for run in result["runs"]}
    return " and of ".join(f"{count} ({tokens:,} tokens)" for tokens, count in times.items())


def page(result: dict[str, Any]) -> str:
    """docs/distributed.md with the table of `result`."""
    return with_table(PAGE, __spec__.name, table(result))


def table_of_counts(result: dict[str, Any]) -> str:
    """A result file of --counts as Markdown."""
    lines = [
        f"gloo, float32, ratio {RATIO}, torch {result['versions']['torch']}, {commit_of(result)}, "
        f"{result['date']}; "
        "medians over "
        f"{len(result['runs'][0]['contenders']['ours, topk']['wire_bytes'])} selections, divided by the ranks.",
        "",
        "| ranks | tokens a rank | who | collectives | payload, bytes | in rings, bytes | sent, bytes | messages |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for run in result["runs"]:
        for name, record in run["contenders"].items():
            sizes = [size for _, size in record["collectives"]]
            rings, sent = sent_by_rings(record["collectives"], run["ranks"]), statistics.median(record["wire_bytes"])
            of_rank = [round(total / run["ranks"]) for total in (rings, sent, (sent - rings) / HEADER)]
            cells = [len(sizes), sum(sizes), *of_rank]
            lines.append(f"| {run['ranks']} | {run['tokens']:,} | {name} | {' | '.join(f'{n:,}' for n in cells)} |")
    return "\n".join(lines) + "\n"


def sent_by_rings(begun: list[tuple[str, int]], ranks: int) -> int:
    """The bytes that all ranks send if each of these collectives is a ring."""
    hops = torch.zeros(ranks, dtype=torch.float64)
    return sum(
        int((ring_all_reduce if name == "all_reduce" else ring_all_gather)(size, hops).bytes.sum())
        for name, size in begun
    )


def page_of_counts(result: dict[str, Any]) -> str:
    """docs/scale.md with the table of `result`."""
    return with_table(SCALE, f"{__spec__.name} --counts", table_of_counts(result))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection_over_ranks")
    parser.add_argument("--counts", action="store_true", help="collectives and bytes with up to 16 processes, no times")
    parser.add_argument(
        "--quick", action="store_true", help="two ranks, few tokens, two repetitions; writes with --json alone"
    )
    parser.add_argument("--json", type=Path, help="where the result goes; default: benchmarks/results/distributed")
    arguments = parser.parse_args()
    if dist.is_torchelastic_launched():
        rank_main(arguments.quick)
        return
    runs = []
    if arguments.counts:
        torch.set_num_threads(1)  # forks of a process with several threads could wait for them forever
        runs = [record for ranks in COUNTED_RANKS for record in counted(ranks)]
    for ranks in () if arguments.counts else RANKS[:1] if arguments.quick else RANKS:
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
    print(table_of_counts(result) if arguments.counts else table(result))
    default = COUNTS if arguments.counts else RESULT
    path = arguments.json or (None if arguments.quick else default)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    if path == COUNTS:
        SCALE.write_text(page_of_counts(result))
    elif path == RESULT:
        PAGE.write_text(page(result))


if __name__ == "__main__":
    main()
