"""Shared test setup: run-time shape checks, one thread, seeded generators and the exact Gaussian flow."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import config, install_import_hook

torch.set_num_threads(1)
# Only modules of the method are checked. The dual engine is not: its values are not tensors, and the compiler cannot
# trace checked nested functions.
CHECKED = [
    "types",
    "path",
    "conditions",
    "time_laws",
    "triangle",
    "derivatives.central",
    "derivatives.functional",
    "derivatives.forward",
    "losses",
    "guidance",
    "networks",
    "samplers",
    "flows",
]
install_import_hook([f"decm_lightning.{name}" for name in CHECKED], "beartype.beartype")

# Imported after the hook, which only affects later imports.
from decm_lightning.derivatives import Jump  # noqa: E402
from decm_lightning.flows import Gaussian  # noqa: E402
from decm_lightning.networks.network import check_compiler  # noqa: E402
from decm_lightning.path import interpolate  # noqa: E402
from decm_lightning.time_laws import Uniform  # noqa: E402
from decm_lightning.triangle import Edge  # noqa: E402

METHOD = (
    "derivatives",
    "flows",
    "losses",
    "networks",
    "samplers",
    "test_conditions",
    "test_guidance",
    "test_path",
    "test_triangle",
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `compiled` if this version of torch cannot compile the networks."""
    if item.get_closest_marker("compiled"):
        try:
            check_compiler()
        except ValueError as error:
            pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="module")
def _shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check shapes only in tests of the method: other tests run the dual engine, whose values are not tensors."""
    inside = request.path.relative_to(Path(__file__).parent).parts[0].startswith(METHOD)
    config.update("jaxtyping_disable", not inside)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _unchecked_duals(request: pytest.FixtureRequest, _shapes: None) -> Iterator[None]:
    """Disable the checks in tests of the dual engine, too."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", before or "dual" in request.node.nodeid)
    yield
    config.update("jaxtyping_disable", before)


@pytest.fixture
def unchecked(_unchecked_duals: None) -> Iterator[None]:
    """Disable the checks, for arguments of a wrong type that the code refuses."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def flow() -> Gaussian:
    """An exact flow in three dimensions, in float64."""
    return Gaussian(torch.tensor([0.5, -1.0, 0.3], dtype=torch.float64), 0.4)


@pytest.fixture
def draw_jump(flow: Gaussian, generator: torch.Generator) -> Callable[..., Jump]:
    """A function that samples jumps of the exact flow on an edge, in float64 and without a tangent."""

    def draw(edge: Edge, rows: int = 64) -> Jump:
        times = edge.draw(Uniform().draw(rows, generator).double(), 0, generator)
        x_0 = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
        x_1 = flow.sample(rows, 3, generator, torch.float64)
        return Jump(interpolate(x_0, x_1, times.t), times.t, times.s, None)

    return draw
