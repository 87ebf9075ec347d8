"""The base class of all networks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from decm_lightning import samplers
from decm_lightning.autoencoders.latent_coder import LatentCoder
from decm_lightning.conditions import select
from decm_lightning.files import tensors_sha256
from decm_lightning.image_writer import to_pil, to_uint8
from decm_lightning.networks.generation import (
    BATCH,
    Requested,
    conditions_of,
    evaluating,
    flow_map,
    placement,
)
from decm_lightning.networks.record import Record, check_recorded, choose
from decm_lightning.samplers import Sampler
from decm_lightning.seeds import check_seed
from decm_lightning.text import CaptionEncoder, named_encoder
from decm_lightning.types import Captions, Condition, Sample, Time

COMPILER = "2.13"
"""The oldest torch version that compiles all networks without graph breaks."""


def arguments(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor, whose first statement passes its `locals()`."""
    return {name: value for name, value in names.items() if name not in ("self", "__class__")}


class Network(nn.Module, PyTorchModelHubMixin, ABC, library_name="decm-lightning"):
    """A trainable flow map: u = network(x_t, t, s, condition) is the mean velocity from time t to the end time s.

    Attributes:
        config: the constructor arguments.
        sample_shape: the shape of one sample, without the batch axis.
        num_classes: number of classes; label num_classes is the null class of classifier-free guidance.
        time_scale: the factor by which times are multiplied before they are embedded; it determines the step of a
            central difference.
        gradient_checkpointing: only store the inputs of each block, and recompute the rest in the backward pass.
        record: the network's origin and recommended use, if it was loaded with one.
        place: the folder or file that it was loaded from, if any.
    """

    config: dict[str, Any]
    sample_shape: tuple[int, ...]
    num_classes: int
    time_scale: float = 1.0
    gradient_checkpointing: bool = False
    record: Record | None = None
    place: Path | None = None

    @abstractmethod
    def forward(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return the mean velocity u over (t, s), shaped like x_t."""

    @abstractmethod
    def with_end_time(self) -> "Network":
        """Return a copy that also reads s and initially equals this network for every s."""

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
        """Generate images, or a tensor (b, *sample_shape) if the samples are not images.

        Sample i of a seed is the same in every command and callback; see `samplers.generate`. The network runs on its
        current device, in eval mode and without gradients. Its mode is restored afterwards.

        Example:
            >>> import decm_lightning
            >>> student = decm_lightning.load("weights/digits/student")
            >>> three, five, seven = student.generate([3, 5, 7], steps=2)
            >>> three.size
            (8, 8)

        Args:
            condition: labels from 0 to num_classes (the null class); captions, as text or encoded; or a single one for
                all rows. None for each class once, or, with `rows`, for class i mod num_classes in row i.
            steps: number of steps; None for 2, or 50 for euler and for a network that ignores the end time.
            seed: from 0 to 2**63 - 1.
            sampler: a name or sampler, see `samplers.sampler`; None for the one that the record recommends for this
                number of steps, by default mix up to 2 steps, consistency at 4 and 8, and euler at 50.
            rows: sample numbers; None for 0, 1, ...
            encoder: the text encoder for captions passed as text, or its name; None for the recorded one.
            decoder: turns samples into images in [-1, 1], such as `LatentCoder.decode`; None for the recorded VAE with
                the normalization of the latents.
            options: sampler options, such as times or s1.

        Raises:
            NonFiniteError: if a sample is NaN or infinite.
            OSError: if the recorded VAE or text encoder is not found.
            ValueError: if the condition does not match the network or the rows, the text encoder or the VAE is another
                one than the recorded one, the samples are latents and no decoder is known, or an argument is out of
                range.
        """
        check_seed(seed)
        sampler, steps = self.sampling(sampler, steps)
        method = samplers.sampler(sampler, **options)
        is_image = len(self.sample_shape) == 3
        if is_image and decoder is None and self.recorded_coder is not None:
            decoder = self.recorded_coder.decode
        if is_image and decoder is None and self.sample_shape[0] not in (1, 3):
            raise ValueError(f"the samples are latents {self.sample_shape}, not images: pass decoder=, such as a VAE's")
        with evaluating(self), torch.no_grad():
            conditions, rows = conditions_of(self, condition, rows, encoder)
            student, where = flow_map(self), placement(self)
            parts = [
                samplers.generate(student, method, select(conditions, part), steps, rows=rows[part], seed=seed, **where)
                for part in (slice(first, first + BATCH) for first in range(0, len(rows), BATCH))
            ]
            if not is_image:
                return torch.cat(parts)
            decoded = parts if decoder is None else [decoder(part) for part in parts]
            return [to_pil(image) for part in decoded for image in to_uint8(part).cpu()]

    @property
    def reads_end_time(self) -> bool:
        """Whether u depends on the end time s, as in a flow map. A plain velocity network ignores s."""
        return bool(self.config.get("end_time", True))

    @property
    def reads_captions(self) -> bool:
        """Whether the condition is captions rather than class labels."""
        return isinstance(self.example(1)[3], Captions)

    def sampling(self, sampler: str | Sampler | None = None, steps: int | None = None) -> tuple[str | Sampler, int]:
        """Return a sampler and its number of steps, the recommended ones instead of None; see `record.choose`."""
        return choose(self.record, self.reads_end_time, sampler, steps)

    def caption_encoder(self, requested: CaptionEncoder | str | None = None) -> CaptionEncoder:
        """Return the text encoder of the network. It stays loaded as long as the network.

        Args:
            requested: the encoder or its name; None for the one that the record or `text_encoder` in the config names.

        Raises:
            ValueError: if none is named, or it is another one than the recorded one. The message names both.
        """
        if requested is None or isinstance(requested, str):
            if requested not in self.encoders:
                self.encoders[requested] = self.named_encoder() if requested is None else named_encoder(requested)
            requested = self.encoders[requested]
        encoder = requested
        if recorded := self.record and self.record.text_encoder:
            check_recorded("text encoder", encoder.name or type(encoder).__name__, encoder.identity, recorded)
        return encoder

    @cached_property
    def encoders(self) -> dict[str | None, CaptionEncoder]:
        """The text encoders that this network has loaded, by name; None for the recorded one. `clear()` frees them."""
        return {}

    def named_encoder(self) -> CaptionEncoder:
        """Return the text encoder that the record or the config names.

        Raises:
            ValueError: if neither does.
        """
        recorded = self.record and self.record.text_encoder
        name = recorded.name if recorded else self.config.get("text_encoder")
        if not name:
            remedy = "pass encoder= (--encoder), the one the network was trained with"
            raise ValueError(f"the config names no text_encoder: {remedy}")
        return named_encoder(name)

    @cached_property
    def recorded_coder(self) -> LatentCoder | None:
        """The VAE with the normalization of the latents, None if the record names no VAE; see `latent_coder`."""
        # Imported here: it imports the networks.
        from decm_lightning.autoencoders.of_network import latent_coder

        return latent_coder(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out loaded text encoders and the VAE: a copy or pickle loads its own."""
        return {name: value for name, value in vars(self).items() if name not in ("encoders", "recorded_coder")}

    def _save_pretrained(self, save_directory: Path) -> None:
        # The mixin's config.json does not name the class. Imported here, because it imports this module.
        from decm_lightning.networks.pretrained import write

        write(self, save_directory)

    def identity(self) -> str:
        """Return the first 16 digits of the SHA-256 of all weights and buffers."""
        return tensors_sha256(self.state_dict())[:16]

    def units(self) -> list[nn.Module]:
        """Return the modules to compile and shard separately, such as transformer blocks; by default the network."""
        return [self]

    def compile_units(self) -> "Network":
        """Compile each unit in place, without graph breaks and once for all identical units; return the network.

        Only `forward` is compiled, so hooks such as those of FSDP stay outside the graph, and parameter names do not
        change.

        Raises:
            ValueError: if torch is too old.
        """
        check_compiler()
        for unit in self.units():
            # Each width, mode and kind of row needs its own graph, and the limit counts all networks of the process.
            # The default of 8 is too small, and exceeding it is an error.
            compiled = torch.compile(unit.forward, fullgraph=True, recompile_limit=64)  # type: ignore[call-overload]
            unit.forward = compiled  # type: ignore[method-assign]
        return self

    def example(self, rows: int = 2) -> tuple[Sample, Time, Time, Condition]:
        """Return example arguments of the forward pass: zeros of the right shapes, with labels if it has classes."""
        parameter = next(self.parameters())
        times = torch.full((rows,), 0.5, device=parameter.device)
        labels = torch.zeros(rows, dtype=torch.long, device=parameter.device) if self.num_classes else None
        return parameter.new_zeros(rows, *self.sample_shape), times, times, labels

    def null(self, condition: Condition) -> Condition:
        """Return a null class for each label, or None if the condition is not a tensor of labels."""
        return torch.full_like(condition, self.num_classes) if isinstance(condition, Tensor) else None


def check_compiler() -> None:
    """Check that the installed torch can compile networks on dual tensors."""
    # Before 2.13, Dynamo breaks the graph at `isinstance(x, A | B)`, `bool(list)` and einops' view of a dual.
    if torch.__version__ < TorchVersion(COMPILER):
        raise ValueError(f"compile: true needs torch {COMPILER} or newer: got {torch.__version__}; set compile: false")


def describe(network: Network) -> dict[str, Any]:
    """Return the class name and arguments of a network, from which `build` creates it again."""
    # Imported here: it dominates the import time, and `load` does not need it.
    from torch.distributed.fsdp import FSDPModule

    # FSDP2 replaces the class of a sharded module by a subclass.
    cls = next(cls for cls in type(network).__mro__ if not issubclass(cls, FSDPModule))
    # A class from outside this package needs its module to be found again.
    is_own = cls.__module__.startswith("decm_lightning.networks.")
    name = cls.__name__ if is_own else f"{cls.__module__}.{cls.__qualname__}"
    return {"_class_name": name, **network.config}
