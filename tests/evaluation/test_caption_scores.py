"""Caption scores in a test run: their columns, their entries in the protocol, and scores that cannot be measured."""

import json

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from decm_lightning import Distiller
from decm_lightning.data import Digits
from decm_lightning.data.pairs.captioned_images import CaptionedImages
from decm_lightning.demo import CaptionProbe, DigitsFeatures
from decm_lightning.demo.caption_probe import embedding
from decm_lightning.evaluation.evaluation import Evaluation
from decm_lightning.evaluation.generator import SampleGenerator
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.image_writer import to_uint8
from decm_lightning.metrics import CLIPScore, FeatureNetwork
from decm_lightning.networks import DiT, TextDiT
from decm_lightning.teachers import Teacher
from decm_lightning.text import EncodedCaptions

SPEC = "student/mix/2"


class Means(FeatureNetwork):
    name = "means"
    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images.float(), 4).flatten(1)


class Colours(CaptionedImages):
    """60 noisy images whose quarters have the colors of the captions' two tokens."""

    def __init__(self):
        super().__init__(8, 0.3, None, 0)

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(120, 6, generator=generator).half()
        captions = EncodedCaptions(tokens, torch.arange(2, 121, 2), torch.arange(60))
        colours = embedding(captions.read(range(60))) @ torch.randn(6, 12, generator=generator)
        images = nn.functional.interpolate(colours.view(60, 3, 2, 2), scale_factor=4)
        images = 127 + 50 * images + 30 * torch.randn(60, 3, 8, 8, generator=generator)
        names = [f"image {row}" for row in range(60)]
        self.split(images.clamp(0, 255).to(torch.uint8), captions, names, names)


def distiller(network) -> Distiller:
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return Distiller(Teacher(network))


def measured(folder, module, data, *features: nn.Module) -> dict:
    callback = Evaluation(list(features), specs=[SPEC], samples=30, batch_size=10)
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(module, datamodule=data, verbose=False)
    return json.loads((folder / "quality.json").read_text())


def digits() -> DiT:
    return DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)


def test_caption_accuracy_is_a_column_with_chance_and_the_share_of_real_images(tmp_path):
    """The probe is fitted again to the training pairs and applied to the spec's samples."""
    L.seed_everything(0, verbose=False)
    data = Colours()
    module = distiller(TextDiT(8, 3, 6, patch_size=4, width=48, depth=1, heads=2))
    written = measured(tmp_path, module, data, CaptionProbe(Means()), Means())
    assert written["metric"] == "Fréchet distance on means and caption accuracy by a ridge probe of means"

    generator = SampleGenerator(module, data)
    probe = CaptionProbe(Means())
    probe.prepare(data, generator.read)
    held = len(data.reference)
    assert 5 < held < 30
    images = torch.cat(
        [generator.generate(SamplingSpec.parse(SPEC), rows) for rows in (range(8), range(8, 16), range(16, 30))]
    )
    ranks = probe.ranks(probe(images), embedding(data.condition(range(30))))
    for k in (1, 5):
        assert written["rows"][0][f"caption_top{k}"] == pytest.approx((ranks < k).float().mean().item())

    real = data.reference.__getitems__(range(held))
    ranks = probe.ranks(probe(to_uint8(real.x_1)), embedding(real.condition))
    shares = [(ranks < k).double().mean().item() for k in (1, 5)]
    assert shares[0] > 3 / held
    upper = " and ".join(f"{share:.3g}" for share in shares)
    said = written["protocol"]["caption_top1, caption_top5"]
    assert f"{held} held-out captions, chance {1 / held:.3g} and {5 / held:.3g}, real images {upper}" in said


def test_a_score_that_cannot_be_loaded_is_said_and_the_rest_is_measured(tmp_path):
    scorer = CLIPScore(str(tmp_path))
    written = measured(tmp_path, distiller(digits()), Digits(reference_size=20), DigitsFeatures(), scorer)
    assert written["protocol"]["clip_score"].startswith(
        f"not measured: no CLIPModel and CLIPProcessor at {tmp_path}: pass a folder"
    )
    assert "fd" in written["rows"][0]
    assert "clip_score" not in written["rows"][0]


def test_captions_are_asked_for_where_there_are_none(tmp_path):
    with pytest.raises(ValueError, match="got Digits"):
        measured(tmp_path, distiller(digits()), Digits(reference_size=20), CaptionProbe(DigitsFeatures()))


def test_prompts_in_words_are_those_of_the_conditions():
    data = Colours()
    data.setup("test")
    module = distiller(TextDiT(8, 3, 6, patch_size=4, width=48, depth=1, heads=2))
    held = len(data.reference)
    prompts = SampleGenerator(module, data).prompts([1, held + 1, 0])
    assert prompts.texts == [data.texts[1], data.texts[1], data.texts[0]]
    assert torch.equal(prompts.condition.tokens, data.condition([1, 1, 0]).tokens)
    assert len(SampleGenerator(module, data).prompts([]).condition.tokens) == 0
