"""CLIP score and BLIP score: how well images match their prompts according to models of transformers.

They are only measured in tests. The model is loaded when the test begins. If that fails, the column is skipped and the
protocol states the reason. docs/prompt-scores.md describes other scorers.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchmetrics import MeanMetric

from decm_lightning.image_writer import to_pil
from decm_lightning.metrics.features import FeatureNetwork, from_pretrained
from decm_lightning.metrics.metric import Counts, FeatureMetric, Prompts

AT_ONCE = 64


class PromptScorer(FeatureNetwork):
    """A transformers model that compares images with prompts. As a feature network, it returns the images unchanged."""

    classes: tuple[str, str]
    column: str
    unit: str
    network: Any
    processor: Any

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model
        self.name = f"{type(self).__name__} by {model}"

    def forward(self, images: Tensor) -> Tensor:
        """Return the images."""
        return images

    def metrics(self) -> list[FeatureMetric]:
        """Return the mean score."""
        return [PromptScore(self)]

    def load(self) -> None:
        """Load the model.

        Raises:
            ImportError: if transformers is not installed.
            OSError: if the model does not exist.
            ValueError: if the model lacks weights.
        """
        self.network, self.processor = from_pretrained(self.model, *self.classes, extra="text")

    @torch.no_grad()
    def score(self, images: UInt8[Tensor, "b c h w"], texts: Sequence[str]) -> Float[Tensor, " b"]:
        """Return the score of each gray or RGB image with its prompt, which is truncated to the model's length."""
        inputs = self.processor(
            text=list(texts),
            images=[to_pil(image.expand(3, -1, -1).cpu()) for image in images],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings,
        )
        return self.compare(inputs.to(self.network.device))

    @abstractmethod
    def compare(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, " b"]:
        """Return the scores of b processed images and prompts."""


class PromptScore(FeatureMetric):
    """The mean score of all generated images."""

    needs_real = False
    needs_prompts = True

    def __init__(self, scorer: PromptScorer) -> None:
        super().__init__((scorer.column,), "features", MeanMetric().set_dtype(torch.float64))
        self.scorer = scorer

    def unavailable_reason(self) -> str:
        """Load the model and score an image; return the reason if that fails."""
        try:
            self.scorer.load()
            self.scorer.score(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["a"])
        except (ImportError, OSError, ValueError) as error:
            return " ".join(str(error).split())
        # Damaged files, or the processor of another model, can raise any exception.
        except Exception as error:
            return " ".join(f"{self.scorer.name} does not work: {error!r}".split())
        return ""

    def update(self, views: Mapping[str, Tensor], real: bool, prompts: Prompts) -> None:
        """Add generated images with their prompts."""
        images = views[self.view]
        if real or not len(images):
            return
        if prompts.texts is None:
            remedy = "use a data module with texts, such as demo.Emoji"
            raise ValueError(f"{self.columns[0]} needs prompts as text: {remedy}")
        for first in range(0, len(images), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            self.metric.update(self.scorer.score(images[part], prompts.texts[part]))

    def describe(self, counts: Counts) -> str:
        """Return the unit of the values and the model."""
        return f"{self.scorer.unit}, {self.scorer.name}"

    def compute(self, counts: Counts, seed: int) -> dict[str, float]:
        """Return the mean."""
        return {self.columns[0]: self.metric.compute().item()}


class CLIPScore(PromptScorer):
    """The CLIP score, the mean of 100 cos(image, prompt) (arXiv 2104.08718); column `clip_score`.

    Papers that report about 0.3 leave out the factor 100. Unlike in torchmetrics, a negative mean is not set to 0.
    """

    # The CLIP score of torchmetrics supports neither local folders nor transformers 5.
    classes = ("CLIPModel", "CLIPProcessor")
    column = "clip_score"
    unit = "100 cos(image, prompt)"

    def __init__(self, model: str = "openai/clip-vit-large-patch14") -> None:
        super().__init__(model)

    def compare(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, " b"]:
        """Return 100 times the cosines."""
        output = self.network(**inputs)
        return 100 * (output.image_embeds * output.text_embeds).sum(1)


class BLIPScore(PromptScorer):
    """The mean of cos(image, prompt) by the projections of BLIP's retrieval model (arXiv 2201.12086); `blip_score`.

    The image-reward package has a score of the same name, whose values differ because it uses another BLIP checkpoint.
    """

    classes = ("BlipForImageTextRetrieval", "BlipProcessor")
    column = "blip_score"
    unit = "cos(image, prompt)"

    def __init__(self, model: str = "Salesforce/blip-itm-large-coco") -> None:
        super().__init__(model)

    def compare(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, " b"]:
        """Return the cosines."""
        return self.network(**inputs, use_itm_head=False).itm_score.diagonal()
