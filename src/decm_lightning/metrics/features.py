"""Feature networks: the interface, and the base class."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from decm_lightning.errors import needs
from decm_lightning.metrics.metric import KID, FeatureMetric, Frechet
from decm_lightning.networks.checkpoint_files import few
from decm_lightning.networks.hub import cache_without_network
from decm_lightning.types import Batch


class FeatureNetwork(nn.Module):
    """A frozen network from uint8 images (b, c, h, w) to features, with the metrics that are measured on them.

    `Evaluation` accepts any nn.Module with `num_features`. Derive from this class to set a name, a number of samples,
    or other metrics.

    Example:
        >>> class Pixels(FeatureNetwork):
        ...     name = "pixels"
        ...     num_features = 64
        ...     def forward(self, images):
        ...         return images.flatten(1).float()
        >>> [metric.columns for metric in Pixels().metrics()]
        [('fd',), ('kid',)]

    Attributes:
        num_features: number of features.
        name: name in tables; by default the class name.
        samples: number of images that a test generates by default; 0 for the same number as a validation.
    """

    num_features: int
    name: str = ""
    samples: int = 0

    def __init__(self) -> None:
        super().__init__()
        self.name = self.name or type(self).__name__

    def metrics(self) -> list[FeatureMetric]:
        """Return new metrics: by default `fd`, the Fréchet distance of the features, and `kid`, the kernel distance.

        If the network returns a dict of outputs, each metric reads one of them.
        """
        return [Frechet("fd", "features", self.num_features), KID("kid", "features", self.num_features)]

    def prepare(self, data: Any, read: Callable[[Batch], Batch]) -> None:
        """Fit the network to real training images before the first measurement. By default, do nothing.

        Args:
            data: the data module.
            read: turns its batches into uint8 images with their conditions.
        """


class _Plain(FeatureNetwork):
    """A feature network around any module that maps uint8 images (b, c, h, w) to features (b, num_features)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.num_features = network.num_features
        self.name = type(network).__name__

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def as_feature_network(network: nn.Module) -> FeatureNetwork:
    """Return a module with `num_features` as a feature network."""
    if isinstance(network, FeatureNetwork):
        return network
    if not hasattr(network, "num_features"):
        raise ValueError(f"a feature network needs the attribute num_features: got {type(network).__name__}")
    return _Plain(network)


def as_rgb(images: Tensor, name: str) -> Float[Tensor, "b 3 h w"]:
    """Return gray or RGB images (b, 1 or 3, h, w) as float RGB images with the same pixel values."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"{name} needs images (b, 1 or 3, h, w): got {tuple(images.shape)}")
    return images.float().expand(-1, 3, -1, -1)


def from_pretrained(model: str, *classes: str, extra: str) -> list[Any]:
    """Return a frozen model of transformers and its processors.

    `model` is a folder written by save_pretrained of each class, or a name on the Hugging Face hub. The first class is
    that of the model. `extra` is the extra of this package that installs transformers.
    """
    names = " and ".join(classes)
    with needs(names, "transformers", extra):
        transformers = import_module("transformers")
    kind, *processors = (getattr(transformers, name) for name in classes)
    try:
        with cache_without_network(model):
            network, found = kind.from_pretrained(model, output_loading_info=True)
            loaded = [processor.from_pretrained(model) for processor in processors]
    except (OSError, ValueError) as error:
        remedy = "pass a folder written by save_pretrained, or a name on the Hugging Face hub"
        raise OSError(f"no {names} at {model}: {remedy}") from error
    if missing := sorted(set(found["missing_keys"]) & {name for name, _ in network.named_parameters()}):
        raise ValueError(f"{model} is not a complete {classes[0]}: it lacks {few(missing)}")
    return [network.eval().requires_grad_(False), *loaded]
