"""Captions encoded by the text encoders of diffusers pipelines, on tiny random instances of the real classes."""

import inspect

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from torch import Tensor, nn

from decm_lightning.guidance import Guidance, GuidedField
from decm_lightning.teachers import DiffusersPrompts, DiffusersTeacher
from decm_lightning.types import Captions
from tests.teachers.pipelines import flux, pixart, sana, sd3

PROMPTS = ["a red cat", "a dog", ""]
BLOCKS = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
FAMILIES = {"sd3": sd3, "flux": flux, "sana": sana, "pixart": pixart}


@pytest.fixture(params=FAMILIES)
def case(request, tmp_path):
    """A family's name, a pipeline, and its folder."""
    torch.manual_seed(0)
    pipeline = FAMILIES[request.param]()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipeline.save_pretrained(tmp_path)
    return request.param, pipeline, str(tmp_path)


class HandedError(Exception):
    """The arguments that a pipeline passes to its transformer."""


def handed(pipeline, prompt: str) -> dict[str, Tensor]:
    """Return these arguments for a prompt by interrupting the pipeline; with guidance, the empty prompt comes first."""

    def stop(module, args, kwargs):
        raise HandedError(kwargs)

    hook = pipeline.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    options = {"clean_caption": False, "use_resolution_binning": False, "guidance_scale": 4.0, "max_sequence_length": 6}
    known = inspect.signature(type(pipeline).__call__).parameters
    options = {name: value for name, value in options.items() if name in known}
    try:
        pipeline(prompt, height=32, width=32, num_inference_steps=1, **options)
    except HandedError as caught:
        return caught.args[0]
    finally:
        hook.remove()


def test_captions_are_what_the_pipeline_hands_to_its_transformer(case):
    """This holds for each prompt and for the empty prompt of guidance."""
    name, pipeline, folder = case
    prompts = DiffusersPrompts(folder, max_tokens=6)
    captions, empty = prompts(PROMPTS), prompts.empty()
    second = "encoder_attention_mask" if name in ("sana", "pixart") else "pooled_projections"
    for row, prompt in enumerate(PROMPTS):
        expected = handed(pipeline, prompt)
        found = {"encoder_hidden_states": captions.tokens[row]}
        found[second] = (captions.pooled if captions.mask is None else captions.mask)[row]
        for key, value in found.items():
            torch.testing.assert_close(value.float(), expected[key][-1].float(), rtol=0, atol=1e-5)
        if name != "flux":
            other = empty.pooled if empty.mask is None else empty.mask
            torch.testing.assert_close(empty.tokens[0], expected["encoder_hidden_states"][0], rtol=0, atol=1e-5)
            torch.testing.assert_close(other[0].float(), expected[second][0].float(), rtol=0, atol=1e-5)
    assert (captions.tokens[0] - captions.tokens[1]).abs().max() > 1e-3
    assert (captions.mask is None) == (name in ("sd3", "flux"))
    assert (captions.pooled is None) != (captions.mask is None)


def test_guided_velocity_has_the_empty_prompt_of_the_pipeline(case):
    """It is encoded once, when it is first needed, and the encoders are released."""
    _, _, folder = case
    teacher = DiffusersTeacher(folder, lora_rank=2, latent_size=4, max_tokens=6)
    captions = DiffusersPrompts(folder, max_tokens=6)(PROMPTS)
    x_t, t = torch.randn(3, 4, 4, 4), torch.tensor([0.2, 0.5, 0.9])
    assert "empty" not in teacher.__dict__
    null = teacher.null(captions)
    assert "pipeline" not in teacher.prompts.__dict__
    one = DiffusersPrompts(folder, max_tokens=6).empty()
    empty = Captions(*(None if part is None else torch.cat([part] * 3) for part in one))
    for part, expected in zip(null, empty, strict=True):
        assert expected is part is None or torch.equal(part, expected)
    guided = GuidedField(teacher, teacher.null, Guidance(3.0))(x_t, t, captions)
    v, v_null = teacher(x_t, t, captions), teacher(x_t, t, empty)
    assert (v - v_null).abs().max() > 1e-5
    torch.testing.assert_close(guided, 3 * v - 2 * v_null, rtol=0, atol=1e-5)


def test_captions_that_do_not_fit_the_empty_prompt_are_refused(case):
    _, _, folder = case
    teacher = DiffusersTeacher(folder, lora_rank=2, latent_size=4, max_tokens=6)
    captions = DiffusersPrompts(folder, max_tokens=4)(PROMPTS)
    with pytest.raises(ValueError, match=r"empty prompt .*got \d+ and \d+, .*max_tokens"):
        teacher.null(captions)
    if captions.mask is not None:
        with pytest.raises(ValueError, match="captions must have one too"):
            teacher.null(DiffusersPrompts(folder, max_tokens=6)(PROMPTS)._replace(mask=None))
    assert teacher.null(None) is None


def test_a_folder_without_encoders_is_refused(case, tmp_path):
    _, pipeline, _ = case
    pipeline.transformer.save_pretrained(tmp_path / "alone")
    teacher = DiffusersTeacher(str(tmp_path / "alone"), lora_rank=2)
    captions = DiffusersPrompts(case[2], max_tokens=6)(PROMPTS)
    with pytest.raises(ValueError, match=r"model_index.json"):
        teacher.null(captions)


def test_other_pipelines_and_lengths_are_refused(tmp_path):
    DDPMPipeline(UNet2DModel(8, block_out_channels=(32,), **BLOCKS), DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a DDPMPipeline: .*StableDiffusion3, Flux, Sana, PixArt"):
        DiffusersPrompts(str(tmp_path))(["a cat"])
    with pytest.raises(ValueError, match=r"max_tokens.*got 0"):
        DiffusersPrompts(str(tmp_path), max_tokens=0)
