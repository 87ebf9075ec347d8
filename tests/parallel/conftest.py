"""The two processes that these tests share."""

from collections.abc import Iterator

import pytest

from tests.parallel.pair import Pair


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two processes, started at the first call."""
    pair = Pair()
    yield pair
    pair.stop()
