"""The command `entropy-rl inspect`."""

import argparse
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entropy_rl.errors import UserError
from entropy_rl.pretrained import check_model, load_model, load_tokenizer
from entropy_rl.report.completions import (
    Completion,
    has_completions,
    read_completions,
    read_prompts,
    sample_completions,
)
from entropy_rl.report.figures import write_figures
from entropy_rl.report.measure import measure
from entropy_rl.report.page import MeasuredModel, write_page, write_rollout_page
from entropy_rl.report.rollouts import read_rollouts
from entropy_rl_ext import global_top_mask

GENERIC = {"model", "models", "checkpoint", "hf", "huggingface", "final", "latest", "output", "rollouts"}


def run(arguments: argparse.Namespace) -> int:
    """Writes the page and prints a summary. Raises UserError for an error that the user can fix."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    output: Path = arguments.output
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no directory {output.parent}")
    if output.is_dir():
        raise UserError(f"--output {output}: this is a directory; a file was expected")
    _check_writable(output)
    figures: Path | None = arguments.figures
    if figures is not None:
        if arguments.rollouts is not None:
            raise UserError("--figures and --rollouts: give one of them")
        _make_directory(figures)
    if arguments.rollouts is not None:
        return _run_rollouts(arguments)
    for option in ("model", "input"):
        if getattr(arguments, option) is None:
            raise UserError(f"--{option} is missing; give --model and --input, or --rollouts")
    device = _device(arguments.device)
    given = arguments.samples is None and has_completions(arguments.input, arguments.completion_key, arguments.limit)
    source = "--model" if arguments.tokenizer is None else "--tokenizer"
    path, trust = arguments.tokenizer or arguments.model, {"trust_remote_code": arguments.trust_remote_code}
    tokenizer = load_tokenizer(f"{source} {path}", path, **trust)
    if arguments.compare is not None:
        _check_comparable(tokenizer, arguments.compare, **trust)

    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    completions = _given(tokenizer, arguments) if given else None
    models = []
    for option in ("model", "compare"):
        path = getattr(arguments, option)
        if path is None:
            continue
        model = load_model(f"--{option} {path}", path, dtype=dtype, **trust).to(device).eval()
        if completions is None:
            completions = _sampled(model, tokenizer, arguments)
        name = _name(path)
        models.append(MeasuredModel(name, measure(model, completions, temperature=arguments.temperature, name=name)))
        del model  # before the next one is loaded
    assert completions is not None
    if len(models) == 2 and models[0].name == models[1].name:
        paths = (arguments.model, arguments.compare)
        models = [MeasuredModel(path, model.measurement) for path, model in zip(paths, models, strict=True)]

    what = (models, completions, tokenizer)
    measured_at = {
        "ratio": arguments.ratio,
        "temperature": arguments.temperature,
        "sampling_temperature": None if given else _sampling_temperature(arguments),
    }
    write_page(output, *what, **measured_at, title=arguments.title)
    if figures is not None:
        write_figures(figures, *what, **measured_at)
    print(_summary(models, completions, arguments.ratio))
    print(f"report: {output.resolve()}")
    if figures is not None:
        print(f"figures: {figures.resolve()}")
    return 0


def _run_rollouts(arguments: argparse.Namespace) -> int:
    for option in ("model", "input", "compare"):
        if getattr(arguments, option) is not None:
            raise UserError(f"--{option} and --rollouts: give one of them")
    rollouts = read_rollouts(arguments.rollouts)
    title = arguments.title or _name(str(arguments.rollouts))
    write_rollout_page(arguments.output, rollouts, title=title, ratio=arguments.ratio)
    tokens, steps = sum(len(rollout.tokens) for rollout in rollouts), len({rollout.step for rollout in rollouts})
    print(f"{tokens:,} tokens of {len(rollouts):,} responses in {steps:,} steps")
    print(f"report: {arguments.output.resolve()}")
    return 0


def _check_writable(output: Path) -> None:
    """Raises UserError if the page cannot be written. Leaves an existing file unmodified and creates none."""
    exists = output.exists()
    try:
        output.open("ab").close()
    except OSError as error:
        raise UserError(f"--output {output}: it cannot be written: {error.strerror}") from None
    if not exists:
        output.unlink()


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--figures {path}: it cannot be created: {error.strerror}") from None


def _name(path: str) -> str:
    """The last part of the path, with the part before it where the last one says nothing.

    For a checkpoint of the trainer, global_step_N/actor/huggingface, it is global_step_N.
    """
    parts = Path(path).resolve().parts if Path(path).exists() else Path(path).parts
    if parts[-2:] == ("actor", "huggingface"):
        return parts[-3]
    return "/".join(parts[-2:] if parts[-1].lower() in GENERIC and len(parts) > 2 else parts[-1:])


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU; it must be auto or cpu here")
    return torch.device(name)


def _check_comparable(tokenizer: PreTrainedTokenizerBase, path: str, *, trust_remote_code: bool) -> None:
    """Raises UserError if the second model does not exist or has other tokens than the first one.

    A second model without a tokenizer is assumed to share the first one's.
    """
    where = f"--compare {path}"
    check_model(where, path, trust_remote_code=trust_remote_code)
    try:
        other = load_tokenizer(where, path, trust_remote_code=trust_remote_code)
    except UserError:
        return
    if other.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{where}: its tokenizer has other tokens than the first model's")


def _given(tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace) -> list[Completion]:
    return read_completions(arguments.input, tokenizer, arguments.prompt_key, arguments.completion_key, arguments.limit)


def _sampled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> list[Completion]:
    return sample_completions(
        model,
        tokenizer,
        read_prompts(arguments.input, tokenizer, arguments.prompt_key, arguments.limit),
        samples=arguments.samples or 1,
        max_new_tokens=arguments.max_new_tokens,
        temperature=_sampling_temperature(arguments),
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )


def _sampling_temperature(arguments: argparse.Namespace) -> float:
    return arguments.temperature if arguments.sampling_temperature is None else arguments.sampling_temperature


def _summary(models: list[MeasuredModel], completions: list[Completion], ratio: float) -> str:
    selections = []
    lines = [f"{sum(len(c.tokens) for c in completions):,} tokens of {len(completions):,} completions"]
    for model in models:
        entropy = model.measurement.entropy
        selected = global_top_mask(entropy[None], torch.ones(1, len(entropy), dtype=torch.bool), ratio)[0]
        selections.append(selected)
        lines.append(
            f"{model.name}: mean entropy {entropy.mean():.3f} nats; the {ratio:.0%} of highest entropy "
            f"({int(selected.sum()):,} tokens) begin at {entropy[selected].min():.3f} nats"
        )
    if len(selections) == 2:
        both = int((selections[0] & selections[1]).sum())
        lines.append(f"overlap of the selected positions: {both / int(selections[0].sum()):.1%}")
    return "\n".join(lines)
