"""The task of the demo of a language model."""

import itertools
import random

import pytest

from entropy_rl import word_problems
from entropy_rl.word_problems import WordProblem


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("Eva has 6 x 7 = 42 eggs.", 1.0),
        ("42", 1.0),
        ("6 * 7 = 40. No, it is 42!", 1.0),  # the last number counts
        ("42, in 6 boxes", 0.0),
        ("420", 0.0),
        ("forty-two", 0.0),
        ("", 0.0),
    ],
)
def test_reward(response: str, reward: float) -> None:
    assert word_problems.compute_score("word_problems", response, "42", {}) == reward


def test_a_problem_has_its_answer() -> None:
    problem = WordProblem("Eva", 6, 7, "eggs")
    assert problem.messages()[-1]["content"] == "Eva has 6 boxes with 7 eggs each. How many eggs are there?"
    assert problem.answer() == "42"


def test_held_out_problems_have_other_numbers() -> None:
    def numbers(*, held_out: bool) -> set[tuple[int, int]]:
        drawn = itertools.islice(word_problems.problems(random.Random(0), held_out=held_out), 2000)
        return {(problem.boxes, problem.each) for problem in drawn}

    train, val = numbers(held_out=False), numbers(held_out=True)
    sizes = range(word_problems.SMALLEST, word_problems.LARGEST + 1)
    assert not train & val and train | val == set(itertools.product(sizes, sizes))
