"""The messages of libraries that the command line hides, so that those that concern the user are seen."""

import logging
import re
import warnings

import torch
from lightning.pytorch.utilities import rank_zero_only

from decm_lightning.progress import say

WARNINGS = (
    "LightningCLI's args parameter",
    "'set_vital' is deprecated",
    ".*LeafSpec.* is deprecated",
    "The number of training batches .* is smaller than the logging interval",
    ".*does not have many workers which may be a bottleneck",
    "Couldn't infer the batch indices",  # The loader's sampler yields batches of rows.
    # Without a VAE, latents can be trained on but not evaluated: their validation loader is empty.
    "Total length of `list` across ranks is zero",
)
MESSAGES = (
    "Seed set to ",  # The config has it.
    "GPU available: (True .*, used: True|False)",  # An unused GPU is worth a line.
    "TPU available: False",
    "💡 Tip: ",  # For packages of Lightning's company.
    # The summary of a run names the precision, and its end the number of steps.
    "Using (16bit|bfloat16) Automatic Mixed Precision",
    "`Trainer.fit` stopped: `max_(steps|epochs)=.*` reached",
    # The checkpoint was named on the command line.
    "(Restoring states|Restored all states|Loaded model weights) from the checkpoint",
)
# Only a GPU has the fused kernel.
WITHOUT_GPU = (r"attention's tangent is computed in blocks of \d+ queries",)


class Lines(logging.Handler):
    """Writes messages above the progress bars, except the hidden ones."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        hidden = MESSAGES if torch.cuda.is_available() else MESSAGES + WITHOUT_GPU
        message = self.format(record)
        if not any(re.match(text, message) for text in hidden):
            say(message)


def hide_noise() -> None:
    """Ignore the listed warnings, and write the log of this package and of Lightning without the listed messages.

    Only the first process of a run writes the log.
    """
    if getattr(rank_zero_only, "rank", 0):
        return
    for text in WARNINGS:
        warnings.filterwarnings("ignore", text)
    lines = Lines()
    for name in ("decm_lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers = [handler for handler in logger.handlers if type(handler) is not logging.StreamHandler]
        if not any(isinstance(handler, Lines) for handler in logger.handlers):
            logger.setLevel(logging.INFO)
            logger.addHandler(lines)
