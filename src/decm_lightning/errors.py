"""The one error that is neither bad input nor a bug."""


class NonFiniteError(RuntimeError):
    """A loss or gradient that is NaN or infinite: training has stopped before the weights took it in."""
