"""The rules of the dual engine, each against forward mode; operations without a tangent are refused by name."""

import pytest
import torch
from torch import nn
from torch.nn import functional as nnf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from decm_lightning.derivatives import JVPResult, Tangent, dual
from decm_lightning.derivatives.dual import attention as attention_rule


def assert_close(actual, expected, tolerance=1e-12):
    """Compare relative to the largest element."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def of_points(function, points, dx=None, rows=None):
    """Return u and jvp of a function of one tensor (b, ...), by the dual engine and by torch.func.jvp."""
    rows = len(points) if rows is None else rows
    dx = torch.randn_like(points) if dx is None else dx
    times = torch.zeros(len(points), dtype=points.dtype)
    still = torch.zeros(rows, dtype=points.dtype)
    result = dual(lambda x, t, s, condition: function(x), points, times, times, None, Tangent(dx[:rows], still, still))
    beyond = torch.cat([dx[:rows], torch.zeros_like(dx[rows:])])
    with sdpa_kernel(SDPBackend.MATH):
        u, jvp = torch.func.jvp(function, (points,), (beyond,))
    return result, JVPResult(u, jvp[:rows])


@pytest.mark.parametrize("block", [3, 256])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float", "per sample"])
@pytest.mark.parametrize("rows", [2, 4])
def test_attention(mask, block, rows, monkeypatch):
    """For every kind of mask, with 7 queries in blocks of 3, it equals forward mode on the math kernel."""
    monkeypatch.setattr(attention_rule, "BLOCK", block)
    torch.manual_seed(0)
    x = torch.randn(4, 3, 2, 7, 8, dtype=torch.float64)
    masks = {
        "bool": torch.rand(7, 7) > 0.4,
        "float": torch.randn(2, 7, 7, dtype=torch.float64),
        "per sample": torch.rand(4, 1, 1, 7) > 0.4,
    }
    if mask == "bool":
        masks["bool"][0] = False

    def function(x):
        q, k, v = x.unbind(1)
        return nnf.scaled_dot_product_attention(q, k, v, masks.get(mask), is_causal=mask == "causal", scale=0.7)

    result, exact = of_points(function, x, rows=rows)
    assert_close(result.u, exact.u)
    assert_close(result.jvp, exact.jvp)


@pytest.mark.parametrize("mask", [torch.randn(7, 7), torch.rand(7, 7) > 0.4])
def test_attention_under_autocast(mask):
    """q, k and v are cast to bfloat16, and a float32 mask with them."""
    torch.manual_seed(0)
    x, dx = torch.randn(2, 4, 3, 2, 7, 8)

    def function(x):
        return nnf.scaled_dot_product_attention(*x.unbind(1), mask)

    times = torch.zeros(4)
    with torch.autocast("cpu", torch.bfloat16):
        result = dual(lambda x, t, s, condition: function(x), x, times, times, None, Tangent(dx, times, times))
    mask = mask if mask.dtype == torch.bool else mask.double()
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.func.jvp(function, (x.double(),), (dx.double(),))[1]
    assert (result.jvp - exact).norm() < 0.03 * exact.norm()


def test_grouped_attention_with_a_constant_key():
    """Fewer key heads than query heads, and a key that does not depend on x."""
    torch.manual_seed(0)
    x, key = torch.randn(3, 4, 5, 8, dtype=torch.float64), torch.randn(3, 2, 6, 8, dtype=torch.float64)

    def function(x):
        return nnf.scaled_dot_product_attention(x, key, key * x[:, :2, :1], enable_gqa=True)

    result, exact = of_points(function, x, rows=2)
    assert_close(result.jvp, exact.jvp)


WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
PER_ROW = torch.randn(4, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
ROTATION = torch.polar(torch.ones(6, 3).double(), WEIGHT[:, :3])
OPERATIONS = {
    "arithmetic": lambda x: (2 - x) * PER_ROW / (1 + x * x) + 1 / (3 + x.square()) - x / 2 + 2**x + x**3 - (-x),
    "alpha": lambda x: torch.add(x, x.exp(), alpha=3) - torch.sub(PER_ROW, x, alpha=2) + torch.rsub(x, PER_ROW),
    "broadcast": lambda x: x[:, :1] * x + x.mean((1, 2))[:, None, None] + x.sum(-1, keepdim=True).expand(-1, -1, 6),
    "functions": lambda x: x.sin() + torch.cos(x) + x.exp() + x.square().add(1).sqrt() + (1 + x.square()).rsqrt(),
    "activations": lambda x: nnf.silu(x) + nnf.gelu(x) + nnf.gelu(x, approximate="tanh") + nnf.softplus(x, 2),
    "gates": lambda x: x.sigmoid() + x.tanh() * nnf.glu(torch.cat([x, x.flip(-1)], -1)) + nnf.mish(x) + nnf.relu(x),
    "comparisons": lambda x: torch.where(x > 0, x, PER_ROW) + x.clamp(-0.5, 0.5) + x.masked_fill(x < -1, 0.0),
    "matmul": lambda x: x @ WEIGHT + WEIGHT @ x + x @ x.mT + torch.bmm(x, x) + torch.matmul(x, x.transpose(1, 2)),
    "einsum": lambda x: torch.einsum("bij,bkj,kl->bil", x, x, WEIGHT),
    "linear": lambda x: nnf.linear(x, WEIGHT, WEIGHT[0]),
    "softmax": lambda x: nnf.softmax(x, -1) + x.softmax(1) + torch.log_softmax(x, -1),
    "norms": lambda x: nnf.layer_norm(x, (6,), WEIGHT[0], WEIGHT[1]) + nnf.rms_norm(x, (6, 6), WEIGHT, 1e-6),
    "group norm": lambda x: nnf.group_norm(x, 3, WEIGHT[0], WEIGHT[1]) + nnf.normalize(x, dim=-1),
    "convolution": lambda x: nnf.conv1d(x, WEIGHT[:, :, None], WEIGHT[0]) + nnf.interpolate(x[..., ::2], 6),
    "image": lambda x: nnf.conv2d(x[:, None], WEIGHT[None, None, :3, :3], padding=1)[:, 0],
    "pieces": lambda x: torch.cat([*x.chunk(2, 1), x[:, :1] * 2], 1)[:, 1:] + torch.stack(x.unbind(2), 1),
    "pad": lambda x: (
        nnf.pad(x, (1, 0), value=1.0)[..., :6]
        + nnf.pad(x, (2, 2), "circular")[..., 4:]
        + torch.cat([x, torch.ones_like(x)], 1)[:, 6:]
    ),
    "shapes": lambda x: x.view(4, 2, 3, 6).permute(1, 3, 0, 2).reshape(12, 12).view(2, 6, 4, 3).transpose(0, 2),
    "batch moved": lambda x: (x.permute(1, 0, 2) * PER_ROW[:, 0]).transpose(0, 1)[..., None].squeeze(-1),
    "batch split": lambda x: x.view(2, 2, 6, 6).mul(WEIGHT).flatten(0, 1).unflatten(0, (2, 2)).reshape(x.shape),
    "batch coupled": lambda x: x - x.mean(0, keepdim=True) + x.flip(0) + x[[1, 0, 3, 2]] + x.softmax(0),
    "batch in pieces": lambda x: torch.cat([x[1:], x[:1]]) + torch.cat(x.chunk(2, 0)[::-1]) + torch.stack([*x]),
    "batch in columns": lambda x: (x.reshape(4, 36).mT.contiguous() @ WEIGHT[:4, :4]).mT.reshape(4, 6, 6),
    "casts": lambda x: x.to(torch.float64).type_as(x).double() + x.detach() * x,
    "largest": lambda x: x.max(1, keepdim=True).values + x.sort(-1)[0],
    "weights from x": lambda x: torch.stack([nnf.linear(row, row + WEIGHT) for row in x]),
    "keywords": lambda x: torch.mul(input=x, other=x) + torch.softmax(input=x, dim=-1) + torch.sum(x, dim=0),
    "batch along axis": lambda x: torch.cat([2 * x.mT.transpose(0, 2), x.permute(2, 1, 0)], axis=2)[..., 2:6].mT,
    "batch padded": lambda x: nnf.pad(x.transpose(0, 2), (2, 0), "circular")[..., 1:5].transpose(0, 2) * x,
    "rotations": lambda x: torch.view_as_real(torch.view_as_complex(x.view(4, 6, 3, 2)) * ROTATION).flatten(2),
    "complex": lambda x: torch.complex(x, 1 + x.square()).tanh().abs() + torch.fft.irfft(torch.fft.rfft(x).exp(), 6),
    "all by position": lambda x: (
        torch.group_norm(x, 3, WEIGHT[0], WEIGHT[1], 1e-5, True)
        + torch.layer_norm(x, (6,), WEIGHT[0], None, 1e-5, True)
        + nnf.layer_norm(x, normalized_shape=(6,))
        + nnf.instance_norm(x)
    ),
    "matrix": lambda x: (x.flatten(1).T * PER_ROW.flatten()).T.view(4, 6, 6),
    "as a dual": lambda x: (
        x * PER_ROW.expand_as(x) + WEIGHT.to(x) + x @ WEIGHT.type_as(x) + PER_ROW.view_as(x[:, :1, :1])
    ),
}


@pytest.mark.filterwarnings("ignore:Implicit dimension")
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name, rows):
    """Each rule equals forward mode for any number of rows, also if the operation mixes rows."""
    torch.manual_seed(0)
    result, exact = of_points(OPERATIONS[name], torch.randn(4, 6, 6, dtype=torch.float64), rows=rows)
    assert torch.equal(result.u, exact.u) or name in {"norms", "convolution"}
    assert_close(result.u, exact.u)
    assert_close(result.jvp, exact.jvp)


def test_group_norm_in_any_layout():
    """Forward mode requires contiguous memory; the rule does not."""
    torch.manual_seed(0)
    x, dx = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    still = torch.zeros(4, dtype=torch.float64)
    result = dual(lambda x, t, s, c: nnf.group_norm(x.mT, 3), x, still, still, None, Tangent(dx, still, still))
    exact = torch.func.jvp(lambda x: nnf.group_norm(x.mT.contiguous(), 3), (x,), (dx,))[1]
    assert_close(result.jvp, exact)


def test_modules_of_torch():
    """Layers as public networks use them."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Upsample(scale_factor=2),
        nn.ConvTranspose2d(8, 4, 2, 2),
        nn.AvgPool2d(2),
        nn.PixelUnshuffle(2),
        nn.Flatten(2),
        nn.LayerNorm(16),
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
        nn.RMSNorm(16),
        nn.Softplus(),
    ).double()
    result, exact = of_points(network, torch.randn(4, 2, 4, 4, dtype=torch.float64), rows=3)
    assert_close(result.u, exact.u)
    assert_close(result.jvp, exact.jvp)


def test_value_and_tangent_share_the_dropout_mask():
    """Dropout is linear in x, with the mask of the plain forward pass."""
    x = torch.randn(4, 50, dtype=torch.float64)
    torch.manual_seed(0)
    plain = nnf.dropout(x, 0.3)
    torch.manual_seed(0)
    result, _ = of_points(lambda x: nnf.dropout(x, 0.3), x, dx=2 * x, rows=3)
    torch.testing.assert_close(result.u, plain, rtol=0, atol=1e-15)
    assert (plain == 0).any()
    torch.testing.assert_close(result.jvp, 2 * plain[:3], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("p", "training"), [(0.3, True), (0.3, False), (0.0, True)])
def test_dropout_in_a_checkpointed_block_is_dual_too(p, training):
    """Also if it drops nothing: the recomputation without duals must save the same tensors."""
    x, weight = torch.randn(4, 50, dtype=torch.float64), torch.randn(50, dtype=torch.float64, requires_grad=True)

    def block(x):
        return nnf.dropout(x * weight, p, training).square()

    def gradient(function):
        torch.manual_seed(0)
        u = dual(lambda x, t, s, c: function(x), x, x[:, 0], x[:, 0], None, Tangent(x, x[:, 0], x[:, 0])).u
        return torch.autograd.grad(u.sum(), weight)[0]

    assert torch.equal(gradient(block), gradient(lambda x: checkpoint(block, x, use_reentrant=False)))


REFUSED = {
    "instance_norm": lambda x: nnf.instance_norm(x, torch.zeros(6), torch.ones(6)),
    "_cdist_forward": lambda x: torch.cdist(x, x, p=3.0),
    "mul_": lambda x: x.mul_(2),
    "__iadd__": lambda x: x.__iadd__(1),
    "__setitem__": lambda x: x.__setitem__(0, 1.0),
    "relu": lambda x: nnf.relu(x, inplace=True),
    "item": lambda x: x * x[0, 0, 0].item(),
    "__bool__": lambda x: x if x.sum() else -x,
    "data": lambda x: x.data,
    "torch's __setitem__": lambda x: torch.zeros(4, 6, 6).__setitem__(0, x[0]),
    "torch's tensor": lambda x: x * torch.tensor([x[0, 0, 0]]),
    "full_like": lambda x: torch.full_like(x, x[0, 0, 0]),
    "new_tensor": lambda x: x.new_tensor(x),
    "long": lambda x: nnf.embedding(x[:, 0].long().clamp(0, 1), WEIGHT),
    "to: torch.int32": lambda x: x * x.to(torch.int32),
    "rrelu": lambda x: nnf.rrelu(x, training=True),
    "alpha_dropout": lambda x: nnf.alpha_dropout(x, training=True),
    "batch_norm": lambda x: nnf.batch_norm(x, None, None, training=True),
    "scaled_dot_product_attention": lambda x: nnf.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operations_without_a_tangent_are_refused_by_name(name):
    """A silent zero would be a wrong derivative."""
    x, times = torch.randn(4, 6, 6), torch.zeros(4)
    with pytest.raises(NotImplementedError, match=name):
        dual(lambda x, t, s, c: REFUSED[name](x), x, times, times, None, Tangent(torch.randn(4, 6, 6), times, times))


def test_a_custom_operation_without_a_forward_derivative_is_refused_by_name():
    """Such as a custom attention kernel."""

    @torch.library.custom_op("decm_test::doubled", mutates_args=())
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    with pytest.raises((NotImplementedError, TypeError), match="doubled"):
        of_points(doubled, torch.randn(3, 2))


def test_a_rule_is_not_used_for_a_custom_operation_of_the_same_name():
    """The custom operation may be a different function, here three times GELU."""

    @torch.library.custom_op("decm_test::gelu", mutates_args=())
    def gelu(x: torch.Tensor) -> torch.Tensor:
        return 3 * nnf.gelu(x)

    with pytest.raises(NotImplementedError, match=r"decm_test\.gelu"):
        of_points(torch.ops.decm_test.gelu, torch.randn(3, 2))


class Doubled(torch.autograd.Function):
    """A function with its own backward pass."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize(
    "function", [torch.no_grad()(torch.exp), Doubled.apply, lambda x: checkpoint(torch.exp, x, use_reentrant=True)]
)
def test_code_in_which_u_would_lose_its_graph_is_refused(function):
    """Autograd does not see the tensors in duals."""
    with pytest.raises(NotImplementedError, match="u would lose its graph"):
        of_points(function, torch.randn(3, 2))
