"""Time and memory of an LM head's share under tensor parallelism 2: ours, and verl's without its CUDA kernel.

    PYTHONPATH=.:python:.venv-verl/megatron .venv-verl/bin/python -m benchmarks.head_over_ranks [--quick] [--json FILE]

Forward and backward of the head that Megatron's ranks share, from hidden states to the gradients of the hidden states
and of each rank's rows of the weight. verl's contender is what its Megatron engine runs with use_fused_kernels=false:
Megatron's output layer, then `_lm_head_logits_processor`. The processes are gloo ranks on one machine, one thread
each, started by torchrun. Writes benchmarks/results/distributed/head.json and, from it, the table of docs/verl.md;
with --json, only FILE.
"""

import argparse
import json
import os
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

from benchmarks.harness import ROOT, _peak_bytes, environment
from benchmarks.report import _median, _memory, _spread, _time, commit_of, with_table
from entropy_rl_ext import linear_logprob_entropy

RESULT = ROOT / "benchmarks" / "results" / "distributed" / "head.json"
PAGE = ROOT / "docs" / "verl.md"
RANKS = 2
ROWS, HIDDEN, VOCAB = 512, 512, 65_536
QUICK = (32, 16, 256)
SELECTED = 0.2
VERL = "verl, `use_fused_kernels=false`"

# From hidden states [rows, H], a shard [V / ranks, H], targets [rows] and the mask of the selected rows [rows] to
# log-probs and entropies, both [rows].
Contender = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(selected_only: bool) -> Contender:
    def head(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, entropy = linear_logprob_entropy(
            hidden,
            weight,
            targets,
            mask=mask if selected_only else None,
            max_grad_rows=int(mask.sum()),
            vocab_start=dist.get_rank() * len(weight),
            vocab_size=dist.get_world_size() * len(weight),
            group=dist.group.WORLD,
        )
        return log_prob, entropy

    return head


def verls() -> Contender:
    """verl's engine and Megatron's layer; neither needs the rest of a model."""
    import verl.workers.engine.megatron.transformer_impl as megatron
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce as output_layer

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    engine: Any = SimpleNamespace(engine_config=SimpleNamespace(entropy_from_logits_with_chunking=False))

    def head(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        logits = output_layer(
            hidden[None],
            weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=True,
            sequence_parallel=False,
            tp_group=dist.group.WORLD,
        )
        outputs = megatron.MegatronEngineWithLMHead._lm_head_logits_processor(
            engine,
            logits,
            targets[None],
            torch.ones_like(targets[None], dtype=torch.float32),
            calculate_sum_pi_squared=False,
            calculate_entropy=True,
            distillation_use_topk=False,
            distillation_only=False,
            logits_processor_func=None,
            batch=None,
            data_format="thd",
        )
        return outputs["log_probs"][0], outputs["entropy"][0]

    return head


def inputs(rows: int, hidden: int, vocab: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The same on every rank, except its shard of the weight."""
    states = torch.randn(rows, hidden, generator=generator)
    weight = torch.randn(vocab, hidden, generator=generator) * hidden**-0.5 * 3
    targets = torch.randint(vocab, (rows,), generator=generator)
    mask = torch.rand(rows, generator=generator).argsort() < SELECTED * rows
    shard = weight.chunk(dist.get_world_size())[dist.get_rank()].clone()
    return states.requires_grad_(), shard.requires_grad_(), targets, mask


def step(contender: Contender, states: Tensor, shard: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Log-probs and entropies of the selected rows, and the gradients of a loss that reads only their log-probs."""
    states.grad = shard.grad = None
    log_prob, entropy = contender(states, shard, targets, mask)
    (log_prob * mask).sum().backward()
    assert states.grad is not None and shard.grad is not None
    return log_prob.detach()[mask], entropy.detach()[mask], states.grad, shard.grad


def compare(rows: int, hidden: int, vocab: int, repetitions: int) -> dict[str, Any]:
    contenders = {"ours, all rows": ours(False), "ours, the selected rows": ours(True), VERL: verls()}
    generator = torch.Generator().manual_seed(0)
    batch = inputs(rows, hidden, vocab, generator)
    expected = step(contenders[VERL], *batch)
    records: dict[str, dict[str, Any]] = {}
    for name, contender in contenders.items():
        for value, other in zip(step(contender, *batch), expected, strict=True):
            assert (value - other).norm() <= 1e-5 * other.norm(), name
        peak = torch.tensor(_peak_bytes(lambda contender=contender: step(contender, *batch), "cpu") or 0)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        records[name] = {"seconds": [], "peak_bytes": int(peak)}
    order = list(contenders)
    for _ in range(repetitions):
        order = order[1:] + order[:1]  # so that no contender always follows the same one
        for name in order:
            dist.barrier()
            begin = time.perf_counter()
            step(contenders[name], *batch)
            seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            records[name]["seconds"].append(seconds.item())
    return {"ranks": dist.get_world_size(), "rows": rows, "hidden": hidden, "vocab": vocab, "contenders": records}


def rank_main(quick: bool) -> None:
    """Runs on each rank. The first prints the record as a line of JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    record = compare(*(QUICK if quick else (ROWS, HIDDEN, VOCAB)), repetitions=2 if quick else 9)
    if dist.get_rank() == 0:
        print(json.dumps(record))
    dist.destroy_process_group()


def table(result: dict[str, Any]) -> str:
    """A result file as Markdown."""
    (run,) = result["runs"]
    slowest = _median(run["contenders"][VERL])
    lines = [
        f"{result['device_name']}, {run['ranks']} processes of one thread, gloo, float32, {run['rows']} rows, "
        f"H = {run['hidden']:,}, V = {run['vocab']:,}, {SELECTED:.0%} of the rows selected, torch "
        f"{result['versions']['torch']}, verl {result['versions']['verl']}, "
        f"{commit_of(result)}, {result['date']}; time of the slower process, median and "
        f"quartiles of {len(run['contenders'][VERL]['seconds'])}; peak of the larger process, without its inputs.",
        "",
        "| who | time | quartiles | verl's against it | memory |",
        "|---|---|---|---:|---:|",
    ]
    for name, record in run["contenders"].items():
        ratio = slowest / _median(record)
        lines.append(f"| {name} | {_time(_median(record))} | {_spread(record)} | {ratio:.2f} | {_memory(record)} |")
    return "\n".join(lines) + "\n"


def page(result: dict[str, Any]) -> str:
    """docs/verl.md with the table of `result`."""
    return with_table(PAGE, __spec__.name, table(result))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head_over_ranks")
    parser.add_argument("--quick", action="store_true", help="a small head, two repetitions; writes with --json alone")
    parser.add_argument("--json", type=Path, help=f"where the result goes; default: {RESULT.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if dist.is_torchelastic_launched():
        rank_main(arguments.quick)
        return
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m", __spec__.name]
    answer = subprocess.run(
        [sys.executable, *command, *(["--quick"] if arguments.quick else [])],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "VERL_USE_EXTERNAL_MODULES": "entropy_rl.integrations.verl.cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    runs = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith('{"ranks"')]
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
