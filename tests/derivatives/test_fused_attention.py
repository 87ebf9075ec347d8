"""The kernel for the tangent of attention against forward mode in float64.

It needs Triton, and an NVIDIA GPU or Triton's interpreter (TRITON_INTERPRET=1).
"""

import itertools
import re

import pytest
import torch

from decm_lightning.derivatives.dual import fused_attention
from decm_lightning.derivatives.dual.fused_attention import INTERPRETED, attention_tangent, fused_tangent, supports

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.2
needs_the_kernel = pytest.mark.skipif(
    supports(*torch.zeros(3, 1, 16, device=DEVICE)[:, None]) is not None,
    reason="needs Triton, and an NVIDIA GPU or TRITON_INTERPRET=1",
)


@pytest.fixture(autouse=True)
def _bfloat16_in_the_interpreter(monkeypatch):
    """Triton's interpreter stores bfloat16 as uint16, multiplies it as integers, and truncates where a GPU rounds."""
    if not INTERPRETED:
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widen(inputs):
        if inputs.dtype.scalar != tl.bfloat16:
            return inputs
        return TensorHandle(torch.from_numpy(inputs.data.copy()).view(torch.bfloat16).float().numpy(), tl.float32)

    def round_to_bfloat16(self, inputs, dtype):
        if (inputs.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, inputs, dtype)
        return TensorHandle(torch.from_numpy(inputs.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest)
    )
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", round_to_bfloat16)


def operands(queries, keys, head, leading=(2, 2), dtype=torch.float32):
    """Return q, dq, k, dk, v, dv, contiguous."""
    generator = torch.Generator().manual_seed(0)
    lengths = (queries, queries, keys, keys, keys, keys)
    return [torch.randn(*leading, n, head, generator=generator).to(DEVICE, dtype) for n in lengths]


def attention(q, k, v):
    return (SCALE * q @ k.mT).softmax(-1) @ v


def exact(q, dq, k, dk, v, dv):
    """Return the tangent by forward mode in float64."""
    inputs = [
        (p.double(), torch.zeros_like(p).double() if d is None else d.double()) for p, d in ((q, dq), (k, dk), (v, dv))
    ]
    return torch.func.jvp(attention, *zip(*inputs, strict=True))[1]


def error(actual, expected):
    """Return the largest difference relative to the largest element."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@needs_the_kernel
@pytest.mark.parametrize("head", [16, 32, 64, 72, 128])
@pytest.mark.parametrize("lengths", [(17, 17), (64, 64), (100, 100), (17, 100), (100, 33), (1, 1)])
def test_float32_is_forward_mode(head, lengths):
    inputs = operands(*lengths, head)
    assert error(fused_tangent(*inputs, SCALE), exact(*inputs)) < 1e-5


@needs_the_kernel
@pytest.mark.parametrize("head", [16, 64, 72, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_the_formula_by_torch(head, dtype):
    inputs = operands(100, 70, head, dtype=dtype)
    tangent, expected = fused_tangent(*inputs, SCALE), exact(*inputs)
    q, dq, k, dk, v, dv = inputs
    weights = (SCALE * q @ k.mT).softmax(-1)
    moved = weights * (SCALE * (dq @ k.mT + q @ dk.mT))
    by_torch = weights @ dv + (moved - weights * moved.sum(-1, keepdim=True)) @ v
    assert tangent.dtype == dtype
    assert error(tangent, expected) < 2e-2
    assert (tangent - expected).square().mean() <= (by_torch - expected).square().mean()


@needs_the_kernel
@pytest.mark.parametrize("present", itertools.product([False, True], repeat=3))
def test_a_missing_tangent_is_zero(present):
    inputs = operands(40, 50, 24)
    for place, there in zip((1, 3, 5), present, strict=True):
        inputs[place] = inputs[place] if there else None
    tangent, expected = fused_tangent(*inputs, SCALE), exact(*inputs)
    assert error(tangent, expected) < 1e-5 if any(present) else not tangent.any()


@needs_the_kernel
@pytest.mark.parametrize("head", [16, 72])
def test_views_are_read_in_place(head):
    """With heads as the third axis, slices of one projection, expanded, transposed, and unaligned."""
    inputs = operands(40, 40, head)
    expected = fused_tangent(*inputs, SCALE)
    q, dq, k, dk, v, dv = inputs
    joined = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous()
    q, k, v = joined.permute(2, 0, 3, 1, 4)
    dq = dq.transpose(1, 2).contiguous().transpose(1, 2)
    dk = dk.mT.contiguous().mT
    dv = torch.nn.functional.pad(dv, (1, 2))[..., 1:-2]
    assert not any(operand.is_contiguous() for operand in (q, dq, k, dk, v, dv))
    torch.testing.assert_close(fused_tangent(q, dq, k, dk, v, dv, SCALE), expected, rtol=1e-6, atol=1e-6)


@needs_the_kernel
def test_tensors_of_more_than_2_31_elements():
    """With that many elements on a GPU, and fewer elsewhere."""
    inputs = operands(20, 30, 16, dtype=torch.bfloat16)
    expected = fused_tangent(*inputs, SCALE)
    apart = 2**27 if DEVICE == "cuda" else 2**10
    far = torch.empty(30 * apart, dtype=torch.bfloat16, device=DEVICE)
    inputs[2] = far.as_strided((2, 2, 30, 16), (32, 16, apart, 1)).copy_(inputs[2])
    assert torch.equal(fused_tangent(*inputs, SCALE), expected)


@needs_the_kernel
@pytest.mark.parametrize("leading", [(), (3,), (2, 1), (2, 1, 3)])
def test_leading_axes(leading):
    """Any number of leading axes, and one key head for all query heads."""
    inputs = operands(20, 30, 16, leading)
    assert error(fused_tangent(*inputs, SCALE), exact(*inputs)) < 1e-5
    inputs[0], inputs[1] = operands(20, 30, 16, (2, *leading))[:2]
    assert error(fused_tangent(*inputs, SCALE), exact(*inputs)) < 1e-5


@needs_the_kernel
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_beyond_the_range_of_exp(sign):
    """With scores that rise or fall from key to key."""
    inputs = operands(20, 100, 16)
    inputs[0] = inputs[0].abs()
    inputs[2] = inputs[2].abs() * torch.linspace(0, sign * 100, 100, device=DEVICE)[:, None]
    assert (SCALE * inputs[0] @ inputs[2].mT).abs().max() > 200
    assert error(fused_tangent(*inputs, SCALE), exact(*inputs)) < 1e-4


@needs_the_kernel
@pytest.mark.compiled
@pytest.mark.parametrize("missing", [(), (1, 5)])
def test_it_compiles_to_one_graph(missing):
    inputs = [None if place in missing else inputs for place, inputs in enumerate(operands(40, 50, 24))]

    def function(*inputs):
        assert supports(*inputs[::2]) is None
        return 2 * fused_tangent(*inputs, SCALE)

    compiled = torch.compile(function, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    torch.library.opcheck(attention_tangent, (*inputs, SCALE))


@needs_the_kernel
@pytest.mark.parametrize(
    ("place", "shape"), [(1, (2, 2, 39, 16)), (3, (2, 2, 49, 16)), (4, (2, 2, 49, 16)), (5, (50, 8))]
)
def test_shapes_that_do_not_fit_are_refused(place, shape):
    inputs = operands(40, 50, 16)
    inputs[place] = torch.zeros(shape, device=DEVICE)
    with pytest.raises((ValueError, RuntimeError), match=re.escape(str(shape)) + "|head sizes"):
        fused_tangent(*inputs, SCALE)


@needs_the_kernel
def test_what_is_not_supported_is_refused():
    with pytest.raises(RuntimeError, match="float64"):
        fused_tangent(*operands(20, 20, 16, dtype=torch.float64), SCALE)


def blank(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype)


REASONS = {
    "torch.float64": (blank(4, 16, dtype=torch.float64),) * 3,
    "different dtypes": (blank(4, 16), blank(4, 16), blank(4, 16, dtype=torch.float16)),
    "different head sizes": (blank(4, 16), blank(4, 16), blank(4, 32)),
    "head size 264 is above 256 for torch.bfloat16": (blank(4, 264),) * 3,
    "head size 160 is above 128 for torch.float32": (blank(4, 160, dtype=torch.float32),) * 3,
    "queries or keys are empty": (blank(4, 16), blank(0, 16), blank(0, 16)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_supports_gives_the_reason(reason, monkeypatch):
    monkeypatch.setattr(fused_attention, "triton", torch)
    monkeypatch.setattr(fused_attention, "INTERPRETED", True)
    assert reason in supports(*REASONS[reason])
    assert supports(*(blank(4, 256),) * 3) is None


def test_supports_asks_for_triton_and_a_gpu(monkeypatch):
    monkeypatch.setattr(fused_attention, "INTERPRETED", False)
    monkeypatch.setattr(fused_attention, "triton", torch)
    assert "NVIDIA GPU" in supports(*(blank(4, 16),) * 3)
    monkeypatch.setattr(fused_attention, "triton", None)
    assert supports(*(blank(4, 16),) * 3) == "Triton is not installed"
