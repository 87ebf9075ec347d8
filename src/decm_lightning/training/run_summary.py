"""What a run trains and what it costs, as the lines that a run begins with."""

from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from decm_lightning.derivatives.choice import on_meta
from decm_lightning.training.flow_training import FlowTraining
from decm_lightning.training.schedule import run_length

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def summary(trainer: L.Trainer, module: FlowTraining, rows: int, flops: int | None) -> str:
    """Return the summary of a run, one line for each heading.

    Args:
        trainer: the trainer, which has begun to train.
        module: the trained module.
        rows: the batch size of a process.
        flops: of a forward pass of one sample; None if they could not be counted.
    """
    lines = module.summary() | {"cost": str(module.cost())}
    rows *= trainer.world_size * trainer.accumulate_grad_batches
    if flops is not None:
        step = scaled(flops * rows * module.cost().total)
        lines["FLOPs"] = f"{scaled(flops)}FLOPs per forward pass of a sample, about {step}FLOPs per step"
    total, first = run_length(trainer), trainer.global_step
    steps = f"{'no limit of' if total is None else total} steps" + (f", resumed at step {first}" if first else "")
    samples = "1 sample" if rows == 1 else f"{rows} samples"
    lines["run"] = f"{steps}; {samples} per step, {_devices(trainer)}, precision {trainer.precision}"
    width = max(map(len, lines))
    return "\n".join(f"{heading:<{width}}  {text}" for heading, text in lines.items())


def forward_flops(network: nn.Module, example: tuple[Any, ...]) -> int | None:
    """Return the floating-point operations of a forward pass of one row, a multiplication and an addition each.

    Matrix products, convolutions and attention are counted, on the meta device.

    Args:
        network: the network, on any device, not yet wrapped or sharded.
        example: x_t, t, s and condition; their values are ignored.

    Returns:
        the operations, or None if the network cannot run on the meta device.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        try:
            on_meta(lambda run, x_t, t, s, condition, tangent: run(x_t, t, s, condition), network, example)
        except Exception:  # Network code may raise anything there. The run does not depend on this number.
            return None
    return counter.get_total_flops() // len(example[0])


def scaled(value: float) -> str:
    """Return a number with a prefix of three digits, ending with a space or the prefix.

    Example:
        >>> scaled(1.26e6), scaled(512)
        ('1.26 M', '512 ')
    """
    factor, prefix = next((pair for pair in PREFIXES if value >= pair[0]), (1, ""))
    return f"{value / factor:.3g} {prefix}"


def _devices(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    count = torch.get_num_threads()
    name = f"CPU with {count} thread{'s' * (count > 1)}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    return name if trainer.world_size == 1 else f"{trainer.world_size} processes ({name} each)"
