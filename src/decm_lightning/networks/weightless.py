"""Build networks on the meta device, for processes that receive their weights from another process."""

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
    """Make `load` build networks on the meta device, without reading weights, within the block if enabled."""
    token = _WEIGHTLESS.set(enabled)
    try:
        yield
    finally:
        _WEIGHTLESS.reset(token)


def is_weightless() -> bool:
    """Return whether the caller is within `without_weights`."""
    return _WEIGHTLESS.get()


def on_meta(cls: type[Built], *args: Any, **kwargs: Any) -> Built:
    """Return a new network on the meta device.

    Networks of this package are built there and take no memory. Other classes may compute with their weights in the
    constructor, so those networks are moved there afterwards.
    """
    if not cls.__module__.startswith("decm_lightning."):
        return cls(*args, **kwargs).to("meta")
    with torch.device("meta"):
        return cls(*args, **kwargs)
