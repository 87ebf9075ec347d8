"""Networks without weights: built on the meta device, for processes to which another one sends the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from decm_lightning.networks.network import Network

Built = TypeVar("Built", bound=Network)
_WEIGHTLESS: ContextVar[bool] = ContextVar("weightless", default=False)


@contextmanager
def without_weights(enabled: bool = True) -> Iterator[None]:
    """Within the block, if enabled, `load` builds networks on the meta device and reads no weights."""
    token = _WEIGHTLESS.set(enabled)
    try:
        yield
    finally:
        _WEIGHTLESS.reset(token)


def is_weightless() -> bool:
    """Return whether this is within `without_weights`."""
    return _WEIGHTLESS.get()


def on_meta(cls: type[Built], *args: Any, **kwargs: Any) -> Built:
    """Return a new network on the meta device.

    Those of this package are built there and take no memory. One from elsewhere may compute with its weights while it
    is built, so it is moved there afterwards.
    """
    if not cls.__module__.startswith("decm_lightning."):
        return cls(*args, **kwargs).to("meta")
    with torch.device("meta"):
        return cls(*args, **kwargs)
