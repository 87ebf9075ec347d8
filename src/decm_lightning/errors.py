"""The one error that is neither bad input nor a bug."""


class NonFiniteError(RuntimeError):
    """A loss, gradient or image that is NaN or infinite: training has stopped before the weights took it in."""
