"""The error that is neither bad input nor a bug."""


class NonFiniteError(RuntimeError):
    """Raised when a loss, gradient or image is NaN or infinite, before the weights are updated."""
