"""The device that a command was told to work on."""

import torch


def checked(name: str) -> torch.device:
    """Return the device.

    Raises:
        ValueError: if this machine has none of that name.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not there: {str(error).splitlines()[0]}") from error
