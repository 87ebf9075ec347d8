"""Train the weights of `DigitsFeatures` in half a minute: `python -m decm_lightning.demo.train_digits_features`."""

import json

import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from decm_lightning.demo.features import DIGITS_WEIGHTS, DigitsNetwork

SEED = 0
HELD_OUT = 0.2
EPOCHS = 60
BATCH_SIZE = 64
DROPOUT = 0.3


def split(seed: int = SEED) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) of the training and held-out digits of scikit-learn, split 80 / 20 and stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (torch.tensor(digits.images)[:, None] / 16 * 255).round().to(torch.uint8)
    labels = torch.tensor(digits.target)
    rows = train_test_split(torch.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=seed)
    train, held_out = ((images[part], labels[part]) for part in rows)
    return train, held_out


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of images that are classified correctly."""
    return (network(images).argmax(1) == labels).double().mean().item()


def shifted(images: Tensor) -> Tensor:
    """Return each image, randomly shifted by -1, 0 or 1 pixels along each axis and padded with background."""
    side = images.shape[-1]
    down, right = torch.randint(3, (2, len(images), 1, 1))
    padded = nn.functional.pad(images, (1, 1, 1, 1))[:, 0]
    pixels = torch.arange(side)
    return padded[torch.arange(len(images))[:, None, None], down + pixels[:, None], right + pixels][:, None]


def train(images: Tensor, labels: Tensor) -> DigitsNetwork:
    """Return a classifier trained by AdamW with a cosine schedule, dropout before the head, and shifted images.

    Pixel noise is not used as augmentation, because the features must stay sensitive to the noise of a poor sampler.
    """
    torch.manual_seed(SEED)
    network = DigitsNetwork()
    dropout = nn.Dropout(DROPOUT)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * (len(labels) // BATCH_SIZE))
    for _ in tqdm(range(EPOCHS), unit="epoch"):
        for rows in torch.randperm(len(labels)).split(BATCH_SIZE)[: len(labels) // BATCH_SIZE]:
            hidden = dropout(nn.functional.silu(network.features(shifted(images[rows]))))
            loss = nn.functional.cross_entropy(network.head(hidden), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def main() -> None:
    """Train, evaluate on the held-out digits, and write the weights and the record."""
    # A single thread always sums in the same order.
    torch.set_num_threads(1)
    training, held_out = split()
    network = train(*training)
    record = {
        "held_out_accuracy": accuracy(network, *held_out),
        "held_out_images": len(held_out[1]),
        "training_images": len(training[1]),
        "data": "scikit-learn load_digits, pixels p in 0..16 as round(p / 16 * 255)",
        "split": f"train_test_split(test_size={HELD_OUT}, stratify=labels, random_state={SEED})",
        "weights": "trained on the training images of the split",
        "seed": SEED,
        "epochs": EPOCHS,
        "command": "python -m decm_lightning.demo.train_digits_features",
        "torch": torch.__version__,
    }
    DIGITS_WEIGHTS.write_bytes(save(network.state_dict()))
    DIGITS_WEIGHTS.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
