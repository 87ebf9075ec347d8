"""Errors that several subpackages raise."""


class NonFiniteError(RuntimeError):
    """Raised when a loss, gradient or image is NaN or infinite, before the weights are updated."""


def missing_extra(user: str, package: str, extra: str) -> ImportError:
    """Return the error for an optional package that is not installed.

    Args:
        user: the feature that needs the package; the message starts with it.
        package: the name of the package.
        extra: the extra of this package that installs it.
    """
    remedy = f"install the extra {extra!r} of this package (in a checkout: pip install -e '.[{extra}]')"
    return ImportError(f"{user} needs {package}: {remedy}")


def check_at_least(minimum: int, **values: float | None) -> None:
    """Check that no value is below a minimum. None is not checked.

    Raises:
        ValueError: naming the first such value.
    """
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}: got {value}")
