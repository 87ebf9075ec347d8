"""Errors that several subpackages raise."""

from collections.abc import Iterator
from contextlib import contextmanager


class NonFiniteError(RuntimeError):
    """Raised when a loss, gradient or image is NaN or infinite, before the weights are updated."""


@contextmanager
def needs(user: str, package: str, extra: str) -> Iterator[None]:
    """Name the remedy if the import of an optional package in the block fails.

    Args:
        user: the feature that needs the package; the message starts with it.
        package: the name of the package.
        extra: the extra of this package that installs it.
    """
    try:
        yield
    except ImportError as error:
        remedy = f"install the extra {extra!r} of this package (in a checkout: pip install -e '.[{extra}]')"
        raise ImportError(f"{user} needs {package}: {remedy}") from error


def check_at_least(minimum: int, **values: float | None) -> None:
    """Check that no value is below a minimum. None is not checked.

    Raises:
        ValueError: naming the first such value.
    """
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}: got {value}")
