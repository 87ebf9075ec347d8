"""Prompt scores with tiny random models of the real classes."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from decm_lightning.metrics import BLIPScore, CLIPScore, FeatureMetrics
from decm_lightning.metrics.metric import Prompts
from tests.metrics.networks import uint8_images

PROMPTS = ["a red heart", "a cat", "cat", "heart a red heart a cat"]
LENGTH = 6
LETTERS = "acdehrt"
MERGES = ["r e", "re d</w>", "h e", "he a", "hea r", "hear t</w>", "c a", "ca t</w>"]
CLIP_WORDS = ["<|startoftext|>", "<|endoftext|>", "a</w>", "red</w>", "heart</w>", "cat</w>", *LETTERS]
CLIP_WORDS += [*(f"{letter}</w>" for letter in LETTERS), "re", "he", "hea", "hear", "ca"]
BLIP_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "heart", "cat"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A CLIPModel with random weights and its processor, written by save_pretrained."""
    folder = tmp_path_factory.mktemp("clip")
    text = SIZES | {"vocab_size": 40, "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": 1}
    vision = SIZES | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, initializer_factor=20.0)
    transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(CLIP_WORDS)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    # Only newer transformers have this name for the processor without torchvision.
    kind = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    images = getattr(transformers, kind)(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_convert_rgb=True
    )
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> str:
    """A BlipForImageTextRetrieval with random weights and its processor, written by save_pretrained."""
    folder = tmp_path_factory.mktemp("blip")
    text = SIZES | {"vocab_size": 9, "max_position_embeddings": LENGTH, "encoder_hidden_size": 16}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "initializer_range": 0.5}
    vision = SIZES | {"image_size": 16, "patch_size": 8, "initializer_range": 0.5}
    torch.manual_seed(0)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=8)
    model = transformers.BlipForImageTextRetrieval(config)
    for part in (model.vision_proj, model.text_proj):
        torch.nn.init.normal_(part.weight)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(BLIP_WORDS))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    # Older versions of transformers have one processor of images.
    processor = getattr(transformers, "BlipImageProcessorPil", None) or transformers.BlipImageProcessor
    images = processor(size={"height": 16, "width": 16})
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def clip_cosine(folder: str, image: Image.Image, prompt: str) -> float:
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=[prompt], images=[image], return_tensors="pt", truncation=True, max_length=LENGTH)
    with torch.no_grad():
        return (model(**inputs).logits_per_image / model.logit_scale.exp()).item()


def blip_cosine(folder: str, image: Image.Image, prompt: str) -> float:
    model = transformers.BlipForImageTextRetrieval.from_pretrained(folder).eval()
    processor = transformers.BlipProcessor.from_pretrained(folder)
    inputs = processor(text=[prompt], images=[image], return_tensors="pt", truncation=True, max_length=LENGTH)
    with torch.no_grad():
        return model(**inputs, use_itm_head=False).itm_score.item()


SCORERS = [(CLIPScore, "clip", clip_cosine, 100), (BLIPScore, "blip", blip_cosine, 1)]


def generated(scorer, images: Tensor, prompts: list[str]) -> FeatureMetrics:
    metrics = FeatureMetrics(scorer)
    metrics.update(images, real=False, prompts=Prompts(texts=prompts))
    return metrics


@pytest.mark.parametrize(("scorer", "name", "cosine", "scale"), SCORERS)
def test_the_score_is_the_mean_of_the_models_own_cosines(scorer, name, cosine, scale, generator, request):
    """The model's forward is called for one pair at a time, ours with a batch of prompts of different lengths."""
    folder = request.getfixturevalue(name)
    images = uint8_images(4, 20, generator)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    cosines = torch.tensor([cosine(folder, *pair) for pair in zip(pictures, PROMPTS, strict=True)]).double()
    assert cosines.std() > 0.02
    metrics = generated(scorer(folder), images[:1], PROMPTS[:1])
    metrics.update(images[1:], real=False, prompts=Prompts(texts=PROMPTS[1:]))
    metrics.update(images, real=True)
    column = f"{name}_score"
    assert metrics.columns == [column]
    assert metrics.compute()[column] / scale == pytest.approx(cosines.mean().item(), abs=1e-6)
    metrics.reset_generated()
    metrics.update(images[:2], real=False, prompts=Prompts(texts=PROMPTS[:2]))
    assert metrics.compute()[column] / scale == pytest.approx(cosines[:2].mean().item(), abs=1e-6)
    assert folder in metrics.describe()[column]


@pytest.mark.parametrize(("scorer", "name", "cosine", "scale"), SCORERS)
def test_batches_that_are_scored_in_parts_add_up(scorer, name, cosine, scale, generator, request, monkeypatch):
    scorer = scorer(request.getfixturevalue(name))
    images = uint8_images(4, 20, generator)
    whole = generated(scorer, images, PROMPTS).compute()
    monkeypatch.setattr("decm_lightning.metrics.prompt_scores.AT_ONCE", 3)
    assert generated(scorer, images, PROMPTS).compute() == pytest.approx(whole, abs=1e-6 * scale)


def test_grey_images_are_scored_as_three_equal_channels(clip, generator):
    grey = uint8_images(2, 20, generator, channels=1)
    values = [
        generated(CLIPScore(clip), images, PROMPTS[:2]).compute() for images in (grey, grey.expand(-1, 3, -1, -1))
    ]
    assert values[0] == values[1]


def test_without_weights_it_is_left_out_with_the_reason(tmp_path, caplog):
    metrics = FeatureMetrics(CLIPScore(str(tmp_path)))
    assert metrics.columns == []
    reason = metrics.unavailable["clip_score"]
    assert reason.startswith(f"no CLIPModel and CLIPProcessor at {tmp_path}: ")
    assert f"clip_score is not measured: {reason}" in caplog.text
    metrics.update(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), real=False)
    assert metrics.compute() == {}


def test_a_model_that_fails_at_its_first_score_is_left_out(clip, blip, generator):
    """The failure is reported before anything is measured; here the folder contains a model of another class."""
    for scorer, folder in ((BLIPScore(clip), clip), (CLIPScore(blip), blip)):
        metrics = generated(scorer, uint8_images(2, 5, generator), ["a", "b"])
        assert folder in metrics.unavailable[scorer.column]
        assert "\n" not in metrics.unavailable[scorer.column]
        assert metrics.compute() == {}


def test_weights_that_are_missing_are_not_drawn_at_random(blip, tmp_path):
    """BLIP's captioning checkpoint, for example, lacks the projections for retrieval."""
    shutil.copytree(blip, tmp_path / "part")
    state = load_file(tmp_path / "part" / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith("vision_proj")}
    save_file(kept, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    reason = FeatureMetrics(BLIPScore(str(tmp_path / "part"))).unavailable["blip_score"]
    assert "it lacks vision_proj.bias, vision_proj.weight" in reason


def test_a_damaged_file_is_left_out(clip, tmp_path):
    for file in ("config.json", "model.safetensors"):
        damaged = tmp_path / file
        damaged.mkdir()
        for source in sorted(Path(clip).iterdir()):
            content = source.read_bytes()
            (damaged / source.name).write_bytes(content[: len(content) // 2] if source.name == file else content)
        metrics = FeatureMetrics(CLIPScore(str(damaged)))
        assert str(damaged) in metrics.unavailable["clip_score"]


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for scorer in (CLIPScore(), BLIPScore()):
        assert "the extra 'text'" in FeatureMetrics(scorer).unavailable[scorer.column]


def test_training_does_not_load_it():
    assert FeatureMetrics(CLIPScore("nowhere"), validation=True).unavailable == {}


def test_prompts_in_words_are_needed(clip):
    metrics = FeatureMetrics(CLIPScore(clip))
    with pytest.raises(ValueError, match=r"clip_score .*demo\.Emoji"):
        metrics.update(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), real=False)


def test_the_page_on_other_scorers_reads_the_folder_of_prompts(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "prompt-scores.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for number, prompt in enumerate(PROMPTS):
        folder = tmp_path / "samples" / f"{number:05d}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
        for image in (1, 0):
            (folder / "samples" / f"{image:04d}.png").touch()
    (tmp_path / "samples" / "settings.json").touch()
    names: dict = {}
    exec(code, names)
    files = [[f"samples/{number:05d}/samples/{image:04d}.png" for image in (0, 1)] for number in range(len(PROMPTS))]
    assert names["pairs"] == list(zip(PROMPTS, files, strict=True))
