"""What ranks tokens: random numbers that no split changes, and the user's functions with their errors."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_rl import scores
from entropy_rl.errors import UserError
from entropy_rl_ext import reference

NAMES = ("log_prob", "entropy", "advantages", "response_mask")


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    log_prob, entropy, advantages = torch.randn(3, 4, 9, generator=generator)
    mask = torch.rand(4, 9, generator=generator) < 0.7
    return dict(zip(NAMES, (-log_prob.abs(), entropy.abs(), advantages, mask), strict=True))


# ---- random


def test_a_random_number_follows_from_seed_and_place() -> None:
    """Place 0 is the first response token of the step; the formula is splitmix64's, in the words of the oracle."""
    mask, before = torch.tensor([[0, 1, 1], [1, 0, 1]]), torch.tensor(7)
    found = scores.random_scores(torch.tensor(12), mask, before)
    seed = torch.full((4,), 12 ^ 0x2545F4914F6CDD1D)
    words = reference._splitmix64(reference._splitmix64(seed) + torch.arange(7, 11))
    expected = ((words >> 11) & (2**53 - 1)).double() / 2**53
    assert found.dtype == torch.float64 and torch.equal(found[mask != 0], expected)


def test_random_numbers_are_uniform_and_change_with_the_seed() -> None:
    mask, zero = torch.ones(1, 100_000), torch.tensor(0)
    one, other = (scores.random_scores(torch.tensor(seed), mask, zero)[0] for seed in (3, 4))
    for numbers in (one, other):
        assert numbers.min() >= 0 and numbers.max() < 1 and len(numbers.unique()) == 100_000
        # A uniform variable has mean 1/2 and variance 1/12; six standard errors.
        assert abs(numbers.mean() - 0.5) < 6 * (1 / 12 / 100_000) ** 0.5
    correlation = torch.corrcoef(torch.stack([one, other]))[0, 1]
    assert abs(correlation) < 6 / 100_000**0.5


# ---- The user's function


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Writes a file with `text` and gives FILE.py:score."""

    def file_with(text: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(f"import torch\n{text}\n")
        return f"{path}:score"

    yield file_with
    scores.token_function.cache_clear()


SIGNATURE = "def score(log_prob, entropy, advantages, response_mask):\n    "


def test_a_function_scores_each_token(batch: dict[str, Tensor], write: Callable[[str], str]) -> None:
    """Without gradient, and in float32 whatever the type of its numbers."""
    value = write(SIGNATURE + "return (entropy * advantages - log_prob * response_mask > 0).int()")
    batch["entropy"].requires_grad_()
    found = scores.token_scores(value, *(batch[name] for name in NAMES))
    log_prob, entropy, advantages, mask = batch.values()
    assert torch.equal(found, (entropy * advantages - log_prob * mask > 0).float()) and not found.requires_grad


def test_numbers_outside_the_response_do_not_matter(batch: dict[str, Tensor], write: Callable[[str], str]) -> None:
    value = write(SIGNATURE + "return torch.where(response_mask, entropy, torch.nan)")
    found = scores.token_scores(value, *(batch[name] for name in NAMES))
    assert torch.equal(found[batch["response_mask"]], batch["entropy"][batch["response_mask"]])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return entropy.sum(-1)", "it returned a float32 tensor of shape [4] on cpu; a tensor of numbers of shape"),
        ("return [[0.0]]", "it returned a list; a tensor of shape [4, 9] was expected"),
        ("return None", "it returned a NoneType; a tensor of shape [4, 9] was expected"),
        ("return entropy + 0j", "it returned a complex64 tensor of shape [4, 9]"),
        ("return entropy / 0 * 0", "it returned NaN for"),
        ("raise KeyError('x')", "it raised KeyError in "),
        ("return score(1)", "it raised TypeError in "),
    ],
)
def test_what_a_function_must_not_do(
    body: str, message: str, batch: dict[str, Tensor], write: Callable[[str], str]
) -> None:
    value = write(SIGNATURE + body)
    with pytest.raises(UserError) as error:
        scores.token_scores(value, *(batch[name] for name in NAMES))
    assert str(error.value).startswith(f"entropy_top_score={value}: {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize("expression", ["entropy - 10", "entropy / 0", "entropy / 0 * 0"])
def test_weights_are_finite_and_not_below_zero(
    expression: str, batch: dict[str, Tensor], write: Callable[[str], str]
) -> None:
    value, tokens = write(SIGNATURE + f"return {expression}"), int(batch["response_mask"].sum())
    with pytest.raises(UserError) as error:
        scores.token_function("token_weight", value)(*(batch[name] for name in NAMES))
    wrong = f"it returned a weight below 0 or not finite for {tokens} of {tokens} response tokens"
    assert str(error.value) == f"token_weight={value}: {wrong}"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("/nowhere/mine.py:score", "there is no such file; a Python file was expected"),
        ("{file}:other", "has no function of this name"),
        ("{broken}:score", "it cannot be imported: ZeroDivisionError"),
    ],
)
def test_functions_that_cannot_be_loaded(value: str, message: str, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.py" for name in ("file", "broken")}
    files["file"].write_text("score = 1\n")
    files["broken"].write_text("1 / 0\n")
    value = value.format(**files)
    with pytest.raises(UserError) as error:
        scores.token_function("entropy_top_score", value)
    assert str(error.value).startswith(f"entropy_top_score={value}: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.py:f", True),
        ("~/b c/a.py:f_1", True),
        ("a.py", False),
        ("a:f", False),
        ("a.py:", False),
        ("a.py:1f", False),
        ("a.py:f.g", False),
        (3, False),
    ],
)
def test_what_names_a_function(value: Any, expected: bool) -> None:
    assert scores.names_function(value) == expected
