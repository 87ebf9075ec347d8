"""The exponential moving average of the weights, in float32 or wider for every precision of the run."""

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from decm_lightning.networks import Network


def average_of(network: Network) -> Network:
    """Return a frozen copy of a network, in float32 or wider, that holds its average.

    Tensors that the copy shares with the network, such as the base of LoRA, are not cast. Inputs narrower than the
    average are cast to its dtype.
    """
    average: Network = copy.deepcopy(network).requires_grad_(False)
    average._apply(in_float32(lambda tensor: tensor.to(_wide(tensor)), average, network))
    average.register_forward_pre_hook(_widen_inputs, with_kwargs=True)
    return average


def in_float32(
    function: Callable[[Tensor], Tensor], average: nn.Module, network: nn.Module
) -> Callable[[Tensor], Tensor]:
    """Return a function for `nn.Module._apply` that moves and casts like `function`, but never rounds the average.

    In bfloat16 an average does not move: its step toward the weights, a thousandth of the difference, rounds to 0.
    Tensors that the average shares with the network are cast like all others.
    """
    own = {id(tensor) for tensor in _tensors(average)} - {id(tensor) for tensor in _tensors(network)}

    def apply(tensor: Tensor) -> Tensor:
        moved = function(tensor)
        return tensor.to(moved.device, _wide(moved)) if id(tensor) in own and moved.dtype != _wide(moved) else moved

    return apply


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype


def _widen_inputs(network: nn.Module, args: Any, kwargs: Any) -> Any:
    dtype = next(network.parameters()).dtype

    def widen(value: Tensor) -> Tensor:
        return value.to(torch.promote_types(value.dtype, dtype)) if value.is_floating_point() else value

    return _pytree.tree_map_only(Tensor, widen, (args, kwargs))


class EMA(L.Callback):
    """average <- d average + (1 - d) network after every optimizer step, with d = min(decay, (1 + n) / (10 + n)).

    n is the number of optimizer steps so far. While (1 + n) / (10 + n) is smaller than `decay`, the average covers
    about the last ninth of these steps. Later it covers about 1 / (1 - decay) steps.

    `network` and `average` are submodules of the module, so a strategy shards and a checkpoint saves the average like
    all other weights. Weights are never swapped. Buffers, such as running statistics, are copied.

    Args:
        decay: largest decay, in [0, 1).

    Raises:
        ValueError: if the decay is outside its range.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1): got {decay}")
        self.decay = decay
        self.last_step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from the current optimizer step."""
        self.last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after an optimizer step, but not after an accumulated batch."""
        if trainer.global_step == self.last_step:
            return
        self.last_step = trainer.global_step
        decay = min(self.decay, (1 + trainer.global_step) / (10 + trainer.global_step))
        average, network = pl_module.get_submodule("average"), pl_module.get_submodule("network")
        # Frozen weights never change. With LoRA they are most of the weights, and shared with the average.
        moving = [
            (a.data, p.data.to(a.dtype))
            for a, p in zip(average.parameters(), network.parameters(), strict=True)
            if p.requires_grad
        ]
        torch._foreach_lerp_([a for a, _ in moving], [p for _, p in moving], 1 - decay)
        for a, b in zip(average.buffers(), network.buffers(), strict=True):
            if a is not b:
                # A constant buffer keeps the float32 digits that the network's bfloat16 buffer has lost.
                a.copy_(torch.where(a.to(b.dtype) == b, a, b))
