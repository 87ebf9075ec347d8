"""Scores against prompts: CLIP's on a tiny model of the real classes, and what the others say without their library."""

import builtins
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image

from decm_lightning.metrics import CLIP, HPS, BLIPScore, ImageReward, Quality
from decm_lightning.metrics.feature_metrics import Prompts
from decm_lightning.metrics.prompt_scores import _MeanScore
from tests.metrics.networks import uint8_images

PROMPTS = ["a red heart", "a cat", "cat", "heart a red heart a cat"]
WORDS = ["<|startoftext|>", "<|endoftext|>", "a</w>", "red</w>", "heart</w>", "cat</w>", *"acdehrt"]
MERGES = ["r e", "re d</w>", "h e", "he a", "hea r", "hear t</w>", "c a", "ca t</w>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIPModel with random weights, and its processor, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("clip")
    text = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 6, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, initializer_factor=20.0)
    transformers.CLIPModel(config).save_pretrained(folder)
    words = [*WORDS, *(f"{letter}</w>" for letter in "acdehrt"), "re", "he", "hea", "hear", "ca"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    # The one without torchvision has this name in newer transformers only.
    kind = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    images = getattr(transformers, kind)(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_convert_rgb=True
    )
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def independent(folder, images, prompts) -> float:
    """100 max(mean cos, 0) through PIL's pictures, one pair at a time, and the model's own logits."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    cosines = []
    for image, prompt in zip(images, prompts, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        given = processor(text=[prompt], images=[picture], return_tensors="pt", truncation=True, max_length=6)
        with torch.no_grad():
            cosines.append((model(**given).logits_per_image / model.logit_scale.exp()).item())
    assert max(cosines) - min(cosines) > 0.05
    return 100 * max(sum(cosines) / len(cosines), 0)


def test_clip_score_is_a_hundred_times_the_mean_cosine(folder, generator):
    images = uint8_images(4, 20, generator)
    prompts = PROMPTS
    expected = independent(folder, images, prompts)
    if not expected:
        # A random model may find all pairs unlike: then measure what is no constant.
        prompts = PROMPTS[::-1]
        expected = independent(folder, images, prompts)
    quality = Quality(CLIP(folder))
    quality.real(images)
    quality.generated(images[:1], Prompts(texts=prompts[:1]))
    quality.generated(images[1:], Prompts(texts=prompts[1:]))
    assert quality.compute() == pytest.approx({"clip_score": expected}, abs=1e-3)
    quality.reset_generated()
    quality.generated(images[:2], Prompts(texts=prompts[:2]))
    assert quality.compute()["clip_score"] == pytest.approx(independent(folder, images[:2], prompts[:2]), abs=1e-3)
    assert quality.notes() == {"clip_score": f"100 cos, between image and prompt, CLIP score by {folder}"}


def test_grey_images_are_scored_as_three_equal_channels(folder, generator):
    grey = uint8_images(2, 20, generator, channels=1)
    values = []
    for images in (grey, grey.expand(-1, 3, -1, -1)):
        quality = Quality(CLIP(folder))
        quality.generated(images, Prompts(texts=PROMPTS[:2]))
        values.append(quality.compute()["clip_score"])
    assert values[0] == values[1]


def test_without_weights_it_is_left_out_with_the_reason(tmp_path, caplog):
    quality = Quality(CLIP(str(tmp_path)))
    assert quality.columns == []
    reason = f"no CLIP at {tmp_path}: give a folder with CLIPModel and CLIPProcessor, or a name on the Hugging Face hub"
    assert quality.left_out == {"clip_score": reason}
    assert f"clip_score is not measured: {reason}" in caplog.text
    quality.generated(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    assert quality.compute() == {}


def test_training_does_not_load_it():
    assert Quality(CLIP("nowhere"), cheap=True).left_out == {}


def test_prompts_in_words_are_needed(folder):
    quality = Quality(CLIP(folder))
    with pytest.raises(ValueError, match=r"clip_score needs prompts in words: .* such as data\.Emoji"):
        quality.generated(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("scorer", "column", "library"),
    [
        (ImageReward(), "image_reward", "image-reward"),
        (BLIPScore(), "blip_score", "image-reward"),
        (HPS(), "hps", "hpsv2"),
    ],
)
def test_a_library_that_is_not_there_is_named(scorer, column, library, monkeypatch):
    """Only this: the libraries bring torchvision along and fetch weights of gigabytes."""
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name in ("ImageReward", "hpsv2"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    quality = Quality(scorer)
    assert f"pip install {library}" in quality.left_out[column]
    assert not quality.columns


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("cannot reach\nthe weights"), "cannot reach the weights"),
        (KeyError("visual"), "HPS v2.1 does not work: KeyError('visual')"),
    ],
)
def test_a_library_that_fails_at_its_first_score_is_left_out(error, reason, monkeypatch, generator):
    """Before anything is measured: hpsv2 loads its weights no sooner."""

    def score(*args, **kwargs):
        raise error

    monkeypatch.setitem(sys.modules, "hpsv2", SimpleNamespace(score=score))
    quality = Quality(HPS())
    assert quality.left_out == {"hps": reason}
    quality.generated(uint8_images(2, 5, generator), Prompts(texts=["a", "b"]))
    assert quality.compute() == {}


def test_the_image_that_is_scored_at_loading_does_not_count(monkeypatch, generator):
    library = SimpleNamespace(score=lambda files, prompt, hps_version: [float(len(prompt))])
    monkeypatch.setitem(sys.modules, "hpsv2", library)
    quality = Quality(HPS())
    quality.generated(uint8_images(2, 5, generator), Prompts(texts=["abc", "abcde"]))
    assert quality.compute() == {"hps": 4}


def test_each_image_reaches_a_library_as_a_file_with_its_own_prompt(generator):
    images = uint8_images(3, 5, generator)
    seen = []

    def score(file: str, prompt: str) -> float:
        seen.append((torch.tensor(list(Image.open(file).tobytes())).view(5, 5, 3).permute(2, 0, 1), prompt))
        return float(len(prompt))

    mean = _MeanScore(score)
    mean.update(images, ["a", "bc", "def"])
    assert mean.compute().item() == 2
    assert [prompt for _, prompt in seen] == ["a", "bc", "def"]
    assert all(torch.equal(file, image.long()) for (file, _), image in zip(seen, images, strict=True))
