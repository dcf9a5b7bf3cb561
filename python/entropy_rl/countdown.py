"""Countdown: combine the given numbers with +, - and *, each number exactly once, to reach the target.

    4 9 3 -> 39 : 4 * 9 = 36 , 36 + 3 = 39

The demo uses this task because its forks are known: the numbers and the operators are choices; the equals signs, the
results and the commas follow from them. `compute_score` is a reward function with verl's signature.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

LARGEST = 99  # the largest number, given or computed; the smallest is 1
LARGEST_GIVEN = 20
OPERATORS = ("+", "-", "*")


class Step(NamedTuple):
    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.operator} {self.right} = {self.result}"


class Countdown(NamedTuple):
    numbers: tuple[int, ...]
    target: int

    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))} -> {self.target} :"


def is_held_out(numbers: Sequence[int]) -> bool:
    """Whether problems with these numbers, in any order, are only for validation. One in ten is."""
    return random.Random(str(sorted(numbers))).randrange(10) == 0


def problems(
    generator: random.Random, *, held_out: bool = False, count: int = 3
) -> Iterator[tuple[Countdown, list[Step]]]:
    """An endless stream of random problems with `count` numbers, each with a solution."""
    while True:
        numbers = tuple(generator.randint(1, LARGEST_GIVEN) for _ in range(count))
        if is_held_out(numbers) == held_out:
            steps = random_steps(numbers, generator)
            if steps is not None:
                yield Countdown(numbers, steps[-1].result), steps


def random_steps(numbers: Sequence[int], generator: random.Random) -> list[Step] | None:
    """A random way to combine all numbers, or None if it gets stuck."""
    pool, steps = list(numbers), []
    while len(pool) > 1:
        options = [
            (i, j, Step(pool[i], operator, pool[j], result))
            for i, j in itertools.permutations(range(len(pool)), 2)
            for operator in OPERATORS
            if operator == "-" or i < j  # for the other operators, the order does not matter
            if (result := compute(pool[i], operator, pool[j])) is not None
        ]
        if not options:
            return None
        i, j, step = generator.choice(options)
        steps.append(step)
        pool = [number for k, number in enumerate(pool) if k not in (i, j)] + [step.result]
    return steps


def compute(left: int, operator: str, right: int) -> int | None:
    """The result, or None if it is outside 1 .. LARGEST or the operator is unknown."""
    match operator:
        case "+":
            result = left + right
        case "-":
            result = left - right
        case "*":
            result = left * right
        case _:
            return None
    return result if 1 <= result <= LARGEST else None


def write(steps: Sequence[Step]) -> str:
    return " , ".join(map(str, steps))


def response_tokens(count: int) -> int:
    """Length of a complete response. A step has 6 tokens: 2 operands, operator, "=", result, and a comma or the end."""
    return 6 * (count - 1)


def forks(words: Sequence[str]) -> list[bool]:
    """Which words of a response are choices: operators, and numbers that do not follow an "="."""
    return [
        word in OPERATORS or (word.isdecimal() and previous != "=")
        for previous, word in zip(("", *words), words, strict=False)
    ]


def compute_score(
    data_source: str, solution_str: str, ground_truth: dict[str, Any], extra_info: dict[str, Any] | None = None
) -> float:
    """1.0 if every step is right, each number is used once and the last result is the target; otherwise 0.0."""
    pool = [str(number) for number in ground_truth["numbers"]]
    for text in solution_str.split(" , "):
        tokens = text.split(" ")
        if len(tokens) != 5 or tokens[3] != "=":
            return 0.0
        left, operator, right, _, result = tokens
        for operand in (left, right):
            if operand not in pool:
                return 0.0
            pool.remove(operand)
        if str(compute(int(left), operator, int(right))) != result:
            return 0.0
        pool.append(result)
    return float(pool == [str(ground_truth["target"])])
