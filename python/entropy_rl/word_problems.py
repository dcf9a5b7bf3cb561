"""Word problems with one multiplication, for a pretrained language model:

    Eva has 6 boxes with 7 eggs each. How many eggs are there?
    Eva has 6 x 7 = 42 eggs.

A response is free to find the number in any words; its last number is its answer. `compute_score` is a reward function
with verl's signature.
"""

import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

INSTRUCTION = "Answer in one short sentence."
NAMES = ("Ann", "Ben", "Carla", "Dan", "Eva", "Finn", "Gina", "Hugo")
THINGS = ("apples", "books", "coins", "eggs", "keys", "marbles", "pens", "stamps")
SMALLEST, LARGEST = 2, 12


class WordProblem(NamedTuple):
    name: str
    boxes: int
    each: int
    thing: str

    def messages(self) -> list[dict[str, str]]:
        question = (
            f"{self.name} has {self.boxes} boxes with {self.each} {self.thing} each. How many {self.thing} are there?"
        )
        return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}]

    def answer(self) -> str:
        return str(self.boxes * self.each)


def is_held_out(boxes: int, each: int) -> bool:
    """Whether problems with these numbers are only for validation: where their sum is a multiple of 5."""
    return (boxes + each) % 5 == 0


def problems(generator: random.Random, *, held_out: bool = False) -> Iterator[WordProblem]:
    """An endless stream of random problems."""
    while True:
        boxes, each = generator.randint(SMALLEST, LARGEST), generator.randint(SMALLEST, LARGEST)
        if is_held_out(boxes, each) == held_out:
            yield WordProblem(generator.choice(NAMES), boxes, each, generator.choice(THINGS))


def answer(response: str) -> str | None:
    """The last number of a response, or None if it has none."""
    found = re.findall(r"\d+", response)
    return found[-1] if found else None


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    """1 if the last number of the response is the ground truth, otherwise 0."""
    return float(answer(solution_str) == ground_truth)
