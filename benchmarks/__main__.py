"""python -m benchmarks [--device cpu|cuda] [--op OP ...] [--threads N ...] [--json DIRECTORY] [--quick]"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch

from benchmarks.harness import environment, measure_copy, run_case
from benchmarks.report import table

HERE = Path(__file__).parent
OPS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Every op against its peers.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--threads", nargs="+", type=int, help="CPU threads, a run each; default: as torch has it")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where results go; default: benchmarks/results/<device>")
    parser.add_argument("--quick", action="store_true", help="small inputs, two repetitions; writes with --json alone")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none")
    directory = arguments.json or (None if arguments.quick else HERE / "results" / arguments.device)
    size = "quick" if arguments.quick else arguments.device
    repetitions = 2 if arguments.quick else arguments.repetitions

    def tick(what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)

    for threads in arguments.threads or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        copy = measure_copy(arguments.device)
        for op in arguments.op:
            torch.manual_seed(0)
            cases = importlib.import_module(f"benchmarks.bench_{op}").cases(size, torch.device(arguments.device))
            runs = [run_case(c, arguments.device, repetitions, tick) for c in cases if arguments.case in c.name]
            result = {
                "op": op,
                **environment(arguments.device),
                "threads": threads if arguments.device == "cpu" else None,
                "copy_bytes_per_second": copy,
                "runs": runs,
            }
            tick("")
            print(table(result), flush=True)
            if directory:
                directory.mkdir(parents=True, exist_ok=True)
                suffix = f".threads{threads}" if arguments.device == "cpu" else ""
                (directory / f"{op}{suffix}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
