"""The fused kernel is compared with the blockwise path before a run, and not used where it fails.

Its arithmetic runs where Triton is (see test_fused_attention); elsewhere functions in its place say what it would.
"""

import logging

import pytest
import torch

from decm_lightning import Distiller, losses
from decm_lightning.data import Digits
from decm_lightning.derivatives import Tangent, check_fused, dual
from decm_lightning.derivatives.dual import attention as rules
from decm_lightning.derivatives.dual import fused_attention, fused_check
from decm_lightning.derivatives.dual.attention import FusedCall, by_blocks
from decm_lightning.derivatives.dual.fused_attention import INTERPRETED, fused_tangent
from decm_lightning.networks import DiT
from tests.derivatives.test_fused_attention import _bfloat16_in_the_interpreter, needs_the_kernel  # noqa: F401
from tests.test_distiller import tiny_teacher, trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, SIDE = 2, 8


@pytest.fixture(autouse=True)
def _no_refusals(monkeypatch):
    """Start and end each test without refusals or logged reasons."""
    monkeypatch.setattr(fused_attention, "REFUSED", [])
    monkeypatch.setattr(rules, "ANNOUNCED", set())
    monkeypatch.setattr(fused_check, "ANNOUNCED", rules.ANNOUNCED)


def student() -> DiT:
    torch.manual_seed(0)
    network = DiT(SIDE, 1, patch_size=1, width=32, depth=2, heads=HEADS, num_classes=3, end_time=True)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.to(DEVICE)


def blockwise(q, dq, k, dk, v, dv, scale):
    dq, dk, dv = (torch.zeros_like(x) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv)))
    return by_blocks(q, dq, k, dk, v, dv, scale, 256)


def raises(*_):
    raise RuntimeError("PassManager::run failed\nand a page of code")


KERNELS = {
    "right": blockwise,
    "raises": raises,
    "off": lambda *operands: 1.03 * blockwise(*operands),
    "nan": lambda *operands: blockwise(*operands) * torch.nan,
    "zero": lambda *operands: torch.zeros_like(operands[0]),
}


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Simulate a GPU on which the kernel behaves in this way; return the name and the list of calls."""
    calls = []

    def run(*operands):
        calls.append(operands)
        return KERNELS[request.param](*operands)

    supports = fused_attention.supports

    def supported(query, key, value):
        return supports(query, key, value) if fused_attention.REFUSED else None

    for module in (rules, fused_check):
        monkeypatch.setattr(module, "supports", supported)
        monkeypatch.setattr(module, "fused_tangent", run)
    return request.param, calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_that_fails_is_refused_with_one_line(dtype, kernel, caplog):
    """It raises, is wrong, or is not finite. The log has reason, shapes and precision; the blockwise path is used."""
    name, calls = kernel
    network = student()
    with caplog.at_level(logging.INFO), torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        reason = check_fused(network, network.example())
        logged = [record.getMessage() for record in caplog.records]
        assert len(calls) == 1
        assert tuple(calls[0][0].shape) == (2, HEADS, SIDE * SIDE, 16)
        assert calls[0][0].dtype == dtype
        x, t, s, labels = network.example()
        jvp = dual(network, x, t, s, labels, Tangent(x + 1, t, s)).jvp
    if name == "right":
        assert reason is None
        assert logged == []
        assert len(calls) == 1 + 2
        return
    assert len(logged) == 1
    assert "blocks of 256 queries" in logged[0]
    assert str(dtype).removeprefix("torch.") in logged[0]
    assert "[2, 2, 64, 16]" in logged[0]
    assert {"raises": "PassManager::run failed", "off": "0.03", "nan": "nan", "zero": "error of 1 "}[name] in logged[0]
    assert "page of code" not in logged[0]
    # The kernel is not called again, and the reason is not logged again.
    assert len(calls) == 1
    assert len(caplog.records) == 1
    assert jvp.isfinite().all()


def test_kernel_is_checked_when_a_fit_starts_and_the_run_continues(kernel, tmp_path, caplog):
    """A run with a failing kernel equals the run without a kernel."""
    name, calls = kernel

    def fit():
        torch.manual_seed(0)
        distiller = Distiller(tiny_teacher(), objective=losses.end_identity())
        with caplog.at_level(logging.INFO):
            trainer(tmp_path, max_steps=2).fit(distiller, Digits(batch_size=16))
        return torch.cat([p.detach().flatten() for p in distiller.student.parameters()])

    weights = fit()
    logged = [message for record in caplog.records if "attention's tangent" in (message := record.getMessage())]
    assert len(logged) == 1
    assert ("the fused kernel" in logged[0]) == (name != "right")
    assert len(calls) == (3 if name == "right" else 1)
    if name != "right":
        fused_attention.REFUSED[:] = ["no kernel here"]
        assert torch.equal(fit(), weights)


def test_check_disturbs_nothing(kernel):
    """Random state, modes and running statistics are unchanged."""

    class Restless(DiT):
        def forward(self, x_t, t, s, condition):
            self.norm(x_t.primal.flatten(1))
            return super().forward(torch.nn.functional.dropout(x_t, 0.5, self.training), t, s, condition)

    network = Restless(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=3, end_time=True)
    network.norm = torch.nn.BatchNorm1d(64)
    network.blocks[0].eval()
    before, modes = torch.get_rng_state(), [module.training for module in network.modules()]
    check_fused(network, network.example())
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in network.modules()] == modes
    assert network.norm.num_batches_tracked == 0


def test_nothing_happens_where_the_kernel_is_not_supported(monkeypatch):
    """On a CPU the network is not called."""
    monkeypatch.setattr(fused_check, "fused_calls", lambda *_: pytest.fail("the network was run"))
    monkeypatch.setattr(fused_check, "supports", lambda *_: "no GPU")
    network = student()
    assert check_fused(network, network.example()) is None
    assert fused_attention.REFUSED == []


def test_an_error_of_the_network_disables_the_kernel(kernel):
    """Any error in the check selects the blockwise path."""
    network = student()
    x, t, s, _ = network.example()
    assert "could not be checked: ValueError" in check_fused(network, (x, t, s, None))
    assert fused_attention.REFUSED


@needs_the_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tangents", [(True, True, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize("keys", [20, 33])
def test_kernel_itself_passes(dtype, tangents, keys):
    """Its error is at most a third of the tolerance."""
    call = FusedCall((2, 2, 33, 24), (2, 2, keys, 24), (2, 2, keys, 24), tangents, dtype, 0.2)
    assert fused_check.difference(call, DEVICE) is None
    q, dq, k, dk, v, dv = fused_check.random_operands(call, DEVICE)
    exact = blockwise(*(x if x is None else x.double() for x in (q, dq, k, dk, v, dv)), 0.2)
    off = (fused_tangent(q, dq, k, dk, v, dv, 0.2) - exact).norm() / exact.norm()
    assert off < fused_check.TOLERANCE[dtype] / 3


@needs_the_kernel
@pytest.mark.parametrize("autocast", [False, True])
def test_real_kernel_is_used_for_a_real_network(autocast):
    network = student()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast and not INTERPRETED):
        assert check_fused(network, network.example()) is None
    assert fused_attention.REFUSED == []
