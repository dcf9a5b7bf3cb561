"""python -m benchmarks [--device cpu|cuda] [--op OP ...] [--threads N ...] [--json DIRECTORY] [--quick]"""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment, measure_copy, run_case
from benchmarks.report import goal_table, table
from entropy_rl_ext import build_info

HERE = Path(__file__).parent
OPS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures every op against its peers.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument(
        "--case", default="", help="run only cases whose name contains this; the other cases stay in the file"
    )
    parser.add_argument("--threads", nargs="+", type=int, help="CPU threads, one run for each; default: torch's own")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--json", type=Path, help="folder of the results; default: benchmarks/results/<device>")
    parser.add_argument(
        "--quick", action="store_true", help="small inputs, two repetitions; writes no file without --json"
    )
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
        copy = measure_copy(arguments.device, size=(16 if arguments.quick else 512) << 20)
        for op in arguments.op:
            torch.manual_seed(0)
            cases = list(importlib.import_module(f"benchmarks.bench_{op}").cases(size, torch.device(arguments.device)))
            runs = [run_case(c, arguments.device, repetitions, tick) for c in cases if arguments.case in c.name]
            result: dict[str, Any] = {
                "op": op,
                **environment(arguments.device),
                "threads": threads if arguments.device == "cpu" else None,
                "simd": build_info()["simd"] if arguments.device == "cpu" else None,
                "copy_bytes_per_second": copy,
                "runs": runs,
            }
            tick("")
            print(table(result), goal_table([result]), sep="\n", flush=True)
            if directory:
                directory.mkdir(parents=True, exist_ok=True)
                suffix = f".threads{threads}" if arguments.device == "cpu" else ""
                # An instruction set that ENTROPY_RL_SIMD selects is part of the file's name.
                chosen = os.environ.get("ENTROPY_RL_SIMD")
                suffix += f".{chosen}" if chosen and arguments.device == "cpu" else ""
                path = directory / f"{op}{suffix}.json"
                result["runs"] = with_kept_runs(result, path, [c.name for c in cases])
                path.write_text(json.dumps(result, indent=1) + "\n")


def with_kept_runs(result: dict[str, Any], path: Path, order: list[str]) -> list[dict[str, Any]]:
    """The runs of a result, and those of other cases in the file that it replaces, if the rest of the file agrees."""
    runs = {run["case"]: run for run in result["runs"]}
    if path.exists():
        old = json.loads(path.read_text())
        varying = {"copy_bytes_per_second", "runs", "date"}
        if all(old.get(key) == value for key, value in result.items() if key not in varying):
            runs = {run["case"]: run for run in old["runs"]} | runs
    return [runs[case] for case in order if case in runs]


if __name__ == "__main__":
    main()
