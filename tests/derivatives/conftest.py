"""What the tests of the engines share."""

from collections.abc import Iterator

import pytest
from jaxtyping import config


@pytest.fixture(autouse=True)
def _unchecked_duals(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the dual engine's values through the networks, whose run-time checks ask for tensors."""
    config.update("jaxtyping_disable", "dual" in request.node.nodeid)
    yield
    config.update("jaxtyping_disable", False)
