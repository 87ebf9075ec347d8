"""Processes that are shared by the tests."""

from collections.abc import Iterator

import pytest

from tests.parallel.pair import Pair


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two processes, started at the first call."""
    pair = Pair()
    yield pair
    pair.stop()


@pytest.fixture(scope="session")
def single() -> Iterator[Pair]:
    """One process in its own group, started at the first call."""
    single = Pair(1)
    yield single
    single.stop()
