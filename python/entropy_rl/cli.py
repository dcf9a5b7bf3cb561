"""The command `entropy-rl`."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from entropy_rl import extras
from entropy_rl.errors import UserError, one_line

DESCRIPTION = """\
Tools for reinforcement learning of language models on their highest-entropy tokens.
The trainer is a separate command: python -m entropy_rl.train --help
"""

INSPECT = """\
Runs a causal language model over completions and writes an HTML page that shows which tokens are
forks. Each token is shaded by the entropy of the distribution from which it was drawn, and the tokens
of highest entropy are marked. A slider changes their share.

  entropy-rl inspect --model Qwen/Qwen3-0.6B --input completions.jsonl --output report.html

Each row of the input has a `prompt` and a `completion`. Both are texts or lists of {role, content}.
If the rows have no completion, or with --samples, completions are sampled from the model. A list of
messages goes through the tokenizer's chat template; a text does not.

  entropy-rl inspect --rollouts DIR --output report.html

makes the page from the responses of a training run, without a model.
"""

DOCTOR = """\
Shows what is installed and active: torch, CUDA, the kernels and their SIMD instruction set, verl and
TRL. Tests each op against its plain-torch reference. Prints a fix for everything that is wrong and
then exits with status 1.
"""

ABLATE = """\
Runs the paper's ablation: the same training on all tokens, on the 50, 20 and 10 % of highest entropy,
on the 80 % of lowest entropy, and on a random 20 %, each with several seeds. Writes a table with
confidence intervals and a plot of the curves.

  entropy-rl ablate --output ablation
  entropy-rl ablate --output ablation --arm soft='actor_rollout_ref.actor.token_weight=mine.py:weight ...'
  entropy-rl ablate --output ablation actor_rollout_ref.model.path=MODEL data.train_files=... data.val_files=...

KEY=VALUE are settings of python -m entropy_rl.train. Without a model, the runs solve the demo's task:
each seed warms up a separate small model, from which all of its runs begin.

Run the same command again to resume: finished runs are kept, and the others resume from their last
checkpoint.
"""

# Each command has a module, which is imported when it runs: `doctor` must work without the packages of the others.
COMMANDS = {"inspect": "entropy_rl.report.inspect", "ablate": "entropy_rl.ablate", "doctor": "entropy_rl.doctor"}

# The arms of `ablate`: which response tokens carry the policy gradient. The first ones run by default.
DEFAULT_ARMS = ("all", "top_50", "top_20", "top_10", "bottom_80", "random_20")
ARMS = (*DEFAULT_ARMS, "random_50", "sequence_20", "archer", "stapo")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 2 after an error that the user can fix, printed in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 0
    try:
        parsed = parser.parse_args(arguments)
        return import_module(COMMANDS[parsed.command]).run(parsed)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(extras.missing_package(f"entropy-rl {parsed.command}", error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="entropy-rl", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    _add_inspect(add("inspect", "show which tokens of a model's completions are forks", INSPECT))
    _add_ablate(add("ablate", "compare training on all tokens, on the forks, and on all other tokens", ABLATE))
    add("doctor", "show what is installed and active, and how to fix what is wrong", DOCTOR)
    return parser


def _add_inspect(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument("--model", metavar="PATH", help="a directory, or a name on the hub")
    inspect.add_argument("--input", type=Path, metavar="FILE", help="a .jsonl or .parquet file")
    inspect.add_argument(
        "--rollouts",
        type=Path,
        metavar="DIR",
        help="the trainer's responses, DIR/1.jsonl and so on, in place of --model and --input",
    )
    inspect.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="the page to write; an existing file is replaced"
    )
    inspect.add_argument("--compare", metavar="PATH", help="a second model to measure on the same completions")
    inspect.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help="also write the distribution of the entropies: DIR/entropy.json and DIR/entropy.png",
    )
    inspect.add_argument(
        "--ratio", type=_share, default=0.2, help="share of the tokens that the page selects first (0.2)"
    )
    inspect.add_argument("--limit", type=_count, metavar="ROWS", help="use only the first rows of the input")
    inspect.add_argument("--prompt-key", default="prompt", metavar="KEY", help="name of the prompt column (prompt)")
    inspect.add_argument(
        "--completion-key", default="completion", metavar="KEY", help="name of the completion column (completion)"
    )
    inspect.add_argument("--tokenizer", metavar="PATH", help="a tokenizer other than the model's")
    inspect.add_argument(
        "--temperature",
        type=_temperature,
        default=1.0,
        help="temperature of the distributions that the page shows (1.0)",
    )
    inspect.add_argument("--title", help="title of the page (the name of the model)")
    inspect.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one, otherwise the CPU",
    )
    inspect.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: the model's own dtype",
    )
    inspect.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    sampling = inspect.add_argument_group("sampling")
    sampling.add_argument(
        "--sampling-temperature",
        type=_temperature,
        metavar="T",
        help="temperature of sampling (that of --temperature)",
    )
    sampling.add_argument(
        "--samples",
        type=_count,
        metavar="N",
        help="sample N completions for each prompt, and ignore those of the input",
    )
    sampling.add_argument(
        "--max-new-tokens", type=_count, default=512, metavar="N", help="longest completion, in tokens (512)"
    )
    sampling.add_argument(
        "--top-p",
        type=_share,
        default=1.0,
        help="sample from the most probable tokens that together reach this probability (1.0)",
    )
    sampling.add_argument(
        "--top-k", type=_natural, default=0, help="sample from this many of the most probable tokens; 0: from all (0)"
    )
    sampling.add_argument("--seed", type=_natural, default=0, help="seed of sampling (0)")
    sampling.add_argument(
        "--batch-size", type=_count, default=32, metavar="N", help="number of completions to sample at a time (32)"
    )


def _add_ablate(ablate: argparse.ArgumentParser) -> None:
    ablate.add_argument("--output", required=True, type=Path, metavar="DIRECTORY", help="directory for all results")
    ablate.add_argument(
        "--arms",
        type=_arms,
        default=DEFAULT_ARMS,
        metavar="ARM,ARM",
        help=f"any of {','.join(ARMS)} ({','.join(DEFAULT_ARMS)})",
    )
    ablate.add_argument(
        "--arm",
        type=_arm,
        action="append",
        default=[],
        dest="own_arms",
        metavar="NAME='KEY=VALUE ...'",
        help="one more arm, with settings of the trainer; may be repeated",
    )
    ablate.add_argument("--seeds", type=_count, default=3, metavar="N", help="run the seeds 0 to N - 1 (3)")
    ablate.add_argument("--steps", type=_count, metavar="N", help="training steps (120 for the demo's task)")
    ablate.add_argument("--warmup-steps", type=_count, metavar="N", help="warm-up steps of the demo's model (900)")
    ablate.add_argument("--jobs", type=_count, default=1, metavar="N", help="number of runs at a time (1)")
    ablate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the trainer")


def _version() -> str:
    return extras.installed_version(extras.DISTRIBUTION) or "(not installed)"  # found on the search path


def _number(text: str, allowed: str, low: float, high: float, kind: type = float) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text}: it must be {allowed}")
    return value


def _arms(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ARMS:
            raise argparse.ArgumentTypeError(f"{name}: the arms are {', '.join(ARMS)}")
    return names


def _arm(text: str) -> tuple[str, list[str]]:
    name, _, overrides = text.partition("=")
    if not re.fullmatch(r"\w+", name) or name in ARMS or "=" not in overrides:
        raise argparse.ArgumentTypeError(
            f"{text}: it must be NAME='KEY=VALUE ...', with a name of letters, digits and _ that is not one of "
            f"{', '.join(ARMS)}"
        )
    try:
        return name, shlex.split(overrides)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


TINY = sys.float_info.min


def _share(text: str) -> float:
    return _number(text, "a number above 0 and at most 1", TINY, 1)


def _temperature(text: str) -> float:
    return _number(text, "a number of at least 1e-06 and at most 1e+06", 1e-6, 1e6)


def _count(text: str) -> float:
    return _number(text, "an integer of at least 1", 1, 2**63, int)


def _natural(text: str) -> float:
    return _number(text, "an integer of at least 0", 0, 2**63, int)


if __name__ == "__main__":
    sys.exit(main())
