r"""A data set of your own: discs and squares.

    python examples/extend_data.py

A data module is a LightningDataModule whose batches are `Batch(x_1, condition)`: images in [-1, 1], float32,
(b, c, h, w), and integer labels below `num_classes`, or None for data without classes. `val_dataloader` provides the
real images of the metrics. Any config takes it by its path, with this file in the working directory or next to the
config:

    decm fit --config configs/digits/teacher.yaml --data extend_data.Shapes \
      --model.init_args.network.init_args.num_classes 2

With plain loaders as here, a resumed run repeats the batches of its epoch. `data.Digits`, 40 lines, is based on
`data.images.labelled_images.LabelledImages`, whose runs resume within an epoch, bit-identically.
"""

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from decm_lightning import Batch, TeacherTraining
from decm_lightning.networks import DiT


def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return white discs (class 0) and squares (class 1) on black, (count, 1, 8, 8), with their labels, (count,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    row, column = (3 + 2 * torch.rand(2, count, 1, 1, generator=generator)).unbind()
    down, right = (torch.arange(8.0)[:, None] - row).abs(), (torch.arange(8.0) - column).abs()
    distance = torch.where(labels[:, None, None] == 0, (down**2 + right**2).sqrt(), torch.maximum(down, right))
    return ((2.5 - distance) * 2).clamp(-1, 1)[:, None], labels


class Shapes(L.LightningDataModule):
    """1,024 training images and 256 others for the metrics.

    Args:
        batch_size: images per batch, at least 1.
    """

    num_classes = 2

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Make the images."""
        self.train, self.reference = TensorDataset(*shapes(1024, seed=0)), TensorDataset(*shapes(256, seed=1))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled batches, without a smaller last one."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, collate_fn=as_batch)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the images that samples are compared with."""
        return DataLoader(self.reference, self.batch_size, collate_fn=as_batch)


def as_batch(rows: list[tuple[Tensor, Tensor]]) -> Batch:
    """Return rows (image, label) as one batch."""
    images, labels = zip(*rows, strict=True)
    return Batch(torch.stack(images), torch.stack(labels))


def main(steps: int = 200) -> TeacherTraining:
    """Train a small teacher on the shapes."""
    torch.manual_seed(0)
    network = DiT(input_size=8, patch_size=2, in_channels=1, width=32, depth=2, heads=2, num_classes=2)
    teacher = TeacherTraining(network)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(teacher, Shapes())
    print(f"flow-matching loss after {steps} steps: {trainer.callback_metrics['loss/flow_matching']:.3f}")
    return teacher


if __name__ == "__main__":
    main()
