"""The base class of all networks: a flow map with its condition, its own description, and `generate`."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from decm_lightning.files import atomic, tensors_sha256
from decm_lightning.networks.generation import Requested, generate
from decm_lightning.samplers import Sampler
from decm_lightning.text import CaptionEncoder, named_encoder
from decm_lightning.types import Condition, Sample, Time

COMPILER = "2.13"
"""The oldest torch that compiles all networks without graph breaks."""


class Network(nn.Module, PyTorchModelHubMixin, ABC, library_name="decm-lightning", license="apache-2.0"):
    """A FlowMapNetwork with weights: u = network(x_t, t, s, condition).

    Attributes:
        config: the arguments that build the network again.
        sample_shape: the shape of one sample, without the batch.
        num_classes: how many classes there are; index num_classes is the null class of classifier-free guidance.
        time_scale: the factor on times before they are embedded; a central difference's step depends on it.
        gradient_checkpointing: keep only the inputs of each block for the backward pass, and compute the rest again.
    """

    config: dict[str, Any]
    sample_shape: tuple[int, ...]
    num_classes: int
    time_scale: float = 1.0
    gradient_checkpointing: bool = False

    @abstractmethod
    def forward(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return the mean velocity u over (t, s), shaped like x_t."""

    @abstractmethod
    def with_end_time(self) -> "Network":
        """Return a copy that also reads s, and at first equals this network for every s."""

    def generate(
        self,
        condition: Requested = None,
        steps: int | None = None,
        seed: int = 0,
        sampler: str | Sampler | None = None,
        rows: Sequence[int] | None = None,
        *,
        encoder: CaptionEncoder | str | None = None,
        decoder: Callable[[Sample], Sample] | None = None,
        **options: Any,
    ) -> list[Image.Image] | Tensor:
        """Return images, or a tensor (b, *sample_shape) from a network of anything but images.

        Sample i of a seed is the same in every command and callback, see `samplers.generate`. The network computes on
        its own device, in eval mode and without gradients; the modes of its parts are restored.

            student = decm_lightning.load("weights/digits/student")
            three, five, seven = student.generate([3, 5, 7], steps=2)

        Args:
            condition: labels from 0 to num_classes, which is the null class; captions as text or encoded; or a single
                one for all rows. None for each class once; with `rows`, for class i mod num_classes in row i.
            steps: network evaluations; None for 2, and for 50 with euler.
            seed: from 0 to 2**63 - 1.
            sampler: as `samplers.sampler` takes it; None for mix, and for euler if the network ignores the end time.
            rows: the numbers of the samples; None for 0, 1, ...
            encoder: the text encoder of captions that are text, or its name; None for `caption_encoder()`.
            decoder: turns latents into images in [-1, 1], such as `autoencoder.decode` after their normalization.
            options: the sampler's, such as times or s1.

        Raises:
            NonFiniteError: if a sample is NaN or infinite.
            ValueError: if the condition does not fit the network or the rows, the samples are latents and there is no
                decoder, or an argument is out of its range.
        """
        return generate(self, condition, steps, seed, sampler, rows, encoder, decoder, options)

    @property
    def reads_end_time(self) -> bool:
        """Whether it is a flow map u(x_t, t, s), rather than a velocity for every s."""
        return bool(self.config.get("end_time", True))

    def caption_encoder(self) -> CaptionEncoder:
        """Return the text encoder that the config names under `text_encoder`.

        Raises:
            ValueError: if it names none.
        """
        name = self.config.get("text_encoder")
        if name is None:
            raise ValueError("the network's config names no text_encoder: give encoder=, the one it was trained with")
        return named_encoder(name, next(self.parameters()).device)

    def _save_pretrained(self, save_directory: Path) -> None:
        # The mixin's own config.json would not name the class, which `load` needs.
        from decm_lightning.networks.pretrained import CONFIG, describe

        super()._save_pretrained(save_directory)
        with atomic(save_directory / CONFIG) as config:
            config.write_text(json.dumps(describe(self), sort_keys=True, indent=2), encoding="utf-8")

    def identity(self) -> str:
        """Return the first 16 digits of the SHA-256 of all weights and buffers."""
        return tensors_sha256(self.state_dict())[:16]

    def units(self) -> list[nn.Module]:
        """Return the repeated parts, each compiled and sharded by itself; the whole where there are none."""
        return [self]

    def compile_units(self) -> "Network":
        """Compile each unit without graph breaks, in place and once for all that are alike; return the network.

        Only its `forward` is compiled, so that hooks, such as FSDP's, stay outside, and parameters keep their names.

        Raises:
            ValueError: if torch is too old.
        """
        check_compiler()
        for unit in self.units():
            # Widths, modes and kinds of rows have graphs of their own, over all networks of a process; beyond the
            # limit, which is 8 unless told, is an error.
            compiled = torch.compile(unit.forward, fullgraph=True, recompile_limit=64)  # type: ignore[call-overload]
            unit.forward = compiled  # type: ignore[method-assign]
        return self

    def example(self, rows: int = 2) -> tuple[Sample, Time, Time, Condition]:
        """Return arguments that this network takes: zeros of the right shapes, and classes if it has any."""
        parameter = next(self.parameters())
        times = torch.full((rows,), 0.5, device=parameter.device)
        labels = torch.zeros(rows, dtype=torch.long, device=parameter.device) if self.num_classes else None
        return parameter.new_zeros(rows, *self.sample_shape), times, times, labels

    def null(self, condition: Condition) -> Condition:
        """Return as many null classes as there are labels; None where the condition is not of labels."""
        return torch.full_like(condition, self.num_classes) if isinstance(condition, Tensor) else None


def check_compiler() -> None:
    """Check that this torch compiles networks whose values are duals.

    Raises:
        ValueError: if it is older than COMPILER.
    """
    # Before 2.13 Dynamo stops at `isinstance(x, A | B)`, at `bool(list)`, and at einops' view of a dual.
    if torch.__version__ < TorchVersion(COMPILER):
        raise ValueError(f"compile: true needs torch {COMPILER} or newer: got {torch.__version__}; give compile: false")
