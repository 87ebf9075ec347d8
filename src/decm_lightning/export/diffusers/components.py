"""Build the pipelines of diffusers from networks of this package."""

from typing import Any

import torch
from diffusers import FlowMapEulerDiscreteScheduler
from torch import Tensor, nn

from decm_lightning.autoencoders.of_network import coder_of
from decm_lightning.export.diffusers.flow_map_class_pipeline import FlowMapClassPipeline
from decm_lightning.export.diffusers.flow_map_dit import FlowMapDiT
from decm_lightning.export.diffusers.pipeline import TIMES, FlowMapPipeline
from decm_lightning.networks import DiT, Network, TextDiT
from decm_lightning.networks.hub import cache_without_network
from decm_lightning.networks.record import Record
from decm_lightning.teachers.diffusers_network import DiffusersNetwork
from decm_lightning.text import TextEncoder


def class_pipeline(network: DiT, dtype: torch.dtype, vae: str | None, latents: str | None) -> FlowMapPipeline:
    """Return the pipeline of a class-conditional network."""
    if network.prediction == "noise":
        raise ValueError("the network predicts noise: only networks that predict a velocity can be exported")
    names = _record(network).class_names
    return FlowMapClassPipeline(
        _around(FlowMapDiT, network, dtype),
        FlowMapEulerDiscreteScheduler(shift=1.0),
        _vae(network, vae, latents),
        {str(label): name for label, name in enumerate(names)} or None,
        *_sampling(network),
    )


def text_pipeline(
    network: TextDiT, dtype: torch.dtype, vae: str | None, latents: str | None, encoder: str | None
) -> FlowMapPipeline:
    """Return the pipeline of a caption-conditional network, with its text encoder and tokenizer."""
    # Imported here: they need transformers.
    from decm_lightning.export.diffusers.flow_map_text_dit import FlowMapTextDiT
    from decm_lightning.export.diffusers.flow_map_text_pipeline import FlowMapTextPipeline

    text_encoder = _encoder(network, encoder)
    model, tokenizer = text_encoder.loaded
    return FlowMapTextPipeline(
        _around(FlowMapTextDiT, network, dtype),
        FlowMapEulerDiscreteScheduler(shift=1.0),
        model,
        tokenizer,
        _vae(network, vae, latents),
        text_encoder.max_tokens,
        *_sampling(network),
    )


def sd3_pipeline(network: DiffusersNetwork, dtype: torch.dtype) -> FlowMapPipeline:
    """Return the pipeline of a student of Stable Diffusion 3, with the parts of the pipeline it was distilled from."""
    from diffusers import StableDiffusion3Pipeline

    from decm_lightning.export.diffusers.flow_map_sd3 import FlowMapSD3
    from decm_lightning.export.diffusers.flow_map_sd3_pipeline import FlowMapSD3Pipeline

    model = network.config["model"]
    if network.kind != "SD3Transformer2DModel":
        raise ValueError(f"--to diffusers writes students of SD3Transformer2DModel: got {network.kind}")
    if not network.reads_end_time:
        raise ValueError(f"{model} is not a student: diffusers loads it as it is")
    with cache_without_network(model):
        parts = StableDiffusion3Pipeline.from_pretrained(model, transformer=None).components
    steps, sampling = _sampling(network)
    settings = {name: value for name, value in network.model.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        transformer = FlowMapSD3(**settings | {"sample_size": network.sample_shape[-1]})
    transformer.load_state_dict(_merged(network.model), assign=True)
    return FlowMapSD3Pipeline(
        **{name: part for name, part in parts.items() if name.startswith(("vae", "text_encoder", "tokenizer"))},
        transformer=transformer.to(dtype).eval(),
        scheduler=FlowMapEulerDiscreteScheduler(shift=1.0),
        steps=steps,
        sampling=sampling,
    )


def _around(cls: Any, network: Network, dtype: torch.dtype) -> Any:
    """Return the diffusers model of a network, which shares its weights."""
    with torch.device("meta"):
        transformer = cls(**network.config)
    transformer.network = network.to(dtype).eval()
    return transformer


def _merged(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model with its LoRA adapters merged in float32 or wider: W + B A."""
    from peft.tuners.lora import LoraLayer

    own = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    merged = {name.replace(".base_layer.", "."): tensor for name, tensor in own.items()}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            delta = module.get_delta_weight("default")
            merged[f"{name}.weight"] = merged[f"{name}.weight"].to(delta.dtype) + delta
    return merged


def _record(network: Network) -> Record:
    return network.record or Record()


def _sampling(network: Network) -> tuple[int, dict[str, str]]:
    """Return the default number of steps, and the recommended sampler for each number of steps."""
    if not network.reads_end_time:
        return 50, {"50": "euler"}
    recommended = {
        str(steps): name for steps, name in _record(network).sampling.items() if name.partition("?")[0] in TIMES
    }
    return 2, {"2": "mix"} | recommended


def _vae(network: Network, vae: str | None, latents: str | None) -> Any:
    """Return the VAE of a network's latents, with their normalization in its config; None if samples are images."""
    coder, channels = coder_of(network, vae, latents), network.sample_shape[0]
    if coder is None:
        return None
    model = coder.autoencoder.model
    if latents or _record(network).latents:
        scaling = coder.normalization
        mean, std = (values.expand(1, channels, 1, 1).flatten().tolist() for values in (scaling.mean, scaling.std))
        model.register_to_config(
            latents_mean=mean, latents_std=std, scaling_factor=scaling.multiplier, shift_factor=None
        )
    return model


def _encoder(network: TextDiT, name: str | None) -> TextEncoder:
    """Return the text encoder of a network."""
    encoder = network.caption_encoder(name)
    assert isinstance(encoder, TextEncoder)
    encoder.to("cpu")
    if (width := encoder(["a"]).tokens.shape[-1]) != network.caption_width:
        found = f"those of {encoder.name} have {width}"
        raise ValueError(f"the network reads tokens of size {network.caption_width}, but {found}")
    return encoder
