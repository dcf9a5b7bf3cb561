from collections.abc import Iterator

import pytest

from ranks import Ranks
from selections import make_groups


@pytest.fixture(scope="session")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Eight processes of one gloo group, with the groups of the first 1 to 8 of them."""
    ranks = Ranks(8, tmp_path_factory.mktemp("ranks"))
    ranks.run(make_groups)
    yield ranks
    ranks.close()


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "eight" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ranks)
