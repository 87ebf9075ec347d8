"""Components of the small examples: captioned emoji, feature networks for small images, and a caption probe."""

from decm_lightning.demo.caption_probe import CaptionProbe
from decm_lightning.demo.emoji import Emoji
from decm_lightning.demo.features import DigitsFeatures, EfficientNetLite0Features

__all__ = ["CaptionProbe", "DigitsFeatures", "EfficientNetLite0Features", "Emoji"]
