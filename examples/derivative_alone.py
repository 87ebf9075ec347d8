"""The directional derivative of a transformer in one pass, without the rest of the package.

    python examples/derivative_alone.py

`dual` returns u = network(x, t, s, condition) with its ordinary autograd graph, and the derivative of u along a tangent
over (x, t, s) without a graph: what MeanFlow, sCM and their relatives need in every training step. The network is
unchanged, its attention stays on the fused kernel, and its blocks may be checkpointed, compiled or sharded.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from decm_lightning.derivatives import Tangent, dual, functional


class Block(nn.Module):
    """Attention and an MLP, as in any transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        """Return the tokens after the block, (b, n, width)."""
        q, k, v = self.qkv(self.norms[0](h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.mlp(self.norms[1](h))


class Transformer(nn.Module):
    """A network u(x, t, s) on tokens, with checkpointed blocks."""

    def __init__(self, channels: int = 4, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(channels, width), nn.Linear(width, channels)
        self.times = nn.Linear(2, width)
        self.blocks = nn.ModuleList(Block(width, heads=4) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: None = None) -> Tensor:
        """Return u, shaped like x, (b, n, channels)."""
        h = self.read(x) + self.times(torch.stack([t, s], -1))[:, None]
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.training else block(h)
        return self.write(h)


def main() -> tuple[Tensor, Tensor]:
    """Take one MeanFlow step, and compare its derivative with torch.func.jvp, which needs a second pass."""
    torch.manual_seed(0)
    network, (x, v) = Transformer().double(), torch.randn(2, 8, 16, 4, dtype=torch.float64)
    t, s = torch.rand(2, 8, dtype=torch.float64).sort(0).values
    along = Tangent(x=v, t=torch.ones_like(t), s=torch.zeros_like(s))

    result = dual(network, x, t, s, None, along)
    target = v + (s - t)[:, None, None] * result.jvp
    (result.u - target).square().mean().backward()

    # Not every version of PyTorch lets torch.func.jvp through a checkpoint.
    reference = functional(network.eval(), x, t, s, None, along).jvp
    print(f"largest difference to torch.func.jvp: {(result.jvp - reference).abs().max():.1e}")
    return result.jvp, reference


if __name__ == "__main__":
    main()
