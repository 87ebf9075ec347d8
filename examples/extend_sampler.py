"""A sampler of your own: equal jumps of the flow map.

    python examples/extend_sampler.py
    decm sample weights/digits/student --sampler extend_sampler.jumps --steps 4

A sampler is a function of (student, x_0, condition, steps, generator=None) that returns samples shaped like x_0.
Further arguments are options, which a command takes as `--sampler 'extend_sampler.jumps?late=0.5'` and `Evaluation` as
the spec `student/extend_sampler.jumps?late=0.5/4`. `steps` is the number of network evaluations, which tables report as
NFE. Commands find this file in the working directory; `decm fit` and `decm test` also find it next to their config.

`jumps` suits students that were trained on the whole triangle, such as those of MeanFlow and AYF: it uses u(x, t, s)
with any t and s, where Euler uses s = t, and consistency and the last step of Mix use s = 1.
"""

import torch
from torch import Tensor

from decm_lightning.flows import Gaussian
from decm_lightning.samplers import Generators
from decm_lightning.types import Condition, FlowMapNetwork


@torch.no_grad()
def jumps(
    student: FlowMapNetwork,
    x_0: Tensor,
    condition: Condition,
    steps: int,
    generator: Generators | None = None,
    *,
    late: float = 1.0,
) -> Tensor:
    """Return x_1 after the jumps x <- x + (s - t) u(x, t, s) between the times (k / steps)^late.

    Args:
        student: the network u(x_t, t, s).
        x_0: noise, (b, *d).
        condition: class labels or captions, one per row, or None.
        steps: number of jumps, at least 1.
        generator: the source of added noise, of which there is none here.
        late: below 1 the later jumps are shorter, above 1 the earlier ones; above 0.
    """
    x = x_0
    for k in range(steps):
        t, s = (torch.full((len(x),), (i / steps) ** late, device=x.device) for i in (k, k + 1))
        x = x + (s - t).reshape(-1, *(1,) * (x.ndim - 1)) * student(x, t, s, condition)
    return x


def main() -> None:
    """Sample an exact flow map: its samples are right for every number of steps."""
    flow = Gaussian(mean=3.0, std=0.5)
    x_0 = torch.tensor([[-1.0], [0.0], [1.0]])
    for steps in (1, 2, 5):
        print(f"{steps} steps: {jumps(flow, x_0, None, steps).flatten().tolist()}, exact: [2.5, 3.0, 3.5]")


if __name__ == "__main__":
    main()
