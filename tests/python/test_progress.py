"""What the bar of a run says about a step that takes long."""

import io
from collections.abc import Iterator

import pytest
from tqdm import tqdm

from entropy_rl import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def bar(clock: list[float]) -> Iterator[tqdm]:
    with tqdm(total=2, file=io.StringIO()) as shown:
        progress.attach(shown)
        yield shown
        progress.attach(None)


def test_a_long_step_says_what_it_does(bar: tqdm, clock: list[float]) -> None:
    """At most every 30 s, because a test has no terminal."""
    seen = []
    with progress.doing("gen"):
        for _ in progress.track([10, 20, 30], "token"):
            seen.append(bar.desc)
            clock[0] += 20
    assert seen == ["", "", "gen, token 3/3"]
    progress.clear()
    assert bar.desc == ""


def test_values_pass_through(bar: tqdm, clock: list[float]) -> None:
    """Also where a loop ends early or an exception leaves it, and without a bar."""
    for value in progress.track([1, 2, 3], "token"):
        if value == 2:
            break
    with pytest.raises(KeyError), progress.doing("gen"):
        raise KeyError
    clock[0] = 100.0
    with progress.doing("update_actor"):
        assert bar.desc == "update_actor"
    progress.attach(None)
    assert list(progress.track([1, 2], "token")) == [1, 2]
