"""`pytest -p emulated --device cuda`: the tests on the emulated devices. A report of the emulator fails the test.

EMULATED_LIMIT is how many seconds a test may take (0: any), EMULATED_SEED the random order of threads (0: in order),
EMULATED_ERROR the relative error of approximate instructions.
"""

import os
import signal
from collections.abc import Iterator

import device
import pytest

LIMIT = int(os.environ.get("EMULATED_LIMIT", "0"))
device.configure(int(os.environ.get("EMULATED_SEED", "0")), float(os.environ.get("EMULATED_ERROR", "0")))


def _too_long(*_: object) -> None:
    raise TimeoutError(f"took more than {LIMIT} s")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        if hasattr(module, "RUNS"):
            module.RUNS = 1  # threads run in the same order each time


@pytest.fixture(autouse=True)
def nothing_reported() -> Iterator[None]:
    device.reports()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    found = device.reports()
    assert not found, "the emulator reports:\n" + "\n".join(found)
