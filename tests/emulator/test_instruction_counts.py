"""tools/instruction_counts.py, and that no loop is longer than docs/cuda_instructions.md says."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import instruction_counts  # noqa: E402

PAGE = ROOT / "docs/cuda_instructions.md"
COUNTS = {("a [2, 3]", "first_kernel"): (20.0, 0.5), ("a [2, 3]", "cub::Second"): (0.75, 0.0)}


def test_the_page_holds_the_counts() -> None:
    assert instruction_counts.parse(instruction_counts.page(COUNTS)) == COUNTS


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((20.0, 0.5), []),
        ((20.6, 0.5), []),
        ((19.0, 0.4), []),
        ((20.7, 0.5), ["a [2, 3], first_kernel: 20.700 instructions per element, were 20.000"]),
        ((20.0, 0.6), ["a [2, 3], first_kernel: 0.600 loads per element, were 0.500"]),
    ],
)
def test_more_than_three_percent_is_a_problem(counts: tuple[float, float], expected: list[str]) -> None:
    assert instruction_counts.problems(COUNTS, {**COUNTS, ("a [2, 3]", "first_kernel"): counts}) == expected


def test_rows_that_appear_or_disappear_are_problems() -> None:
    renamed = {("a [2, 3]", "third_kernel"): (20.0, 0.5), ("a [2, 3]", "cub::Second"): (0.75, 0.0)}
    assert instruction_counts.problems(COUNTS, renamed) == [
        "a [2, 3], first_kernel: in the page and not run",
        "a [2, 3], third_kernel: runs and is not in the page",
    ]


def test_no_loop_is_longer_than_the_page_says() -> None:
    counts = instruction_counts.count()
    loads = counts["token_entropy bf16 [2, 65536]", "softmax_parts_kernel"][1]
    assert loads == pytest.approx(1 / 8, rel=0.02)  # 16 bytes each
    assert not instruction_counts.problems(instruction_counts.parse(PAGE.read_text()), counts)
