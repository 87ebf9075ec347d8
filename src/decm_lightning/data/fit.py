"""Check that the data matches the network."""

from decm_lightning.networks import Network


def check_fit(
    network: Network,
    num_classes: int | None = None,
    shape: tuple[int, ...] | None = None,
    what: str = "the data's samples are",
) -> None:
    """Check that a network accepts data with this number of classes and samples of this shape; None skips a check.

    Raises:
        ValueError: if the data have more classes than the network, whose null class would be the first extra label, or
            samples of another shape. The message gives the values of both; `what` is its subject.
    """
    if num_classes and 0 < network.num_classes < num_classes:
        both = f"the data have {num_classes} classes and the network {network.num_classes}"
        raise ValueError(f"{both}: labels must be below num_classes")
    if shape is not None and shape != tuple(network.sample_shape):
        remedy = "build the network for this shape (in_channels, input_size) or use other data"
        raise ValueError(f"{what} {shape} and the network's {tuple(network.sample_shape)}: {remedy}")
