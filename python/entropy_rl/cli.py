"""The command `entropy-rl`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from entropy_rl.errors import UserError, one_line

DESCRIPTION = """\
Reinforcement learning of language models on their highest-entropy tokens: what surrounds the trainer
(python -m entropy_rl.train). entropy-rl COMMAND --help tells more of a command.
"""

INSPECT = """\
Runs a causal language model over completions and writes a page that shows which of their tokens are
forks: each token shaded by the entropy of the distribution that it was drawn from, those of highest
entropy marked, with a slider for their share.

  entropy-rl inspect --model Qwen/Qwen3-0.6B --input completions.jsonl --output report.html

The input has a row for each completion, with `prompt` and `completion`, each a text or a list of
{role, content}; without `completion`, or with --samples, completions are sampled. A prompt that is a
text is taken as it is; a list goes through the tokenizer's chat template.
"""

DOCTOR = """\
Tells what is installed and what is active: torch, CUDA, the kernels and their SIMD path, verl and TRL.
Tests each op against its plain-torch reference. Names the mend for each thing found wrong, and then
ends with status 1.
"""

ABLATE = """\
The paper's ablation: the same training on all tokens, on the 50, 20 and 10 % of highest entropy, and
on the 80 % of lowest, each with several seeds. Writes a table with confidence intervals and a
picture of the curves.

  entropy-rl ablate --output ablation
  entropy-rl ablate --output ablation actor_rollout_ref.model.path=MODEL data.train_files=... data.val_files=...

KEY=VALUE are those of python -m entropy_rl.train. Without a model the task is the demo's: each seed
warms up a small model of its own, which all of its runs begin from.

The same command goes on where an earlier one stopped: finished runs are not run again, and the
others go on from their last checkpoint.
"""

# One module a command, imported when it runs: `doctor` must work where what the others need is missing.
COMMANDS = {"inspect": "entropy_rl.report.inspect", "ablate": "entropy_rl.ablate", "doctor": "entropy_rl.doctor"}

# The runs of `ablate`: which response tokens carry the policy gradient.
ARMS = ("all", "top_50", "top_20", "top_10", "bottom_80")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for what the user can mend, told in one line."""
    try:
        parsed = _parser().parse_args(arguments)
        return import_module(COMMANDS[parsed.command]).run(parsed)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("entropy_rl"):
            raise
        print(
            f"error: {parsed.command} needs {error.name}, which is not installed; pip install 'entropy-rl-ext[train]' "
            "brings all that it needs",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="entropy-rl", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    inspect = add("inspect", "a page that shows which tokens of a model's completions are forks", INSPECT)
    inspect.add_argument("--model", required=True, metavar="PATH", help="directory, or name on the hub")
    inspect.add_argument("--input", required=True, type=Path, metavar="FILE", help="a .jsonl or .parquet file")
    inspect.add_argument("--output", required=True, type=Path, metavar="FILE", help="the page; replaced if it is there")
    inspect.add_argument("--compare", metavar="PATH", help="a second model, measured on the same completions")
    inspect.add_argument("--ratio", type=_share, default=0.2, help="share of the tokens to select at first (0.2)")
    inspect.add_argument("--limit", type=_count, metavar="ROWS", help="use only the first rows of the input")
    inspect.add_argument("--prompt-key", default="prompt", metavar="KEY", help="column of the prompts (prompt)")
    inspect.add_argument(
        "--completion-key", default="completion", metavar="KEY", help="column of the completions (completion)"
    )
    inspect.add_argument("--tokenizer", metavar="PATH", help="where the tokenizer is, if not with the model")
    inspect.add_argument(
        "--temperature", type=_positive, default=1.0, help="of sampling, and of the distributions that are shown (1.0)"
    )
    inspect.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one"
    )
    inspect.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto: the model's"
    )
    inspect.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    sampling = inspect.add_argument_group("sampling")
    sampling.add_argument(
        "--samples", type=_count, metavar="N", help="sample N completions of each prompt, whatever the input has"
    )
    sampling.add_argument("--max-new-tokens", type=_count, default=512, metavar="N", help="longest completion (512)")
    sampling.add_argument(
        "--top-p", type=_share, default=1.0, help="sample from the most probable tokens of this share together (1.0)"
    )
    sampling.add_argument(
        "--top-k", type=_natural, default=0, help="sample from so many most probable tokens; 0: from all (0)"
    )
    sampling.add_argument("--seed", type=_natural, default=0, help="the same seed samples the same (0)")
    sampling.add_argument("--batch-size", type=_count, default=32, metavar="N", help="completions at a time (32)")

    ablate = add("ablate", "the same training on all tokens, on forks alone, and on all but the forks", ABLATE)
    ablate.add_argument("--output", required=True, type=Path, metavar="DIRECTORY", help="where everything is written")
    ablate.add_argument("--arms", type=_arms, default=ARMS, metavar="ARM,ARM", help=f"some of {','.join(ARMS)}")
    ablate.add_argument("--seeds", type=_count, default=3, metavar="N", help="seeds 0 to N - 1 (3)")
    ablate.add_argument("--steps", type=_count, metavar="N", help="training steps (120 for the demo's task)")
    ablate.add_argument("--warmup-steps", type=_count, default=1500, metavar="N", help="of the demo's model (1500)")
    ablate.add_argument("--jobs", type=_count, default=1, metavar="N", help="runs at a time (1)")
    ablate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the trainer")

    add("doctor", "what is installed, what is active, and the mend for what is wrong", DOCTOR)
    return parser


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


TINY = sys.float_info.min


def _share(text: str) -> float:
    return _number(text, "a number above 0 and at most 1", TINY, 1)


def _positive(text: str) -> float:
    return _number(text, "a number above 0", TINY, sys.float_info.max)


def _count(text: str) -> float:
    return _number(text, "an integer of at least 1", 1, 2**63, int)


def _natural(text: str) -> float:
    return _number(text, "an integer of at least 0", 0, 2**63, int)


if __name__ == "__main__":
    sys.exit(main())
