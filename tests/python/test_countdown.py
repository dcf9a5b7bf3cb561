"""The demo's task."""

import itertools
import random

import pytest

from entropy_rl import countdown

TRUTH = {"numbers": (4, 9, 3), "target": 39}


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("4 * 9 = 36 , 36 + 3 = 39", 1.0),
        ("9 * 4 = 36 , 3 + 36 = 39", 1.0),
        ("4 * 9 = 36 , 36 - 3 = 33", 0.0),  # not the target
        ("4 * 9 = 38 , 38 + 1 = 39", 0.0),  # wrong, and a number that is not there
        ("4 * 9 = 36 , 36 + 3 = 40", 0.0),  # wrong
        ("4 * 9 = 36", 0.0),  # a number is left
        ("9 * 4 = 36 , 36 + 3 = 39 , 39 * 4 = 39", 0.0),  # a number twice
        ("39 = 39", 0.0),
        ("4 * 9 = 36 , 36 / 3 = 12", 0.0),
        ("4 * 9 = 36 ,", 0.0),
        ("= 4 9 * , + = : ->", 0.0),
        ("", 0.0),
    ],
)
def test_reward(answer: str, reward: float) -> None:
    assert countdown.compute_score("countdown", answer, TRUTH) == reward


def test_solutions_solve() -> None:
    source = countdown.problems(random.Random(0))
    for problem, steps in itertools.islice(source, 200):
        answer = countdown.write(steps)
        assert countdown.compute_score("countdown", answer, problem._asdict()) == 1.0
        assert len(answer.split()) == countdown.response_tokens(3) - 1  # and the end
        assert all(1 <= step.result <= countdown.LARGEST for step in steps)


def test_held_out_numbers_are_never_trained_on() -> None:
    """Whatever the order of the numbers; about one problem in ten is held out."""
    seen, held_out = (
        {
            tuple(sorted(problem.numbers))
            for problem, _ in itertools.islice(countdown.problems(random.Random(0), held_out=flag), 2000)
        }
        for flag in (False, True)
    )
    assert not seen & held_out
    triples = list(itertools.combinations_with_replacement(range(1, countdown.LARGEST_GIVEN + 1), 3))
    assert 0.08 < sum(map(countdown.is_held_out, triples)) / len(triples) < 0.12


def test_forks_are_the_choices() -> None:
    words = ["4", "*", "9", "=", "36", ",", "36", "+", "3", "=", "39", "<eos>", "<pad>"]
    marked = [word for word, fork in zip(words, countdown.forks(words), strict=True) if fork]
    assert marked == ["4", "*", "9", "36", "+", "3"]
