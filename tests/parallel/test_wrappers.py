"""u, jvp and gradients through data-parallel wrappers, half of the rows in each of two processes, against one."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from decm_lightning.derivatives import ENGINES, Tangent
from decm_lightning.networks import DiT
from decm_lightning.networks.layers import Block
from tests.parallel.pair import SIZE, refusal

pytestmark = pytest.mark.slow
ROWS, DUAL_ROWS = 8, 6


class Step(NamedTuple):
    """The result of an engine, and the gradients after a backward pass."""

    u: Tensor
    jvp: Tensor
    gradients: dict[str, Tensor]


def student(engine: str) -> DiT:
    """A small flow map in float64 that depends on every argument and weight."""
    torch.manual_seed(0)
    sizes = {"patch_size": 2, "width": 16, "depth": 3, "heads": 2, "num_classes": 3}
    # The tolerance is absolute: central differences of the larger output of a pixel skip are not that precise.
    network = DiT(4, 2, **sizes, end_time=True, pixel_skip=engine == "dual")
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3 if parameter.ndim < 4 else 0.05)
    return network.double()


def run_engine(engine: str, network: nn.Module, rank: int = 0, size: int = 1) -> tuple[Tensor, Tensor]:
    """Return u and jvp of every size-th row, three quarters of which have a tangent, after a backward pass."""
    generator = torch.Generator().manual_seed(1)
    x, dx = torch.randn(2, ROWS, 2, 4, 4, generator=generator, dtype=torch.float64)
    t, s, dt, ds = torch.rand(4, ROWS, generator=generator, dtype=torch.float64)
    rows, moved = slice(rank, ROWS, size), slice(rank, DUAL_ROWS, size)
    labels = (torch.arange(ROWS) % 3)[rows]
    result = ENGINES[engine](network, x[rows], t[rows], s[rows], labels, Tangent(dx[moved], dt[moved], ds[moved]))
    (result.u.square().mean() + (result.u[: len(result.jvp)] * result.jvp).mean()).backward()
    return result.u.detach(), result.jvp


@cache
def alone(engine: str, rank: int = 0, size: int = 1) -> Step:
    """One process without a wrapper, for all rows or for the rows of one process."""
    network = student(engine)
    return Step(*run_engine(engine, network, rank, size), gradients(network))


def in_pair(engine: str, wrapper: str, checkpointed: bool = False, backend: str | None = None) -> Step:
    """One of two processes, with its part of the rows."""
    torch.compiler.reset()
    network = student(engine)
    network.gradient_checkpointing = checkpointed
    if backend:
        # compile_units with another backend than its default, inductor.
        for unit in network.units():
            unit.forward = torch.compile(unit.forward, fullgraph=True, backend=backend)
    wrapped = WRAPPERS[wrapper](network)
    return Step(*run_engine(engine, wrapped, dist.get_rank(), SIZE), gradients(wrapped))


def by_fsdp1(network: DiT) -> nn.Module:
    return FullyShardedDataParallel(
        network, auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=True, device_id=torch.device("cpu")
    )


def by_fsdp2(network: DiT, **options) -> nn.Module:
    for module in (*network.units(), network):
        fully_shard(module, mesh=init_device_mesh("cpu", (SIZE,)), **options)
    return network


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "ddp, buffers left alone": lambda network: DistributedDataParallel(network, broadcast_buffers=False),
    "ddp, called by its module": lambda network: DistributedDataParallel(network).module,
    "fsdp1": by_fsdp1,
    "fsdp2": by_fsdp2,
}


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """Return full gradients by the names of the unwrapped network."""
    if isinstance(network, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(network, with_grads=True):
            return _named(network)
    return _named(network)


def _named(network: nn.Module) -> dict[str, Tensor]:
    whole = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g.clone() for name, g in whole.items()}
    return {name.removeprefix("module.").replace("_fsdp_wrapped_module.", ""): g for name, g in whole.items()}


def assert_equal(actual, expected):
    """Compare in float64."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def assert_right(shares: list[Step], engine: str) -> None:
    """Check that each process has the values of its rows, and the gradient of all rows instead of its own."""
    whole = alone(engine)
    for rank, share in enumerate(shares):
        assert_equal(share.u, whole.u[rank::SIZE])
        assert_equal(share.jvp, whole.jvp[rank::SIZE])
        assert_equal(share.gradients, whole.gradients)
        assert differs(share.gradients, alone(engine, rank, SIZE).gradients)


def differs(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Return whether every gradient differs by more than 1 %."""
    return all((some[name] - others[name]).norm() > 0.01 * others[name].norm() for name in others)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("engine", ["dual", "central"])
def test_engines_of_plain_passes_go_through_every_wrapper(engine, wrapper, checkpointed, pair):
    """In float64: u, jvp and averaged gradients are those of one process with all rows."""
    assert_right(pair.run(in_pair, engine, wrapper, checkpointed), engine)


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("checkpointed", "backend"),
    [(False, "aot_eager"), (True, "aot_eager"), (True, "inductor")],
    ids=["plain", "checkpointed", "inductor"],
)
def test_the_dual_engine_passes_through_compiled_blocks_that_are_sharded(checkpointed, backend, pair):
    """FSDP2 around torch.compile: the same values as without both."""
    assert_right(pair.run(in_pair, "dual", "fsdp2", checkpointed, backend), "dual")


def test_a_network_called_by_its_module_learns_alone(pair):
    """An engine that bypassed the wrapper would have only the gradients of its own rows, which the tests detect."""
    shares = pair.run(in_pair, "dual", "ddp, called by its module")
    for rank, share in enumerate(shares):
        assert_equal(share.gradients, alone("dual", rank, SIZE).gradients)
    assert differs(shares[0].gradients, shares[1].gradients)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("wrapper", ["ddp, buffers left alone", "fsdp2"])
def test_the_functional_engine_passes_through_ddp_and_fsdp2(wrapper, checkpointed, pair):
    """Its second pass, in forward mode and without a graph, does not affect the synchronization of the first."""
    assert_right(pair.run(in_pair, "functional", wrapper, checkpointed), "functional")


@pytest.mark.parametrize(("wrapper", "remedy"), [("ddp", "broadcast_buffers=False"), ("fsdp1", "fully_shard")])
def test_the_functional_engine_says_what_it_cannot_pass_through(wrapper, remedy, pair):
    """DDP copies buffers in place, which torch.func refuses; FSDP1 under torch.func ends with a segmentation fault."""
    for text in pair.run(refusal, in_pair, "functional", wrapper):
        assert remedy in text
        assert "derivative dual" in text
