"""Standard output and error that survive a closed pipe."""

import os
from typing import Any, TextIO


class Output:
    """A stream that discards its output once the reader, such as `head`, has closed the pipe. The run continues."""

    def __init__(self, stream: TextIO) -> None:
        # Within a bar of rich, the stream is a proxy that writes to sys.stdout, and so to this object again.
        self.stream: TextIO = getattr(stream, "rich_proxied_file", stream)

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
        # The stream still buffers the unwritten text, and would write it when the interpreter exits.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)
