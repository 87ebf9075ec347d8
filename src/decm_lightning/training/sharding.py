"""Shard networks with FSDP2. The first process sends the weights to processes without weights."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from decm_lightning.networks import Network
from decm_lightning.networks.lora import LoRANetwork


def shard_all(networks: Sequence[Network], mesh: DeviceMesh) -> None:
    """Shard networks over all processes, block by block.

    Args:
        networks: all networks of the run.
        mesh: the mesh of ModelParallelStrategy, with dimensions data_parallel and tensor_parallel.

    Raises:
        ValueError: if the strategy has tensor parallelism, as it does by default, or a network has LoRA.
    """
    if mesh["tensor_parallel"].size() > 1:
        sizes = f"data_parallel_size={mesh.size()} and tensor_parallel_size=1"
        raise ValueError(f"networks must be sharded over all processes: give ModelParallelStrategy {sizes}")
    if any(isinstance(network, LoRANetwork) for network in networks):
        raise ValueError(
            "a student with LoRA cannot be sharded, because it shares frozen weights: give --trainer.strategy ddp"
        )
    for network in networks:
        shard(network, mesh["data_parallel"])


def shard(network: Network, mesh: DeviceMesh) -> None:
    """Shard a network over the processes of a mesh, in place: each unit separately, then the rest.

    All processes must have the same weights. If a process has the network on the meta device, the first process sends
    its weights shard by shard, so one copy of the weights is enough for all processes of a machine. A network that is
    already sharded does not change.

    Args:
        network: the network, with its weights in the first process.
        mesh: one-dimensional, over all processes.
    """
    modules = [*network.units(), network]
    if all(isinstance(module, FSDPModule) for module in modules):
        return
    filled_from_first = _any_process(any(parameter.is_meta for parameter in network.parameters()), mesh)
    # A state_dict lacks buffers that are not persistent.
    weights = {**network.state_dict(), **dict(network.named_buffers())} if filled_from_first else {}
    if filled_from_first:
        network.to("meta")
    for module in modules:
        # The root too, because the average is updated shard by shard after a forward pass.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if filled_from_first:
        _fill(network, weights, mesh)


def _fill(network: nn.Module, weights: dict[str, Tensor], mesh: DeviceMesh) -> None:
    is_first = mesh.get_rank() == 0
    network.to_empty(device=_device(mesh))
    names = network.state_dict().keys() if is_first else ()
    state: dict[str, Any] = {name: weights[name] for name in names}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, state, options=options)
    for name, buffer in network.named_buffers():
        if is_first:
            buffer.copy_(weights[name])
        dist.broadcast(buffer, src=0)


def _any_process(here: bool, mesh: DeviceMesh) -> bool:
    flag = torch.tensor(int(here), device=_device(mesh))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _device(mesh: DeviceMesh) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
