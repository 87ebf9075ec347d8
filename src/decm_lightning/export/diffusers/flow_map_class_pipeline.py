"""A pipeline that generates images of classes with a flow map in few steps."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin

from decm_lightning.export.diffusers.bundle import source
from decm_lightning.export.diffusers.pipeline import FlowMapPipeline, with_options

SOURCE = source(__file__)


class FlowMapClassPipeline(FlowMapPipeline):
    """Generates images of classes in few steps, without guidance.

    Args:
        transformer: a `FlowMapDiT`.
        scheduler: FlowMapEulerDiscreteScheduler with shift 1.
        vae: the VAE of the latents; None if samples are images.
        id2label: names of the classes by label.
        steps: the default number of steps.
        sampling: the recommended sampler for each number of steps, such as {"2": "mix?s1=0.6"}; the sampler of the
            default number serves all others.
    """

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict[str, str] | None = None,
        steps: int = 2,
        sampling: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label)
        self._set_up(steps, sampling)

    @property
    def labels(self) -> dict[str, int]:
        """The label of each name. A name such as "tench, Tinca tinca" also counts for each of its parts."""
        names = {name: int(label) for label, name in (self.config.id2label or {}).items()}
        parts = {part.strip(): label for name, label in names.items() for part in name.split(",")}
        return parts | names

    def get_label_ids(self, names: str | int | Sequence[str | int]) -> list[int]:
        """Return the labels of classes, given by name or number.

        Raises:
            ValueError: if a class does not exist. The null class has the number of classes as its label.
        """
        found = []
        for name in [names] if isinstance(names, str | int) else names:
            label = self.labels.get(name) if isinstance(name, str) else int(name)
            if label is None or not 0 <= label <= self.transformer.config.num_classes:
                known = ", ".join(self.labels) or "none has a name"
                raise ValueError(f"classes are 0 to {self.transformer.config.num_classes - 1} ({known}): got {name!r}")
            found.append(label)
        return found

    @with_options
    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | Sequence[str | int],
        num_inference_steps: int | None = None,
        sampler: str | None = None,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images of classes.

        Args:
            class_labels: numbers or names of classes.
            num_inference_steps: evaluations of the transformer; None for the recommended number.
            sampler: "mix", "euler", "consistency" or "flow_map", with options as in "mix?s1=0.6"; None: recommended.
            options: further arguments of `_generate`: num_images_per_prompt, generator, latents, output_type,
                return_dict, callback_on_step_end.
        """
        labels = torch.tensor(self.get_label_ids(class_labels))
        shape = self.transformer.sample_shape
        return self._generate({"class_labels": labels}, shape, num_inference_steps, sampler, **options)
