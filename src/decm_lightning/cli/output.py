"""Standard output and error that outlive their reader."""

import os
from typing import Any, TextIO


class Output:
    """A stream for a run that must not be lost because its reader has ended, such as `head`.

    When a pipe is closed, the rest of the output is discarded.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["stream"], name)

    def write(self, text: str) -> int:
        """Write text, or discard it."""
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._discard()

    def _discard(self) -> None:
        # The stream keeps what it could not write, and would try again when the interpreter ends.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)
