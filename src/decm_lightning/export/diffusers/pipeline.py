"""The base class of the pipelines: sampling, decoding, and folders that contain their code."""

import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FlowMatchLCMScheduler, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from decm_lightning.samplers.consistency import consistency_times
from decm_lightning.samplers.euler import euler_times
from decm_lightning.samplers.mix import mix_times
from decm_lightning.samplers.options import read_options
from decm_lightning.seeds import generator_of

INDEX = "model_index.json"
TIMES: dict[str, Callable[..., list[float]]] = {
    "consistency": consistency_times,
    "euler": euler_times,
    "flow_map": euler_times,
    "mix": mix_times,
}
"""The samplers, with the function that returns the times between their steps."""
Generator = torch.Generator | list[torch.Generator] | None
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None


class FlowMapPipeline(DiffusionPipeline):
    """Generates images with a flow map u(x_t, t, s), without guidance.

    Subclasses encode the condition and call `_generate`. Their constructors call `_set_up`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def _set_up(self, steps: int, sampling: dict[str, str] | None) -> None:
        """Store the default number of steps, and the recommended sampler for each number of steps."""
        self.register_to_config(steps=steps, sampling={str(steps): "mix"} | (sampling or {}))
        self.image_processor = VaeImageProcessor()

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the last call."""
        return self._num_timesteps

    @staticmethod
    def generators(seed: int, rows: Sequence[int]) -> list[torch.Generator]:
        """Return the generators of the images of a seed with the numbers `rows`, as in `decm sample`."""
        return [generator_of(seed, row) for row in rows]

    def _generate(
        self,
        condition: dict[str, Tensor | None],
        shape: Sequence[int],
        num_inference_steps: int | None = None,
        sampler: str | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            condition: arguments of the transformer, with one row for each label or caption; None is left out.
            shape: the shape of a sample, (c, h, w).
            num_inference_steps: evaluations of the transformer; None for the recommended number.
            sampler: "mix", "euler", "consistency" or "flow_map", with options as in "mix?s1=0.6"; None: recommended.
            num_images_per_prompt: images for each label or caption, next to each other.
            generator: the source of all noise, one or one per image; `generators` returns those of `decm sample`.
            latents: the initial noise, (images, c, h, w).
            output_type: "pil", "np", "pt", or "latent" for the samples without decoding.
            return_dict: return an ImagePipelineOutput instead of a tuple.
            callback_on_step_end: called after each step with (pipeline, step, timestep, {"latents": latents}). The
                latents that it returns replace those of the step.
            callback_on_step_end_tensor_inputs: the names of the callback's tensors, only "latents".
        """
        inputs = callback_on_step_end_tensor_inputs
        if unknown := [name for name in inputs if name not in self._callback_tensor_inputs]:
            raise ValueError(f"callback inputs must be among {', '.join(self._callback_tensor_inputs)}: got {unknown}")
        device, dtype = self._execution_device, self.transformer.dtype
        given = {name: part.to(device) for name, part in condition.items() if part is not None}
        cast = {name: part.to(dtype) if part.is_floating_point() else part for name, part in given.items()}
        rows = {name: part.repeat_interleave(num_images_per_prompt, 0) for name, part in cast.items()}
        latents = self._noise((len(next(iter(rows.values()))), *shape), generator, latents).to(device, dtype)
        steps = self._num_timesteps = self.config.steps if num_inference_steps is None else num_inference_steps
        name, scheduler = self._schedule(sampler, steps, device)
        timesteps = [*scheduler.timesteps, torch.zeros_like(scheduler.timesteps[0])]
        options = {"generator": generator} if isinstance(scheduler, FlowMatchLCMScheduler) else {}
        with self.progress_bar(total=steps) as bar:
            for step, timestep in enumerate(timesteps[:-1]):
                end = timesteps[_end(name, step, steps)]
                output = self.transformer(latents, timestep, end, **rows, return_dict=False)[0]
                latents = scheduler.step(output, timestep, latents, **options, return_dict=False)[0]
                if callback_on_step_end is not None:
                    passed = dict.fromkeys(inputs, latents)
                    latents = callback_on_step_end(self, step, timestep, passed).get("latents", latents)
                bar.update()
        images = self.image_processor.postprocess(self._decode(latents, output_type), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(self, shape: Sequence[int], generator: Generator, latents: Tensor | None) -> Tensor:
        if latents is None:
            # In float32, so that a narrower pipeline gets the same noise.
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}: got {tuple(latents.shape)}")
        return latents

    def _schedule(self, sampler: str | None, steps: int, device: torch.device) -> tuple[str, Any]:
        """Return the name of a sampler, and a scheduler with its timesteps."""
        scheduler: Any = self.scheduler
        recommended: dict[str, str] = self.config.sampling
        default = recommended[str(self.config.steps)].partition("?")[0]
        if isinstance(scheduler, FlowMatchLCMScheduler):
            sampler = sampler or "consistency"
        sampler = sampler or recommended.get(str(steps), default)
        name, _, options = sampler.partition("?")
        if name not in TIMES:
            raise ValueError(f"sampler must be one of {', '.join(TIMES)}: got {sampler!r}")
        if name == "consistency":
            if not isinstance(scheduler, FlowMatchLCMScheduler):
                scheduler = FlowMatchLCMScheduler(shift=1.0)
        elif isinstance(scheduler, FlowMatchLCMScheduler):
            raise ValueError(f"FlowMatchLCMScheduler only serves the sampler consistency: got {sampler!r}")
        times = [0.0, *TIMES[name](steps, **read_options(options, sampler))]
        scheduler.set_timesteps(sigmas=[1 - time for time in times], device=device)
        return name, scheduler

    def _decode(self, latents: Tensor, output_type: str) -> Tensor:
        """Return the images of latents, unless the latents are requested or are images."""
        if output_type == "latent" or self.vae is None:
            return latents
        config = self.vae.config
        z = latents.to(self.vae.dtype) / (config.get("scaling_factor") or 1.0)
        if config.get("latents_mean"):
            mean, std = (z.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
            z = z * std + mean
        return self.vae.decode(z + (config.get("shift_factor") or 0.0), return_dict=False)[0]

    def save_config(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write model_index.json and the code that it refers to, so that a saved pipeline loads without this one."""
        super().save_config(save_directory, **kwargs)
        index = Path(save_directory, INDEX)
        content = json.loads(index.read_text(encoding="utf-8"))
        transformer = getattr(self.transformer, "_orig_mod", self.transformer)
        for key, folder, part in (("_class_name", ".", self), ("transformer", "transformer", transformer)):
            module = sys.modules[type(part).__module__]
            if (code := getattr(module, "SOURCE", None)) is not None:
                name = module.__name__.rpartition(".")[2]
                (index.parent / folder / f"{name}.py").write_text(code, encoding="utf-8")
                content[key] = [name, type(part).__name__]
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the config of a folder. Its code is replaced by the modules next to this class, already trusted."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config["_class_name"], list) and config["_class_name"][1] == cls.__name__:
            library, name = config["transformer"]
            module = import_module(f"{cls.__module__.rpartition('.')[0]}.{library}")
            config |= {"_class_name": cls.__name__, "transformer": [module.__name__, name]}
        return loaded


def with_options(call: Callable[..., Any]) -> Callable[..., Any]:
    """Show the options of `_generate` in the signature of `__call__`, which passes them on as **options."""
    own, options = signature(call), signature(FlowMapPipeline._generate).parameters.values()
    named = [part for part in own.parameters.values() if part.kind is not part.VAR_KEYWORD]
    more = [part for part in options if part.default is not part.empty and part.name not in own.parameters]
    shown = own.replace(parameters=[*named, *(part.replace(kind=part.KEYWORD_ONLY) for part in more)])
    call.__signature__ = shown  # type: ignore[attr-defined]
    return call


def _end(sampler: str, step: int, steps: int) -> int:
    """Return the number of the timestep at which the network's mean velocity of a step ends.

    Euler steps use the instantaneous velocity, consistency jumps end at the data, and flow-map jumps at the next time.
    Mix is Euler between two jumps.
    """
    if sampler == "consistency":
        return steps
    return step + 1 if sampler == "flow_map" or (sampler == "mix" and step in (0, steps - 1)) else step
