"""FSDP2's own mixed precision and the derivative: relative errors of u and jvp against float64 in one process."""

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from decm_lightning.derivatives import JVPResult
from decm_lightning.networks import DiT
from tests.derivatives.test_dual_precision import Thousand, errors, exact, result, student
from tests.parallel.test_wrappers import by_fsdp2

pytestmark = pytest.mark.slow


def in_pair(kind: type[DiT], cast_forward_inputs: bool) -> JVPResult:
    """One of two processes with sharded weights and the same rows."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=cast_forward_inputs)
    sharded = result(by_fsdp2(student(kind), mp_policy=policy))
    return JVPResult(sharded.u.detach(), sharded.jvp)


@pytest.mark.parametrize("kind", [DiT, Thousand], ids=["t", "1000t"])
def test_weights_gathered_in_bfloat16(kind, pair):
    """With inputs in float32 the errors of u and jvp are those of bf16-true."""
    for share in pair.run(in_pair, kind, False):
        u, jvp = errors(share, exact(student(kind)))
        assert u < 0.015
        assert jvp < 0.02


@pytest.mark.parametrize(("kind", "least", "most"), [(DiT, 0.0, 0.02), (Thousand, 0.5, 2.0)], ids=["t", "1000t"])
def test_inputs_cast_by_fsdp2(kind, least, most, pair):
    """FSDP2's default rounds t: with an embedding of 1000 t the derivative is wrong, although u looks right."""
    for share in pair.run(in_pair, kind, True):
        u, jvp = errors(share, exact(student(kind)))
        assert u < 0.05
        assert least <= jvp < most
