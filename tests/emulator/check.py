"""Every op on the emulated device against entropy_rl_ext.reference, over random cases chosen to hurt.

    tests/emulator/run.sh python tests/emulator/check.py [--op NAME ...] [--cases N] [--seconds S] [--seed SEED]

Prints a line for each case that fails, and how many ran of each op. A case depends on its op, number and --seed alone;
--first N --cases N+1 runs one again. --device cuda:1 puts tensors on a device that is not the current one. --threads
SEED runs the threads in a random order. --error perturbs the approximate instructions; ex2.approx has errors up to
2.4e-7.
"""

import argparse
import math
import random
import sys
import time
import traceback
import warnings

import check_linear
import check_losses
import check_selection
import check_softmax
import device
import torch

OPS = {
    f.__name__: f
    for f in (
        check_softmax.token_entropy,
        check_softmax.logprob_entropy,
        check_selection.global_top_mask,
        check_selection.global_top_mask_steps,
        check_losses.policy_loss,
        check_losses.kl_loss,
        check_losses.aggregate,
        check_linear.linear_logprob_entropy,
    )
}


def run_case(op: str, case: int, seed: int, seen: set[str]) -> tuple[str, list[str]]:
    """(what the case is, what is wrong). `seen` holds the places of earlier reports, which are not repeated."""
    rng = random.Random(f"{seed} {op} {case}")
    torch.manual_seed(rng.randrange(2**31))
    what, problems = "?", []
    try:
        steps = OPS[op](rng)
        what = next(steps)
        next(steps, None)
    except AssertionError as error:
        problems.append(str(error))
    except Exception:
        problems.append(traceback.format_exc(limit=-3).replace("\n", " / "))
    for line in device.reports():
        place = line.split(" block ")[0] + line[line.find("PTX") :]
        if place not in seen:
            seen.add(place)
            problems.append(line)
    return what, problems


def run_op(op: str, arguments: argparse.Namespace) -> bool:
    """Whether every case passed."""
    failed, ran, begin, seen = 0, 0, time.time(), set[str]()
    for case in range(arguments.first, arguments.cases):
        if time.time() - begin > arguments.seconds:
            break
        what, problems = run_case(op, case, arguments.seed, seen)
        ran += 1
        failed += bool(problems)
        if arguments.verbose:
            print(op, case, what, flush=True)
        for problem in problems:
            print(f"FAILED {op} {case}: {what}: {problem}", flush=True)
    print(f"{op}: {ran} cases, {failed} failed, {time.time() - begin:.0f} s", flush=True)
    return failed == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="*", choices=OPS, default=list(OPS))
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which an op begins no more cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--error", type=float, default=0.0)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="entropy_mask is not applied")
    torch.set_num_threads(1)
    device.target = arguments.device
    device.configure(arguments.threads, arguments.error)
    sys.exit(not all([run_op(op, arguments) for op in arguments.op]))


if __name__ == "__main__":
    main()
