"""What a long step is doing, shown in front of the progress bar of its run: `gen, token 37/512: 4/100`."""

import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

# Seconds between two changes. A terminal shows one line, a file gets a new one with every change.
TERMINAL_SECONDS, FILE_SECONDS = 1.0, 30.0

_bar: tqdm | None = None  # of the run, while it has one
_doing: list[str] = []  # outermost first
_next_change = 0.0


def attach(bar: tqdm | None) -> None:
    """Shows progress on a bar from now on; None: nowhere."""
    global _bar
    _bar = bar
    clear()


def clear() -> None:
    """Removes what the bar shows, at the end of a step."""
    global _next_change
    _next_change = time.monotonic() + _interval()
    if _bar is not None:
        _bar.set_description_str("", refresh=False)


@contextmanager
def doing(what: str) -> Iterator[None]:
    _doing.append(what)
    try:
        _show()
        yield
    finally:
        _doing.pop()


def track(values: Collection[T], what: str) -> Iterator[T]:
    """Yields the values, and shows which one is in work: `what 3/8`."""
    for number, value in enumerate(values, start=1):
        with doing(f"{what} {number}/{len(values)}"):
            yield value


def _interval() -> float:
    return TERMINAL_SECONDS if sys.stderr.isatty() else FILE_SECONDS


def _show() -> None:
    global _next_change
    if _bar is not None and time.monotonic() >= _next_change:
        _bar.set_description_str(", ".join(_doing))
        _next_change = time.monotonic() + _interval()
