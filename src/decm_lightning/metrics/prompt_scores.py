"""Scores of an image against its prompt by public models: CLIP score, ImageReward, BLIP score, HPS.

Each stands where `Evaluation` expects a feature network. They are measured in tests only, and load their model when the
test begins; without the library or the weights the column is left out, with the reason in one line.

The libraries of ImageReward, BLIP and HPS bring torchvision and old versions of other packages along (hpsv2 wants
protobuf below 4): they are no extra of this package, and their adapters have not been run with real weights. Where they
do not go together, `decm sample --prompts` writes the images for them.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from decm_lightning.errors import missing_extra
from decm_lightning.image_writer import picture
from decm_lightning.metrics.feature_metrics import Counts, Part, Prompts
from decm_lightning.metrics.reference import Reference


class PromptScorer(nn.Module):
    """A model that scores images against prompts in words; images pass through it as they are.

    Attributes:
        column: its column.
        name: what is measured, by which model.
        unit: what its values are.
    """

    column: str
    name: str
    unit: str

    def forward(self, images: Tensor) -> Tensor:
        """Return the images."""
        return images

    def parts(self) -> list[Part]:
        """Return what is measured."""
        return [PromptScore(self)]

    @abstractmethod
    def load(self) -> Metric:
        """Load the model; return a metric, updated with uint8 images (b, 3, h, w) and b prompts, of their mean score.

        Raises:
            ImportError: if a library is not installed.
            OSError: if there are no weights.
        """


class PromptScore(Part):
    """The mean of a scorer's values over all generated images."""

    wants_prompts = True

    def __init__(self, scorer: PromptScorer) -> None:
        super().__init__((scorer.column,), "features", MeanMetric())
        self.scorer = scorer

    @property
    def needs_images(self) -> bool:
        """It needs no real ones."""
        return False

    def refer(self, reference: Reference) -> str:
        """Need nothing."""
        return ""

    def missing(self) -> str:
        """Load the model and score an image; return why that fails."""
        try:
            self.metric = self.scorer.load()
            # A library may load its weights no sooner than at the first score.
            self.metric.update(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["a"])
            self.metric.reset()
        except (ImportError, OSError) as error:
            return " ".join(str(error).split())
        # A library that does not go with the others fails in any way.
        except Exception as error:
            return " ".join(f"{self.scorer.name} does not work: {error!r}".split())
        return ""

    def update(self, views: Mapping[str, Tensor], real: bool, prompts: Prompts) -> None:
        """Take in generated images with their prompts.

        Raises:
            ValueError: if the prompts are not known in words.
        """
        images = views[self.view]
        if real or not len(images):
            return
        if prompts.texts is None:
            wanted = "give the trainer a datamodule with texts, such as data.Emoji"
            raise ValueError(f"{self.columns[0]} needs prompts in words: {wanted}")
        self.metric.update(images.expand(-1, 3, -1, -1), prompts.texts)

    def note(self, counts: Counts) -> str:
        """Say what the values are, and by which model."""
        return f"{self.scorer.unit}, {self.scorer.name}"

    def compute(self, counts: Counts, seed: int) -> dict[str, float]:
        """Return the mean."""
        return {self.columns[0]: self.metric.compute().item()}


class CLIP(PromptScorer):
    """The CLIP score 100 max(mean cos(image, prompt), 0) (arXiv 2104.08718), on torchmetrics; column `clip_score`.

    Papers that report about 0.3 leave out the factor 100. Prompts are cut to the 77 tokens of CLIP.

    Args:
        model: a folder written by CLIPModel.save_pretrained and CLIPProcessor.save_pretrained, or a name on the Hugging
            Face hub.
    """

    column = "clip_score"
    unit = "100 cos, between image and prompt"

    def __init__(self, model: str = "openai/clip-vit-large-patch14") -> None:
        super().__init__()
        self.model = model
        self.name = f"CLIP score by {model}"

    def load(self) -> Metric:
        """Return torchmetrics' metric around the model.

        Raises:
            ImportError: if transformers is not installed.
            OSError: if there is no such model.
        """
        from torchmetrics.multimodal.clip_score import CLIPScore

        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise missing_extra("CLIP", "transformers", "text") from error
        try:
            model, processor = CLIPModel.from_pretrained(self.model), CLIPProcessor.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            wanted = "give a folder with CLIPModel and CLIPProcessor, or a name on the Hugging Face hub"
            raise OSError(f"no CLIP at {self.model}: {wanted}") from error
        embeddings = _Embeddings(model.eval().requires_grad_(False))
        # torchmetrics knows models by name, or by a function that returns one.
        return CLIPScore(lambda: (embeddings, processor))  # type: ignore[arg-type, return-value]


class ImageReward(PromptScorer):
    """ImageReward (arXiv 2304.05977), about -2 to 2, through the library image-reward; column `image_reward`.

    Args:
        model: "ImageReward-v1.0", which the library downloads, or the path of its weights.
    """

    column = "image_reward"
    unit = "mean reward"

    def __init__(self, model: str = "ImageReward-v1.0") -> None:
        super().__init__()
        self.model = model
        self.name = f"ImageReward by {model}"

    def load(self) -> Metric:
        """Return the mean of the rewards.

        Raises:
            ImportError: if image-reward is not installed.
            OSError: if there are no weights.
        """
        return _MeanScore(_RankedByFile(_image_reward().load(self.model)))


class BLIPScore(PromptScorer):
    """cos(image, prompt) by BLIP's large retrieval model, through the library image-reward; column `blip_score`."""

    column = "blip_score"
    unit = "cos, between image and prompt"
    name = "BLIP score by image-reward's model"

    def load(self) -> Metric:
        """Return the mean of the cosines.

        Raises:
            ImportError: if image-reward is not installed.
            OSError: if there are no weights.
        """
        return _MeanScore(_RankedByFile(_image_reward().load_score("BLIP")))


class HPS(PromptScorer):
    """Human Preference Score (arXiv 2306.09341), about 0.2 to 0.3, through the library hpsv2; column `hps`.

    Args:
        version: "v2.0" or "v2.1".
    """

    column = "hps"
    unit = "mean score, not times 100"

    def __init__(self, version: str = "v2.1") -> None:
        super().__init__()
        self.version = version
        self.name = f"HPS {version}"

    def load(self) -> Metric:
        """Return the mean of the scores.

        Raises:
            ImportError: if hpsv2 is not installed.
        """
        try:
            import hpsv2
        except ImportError as error:
            raise ImportError("HPS needs the library hpsv2: pip install hpsv2") from error
        return _MeanScore(lambda file, prompt: hpsv2.score([file], prompt, hps_version=self.version)[0])


class _Embeddings(nn.Module):
    """A CLIPModel whose embeddings are tensors, as torchmetrics expects; transformers wraps them since version 5."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return _tensor(self.model.get_image_features(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return _tensor(self.model.get_text_features(input_ids, attention_mask))


class _MeanScore(MeanMetric):
    """The mean of what `score(file, prompt)` gives for each image, written to a file as these libraries want it."""

    def __init__(self, score: Any) -> None:
        super().__init__()
        self.score = score

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:  # type: ignore[override]
        with TemporaryDirectory() as folder:
            file = str(Path(folder) / "image.png")
            for image, prompt in zip(images, prompts, strict=True):
                picture(image).save(file)
                super().update(float(self.score(file, prompt)))


class _RankedByFile:
    """A model of image-reward as a function of (file, prompt)."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, file: str, prompt: str) -> float:
        _, score = self.model.inference_rank(prompt, [file])
        return score


def _image_reward() -> Any:
    try:
        import ImageReward as library  # noqa: N813 - the library's name
    except ImportError as error:
        raise ImportError("ImageReward and BLIP score need a library: pip install image-reward") from error
    return library


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output
