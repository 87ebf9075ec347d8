"""What all tests share: shapes checked at run time, one thread, seeded generators and the exact Gaussian flow."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import config, install_import_hook

torch.set_num_threads(1)
# The method's modules only: tests of the rest pass it flows and networks of their own. Not the dual engine: its values
# are no tensors, and the compiler cannot follow nested functions that are checked.
CHECKED = [
    "types",
    "path",
    "conditions",
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

# Imported after the hook, which checks only what is imported later.
from decm_lightning.derivatives import Jump  # noqa: E402
from decm_lightning.flows import Gaussian  # noqa: E402
from decm_lightning.networks.network import check_compiler  # noqa: E402
from decm_lightning.path import interpolate  # noqa: E402
from decm_lightning.triangle import Edge, Uniform  # noqa: E402

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
    """Skip what older versions of torch cannot compile."""
    if item.get_closest_marker("compiled"):
        try:
            check_compiler()
        except ValueError as error:
            pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="module")
def _shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check shapes in the method's tests only: elsewhere the dual engine is at work, whose values are no tensors."""
    inside = request.path.relative_to(Path(__file__).parent).parts[0].startswith(METHOD)
    config.update("jaxtyping_disable", not inside)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _unchecked_duals(request: pytest.FixtureRequest, _shapes: None) -> Iterator[None]:
    """Leave them unchecked in the tests of that engine, too."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", before or "dual" in request.node.nodeid)
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
    """A function from an edge to jumps of the exact flow that lie on it, in float64 and without a tangent."""

    def draw(edge: Edge, rows: int = 64) -> Jump:
        times = edge.draw(Uniform().draw(rows, generator).double(), 0, generator)
        x_0 = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
        x_1 = flow.sample(rows, 3, generator, torch.float64)
        return Jump(interpolate(x_0, x_1, times.t), times.t, times.s, None)

    return draw
