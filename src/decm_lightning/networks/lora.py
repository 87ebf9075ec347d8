"""LoRA networks: frozen pretrained weights with trainable adapters and an end-time embedding."""

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decm_lightning.errors import check_at_least, needs
from decm_lightning.files import tensors_sha256
from decm_lightning.networks.network import Network


class LoRANetwork(Network):
    """A network around a frozen pretrained `model`; `adapt` adds the trainable parameters.

    Low-rank adaptation (LoRA, arXiv 2106.09685) turns a projection W x into W x + B A x, with A of shape (lora_rank,
    inputs) and B of (outputs, lora_rank). B starts at zero, so the output is initially unchanged. Copies of the network
    share the frozen weights and have separate adapters. The state_dict only contains the added parameters; the frozen
    weights come from the model that the config names.

    Args:
        model: the pretrained model, which is frozen.
        targets: the default projections to adapt, as suffixes of their names.
    """

    def __init__(self, model: nn.Module, targets: Sequence[str]) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False)
        self.targets = tuple(targets)
        self.added: frozenset[str] = frozenset()
        """The names of the parameters added to the pretrained model."""
        self.register_state_dict_post_hook(_without_base)
        self.register_load_state_dict_pre_hook(_with_base)

    @abstractmethod
    def add_end_time(self) -> None:
        """Add an embedding of s to the model in place; it is initially zero."""

    def adapt(self, lora_rank: int, targets: Sequence[str] | None = None) -> "LoRANetwork":
        """Add trainable adapters and an end-time embedding, in float32 or wider, and return the network.

        The outputs of the adapters are not scaled (alpha = rank). Targets are suffixes of the names of projections.

        Raises:
            ImportError: if peft is not installed.
            ValueError: if lora_rank is below 1, a target matches no projection, or `config["base"]` is the hash of
                different pretrained weights.
        """
        with needs("LoRA", "peft", "lora"):
            from peft import LoraConfig, inject_adapter_in_model
        check_at_least(1, lora_rank=lora_rank)
        names = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        targets = self.targets if targets is None else tuple(targets)
        for target in targets:
            # peft only reports an error if none of the targets matches.
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise ValueError(f"targets must be suffixes of projection names: {target!r} matches none")
        if "base" in self.config:
            self.config["base"] = self._checked_base()
        inject_adapter_in_model(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=list(targets)), self.model)
        self.add_end_time()
        self.config |= {"lora_rank": lora_rank, "targets": list(targets)}
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        for parameter in trained.values():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self.added = frozenset(trained)
        return self

    def with_end_time(self, lora_rank: int = 64, targets: Sequence[str] | None = None) -> "LoRANetwork":
        """Return a copy that also reads s and initially equals this network for every s.

        The copy shares the frozen weights. If the network already has an end time, the copy has the same adapters.
        """
        student = copy.deepcopy(self)
        if not self.added:
            return student.adapt(lora_rank, targets)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in self.added)
        return student

    @property
    def reads_end_time(self) -> bool:
        """Whether an end time was added."""
        return bool(self.added)

    def identity(self) -> str:
        """Return the first 16 digits of the SHA-256 of all weights, including those of the pretrained model."""
        return tensors_sha256(self.state_dict() | _base(self))[:16]

    def _checked_base(self) -> str:
        found, saved = self.identity(), self.config["base"]
        if saved not in (None, found):
            where = self.config.get("model", "the pretrained model")
            raise ValueError(
                f"{where} has weights {found}, but the student was trained on {saved}: "
                "use the same revision of the model"
            )
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoRANetwork":
        """Copy the added parameters and share the others."""
        memo |= {id(parameter): parameter for name, parameter in self.named_parameters() if name not in self.added}
        # Share modules, not just buffers: moving a copied module would duplicate its buffers (0.9 GB in SD3.5).
        memo |= {id(module): module for module in self.modules() if any(True for _ in module.buffers(recurse=False))}
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def _without_base(network: LoRANetwork, state: dict[str, Tensor], prefix: str, metadata: Mapping[str, Any]) -> None:
    """Remove the weights of the pretrained model from a state_dict."""
    for name in _base(network):
        del state[prefix + name]


def _with_base(network: LoRANetwork, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Restore for load_state_dict what `_without_base` removed."""
    state.update({prefix + name: tensor for name, tensor in _base(network).items()})


def _base(network: LoRANetwork) -> dict[str, Tensor]:
    state = network.model.state_dict(prefix="model.")
    return {name: tensor for name, tensor in state.items() if name not in network.added}
