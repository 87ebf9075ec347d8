"""How the program ends at SIGINT (Ctrl-C) and SIGTERM: in one line, with 128 + the signal's number as exit code."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Timer
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning as L

LINES = {signal.SIGINT: b"decm: interrupted\n", signal.SIGTERM: b"decm: terminated\n"}
RETRY = 0.1
"""Seconds after which a signal is repeated if Python has dropped its exception."""


class Ended(SystemExit):
    """Raised in the main thread by a signal, so that files are closed and temporary files removed."""


class End:
    """The program's handler of SIGINT and SIGTERM.

    The first signal raises `Ended`; a second Ctrl-C ends the process at once. So does the first one during an import,
    because some modules replace or drop its exception, and while Python shuts down.

    Attributes:
        received: the signal that ends the process; 0 for none.
        is_installed: whether this process runs the program, instead of a script or notebook.
        at_once: whether nothing is left to clean up.
    """

    def __init__(self) -> None:
        self.received, self.is_installed, self.at_once = 0, False, False
        self.pid = os.getpid()

    def install(self) -> None:
        """Handle the signals of this process, except those that it was started to ignore."""
        self.is_installed = True
        for signum in LINES:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self)
        sys.unraisablehook = partial(self._repeat, sys.unraisablehook)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Raise Ended, or end the process."""
        is_first, self.received = not self.received, self.received or signum
        if is_first and not self.at_once and not _imports(frame):
            raise Ended(128 + signum)
        if is_first or signum == signal.SIGINT:
            for stream in (sys.stdout, sys.stderr):
                # It may be closed, or be in the middle of a write.
                with suppress(Exception):
                    stream.flush()
            os._exit(self.report())

    def report(self) -> int:
        """Print the line, but not in processes that the program has started, and return the exit code."""
        if os.getpid() == self.pid and os.environ.get("LOCAL_RANK", "0") == "0":
            with suppress(OSError):
                os.write(2, LINES[signal.Signals(self.received)])
        return 128 + self.received

    def _repeat(self, report: Callable[[Any], object], dropped: Any) -> None:
        # Python drops exceptions in finalizers, such as those of data loaders.
        if isinstance(dropped.exc_value, Ended):
            signum, self.received = self.received, 0
            Timer(RETRY, os.kill, (os.getpid(), signum)).start()
        else:
            report(dropped)


end = End()


def end_at_signals(trainer: "L.Trainer") -> None:
    """Let SIGINT and SIGTERM end the program with its child processes, and SIGTERM end other processes.

    Call this in a `setup` hook, before Lightning handles signals. Without it, Lightning ends a fit after the next batch
    with exit code 0, and does not end other methods.
    """
    # Spawned processes receive the handler with the trainer.
    handler = partial(_end, trainer)
    trainer._signal_connector._sigterm_notifier_fn = handler  # type: ignore[assignment,method-assign]
    for signum in LINES:
        if signal.getsignal(signum) is end:
            signal.signal(signum, handler)


def _end(trainer: "L.Trainer", signum: int, frame: FrameType | None) -> None:
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signum)  # type: ignore[arg-type]
    if not end.is_installed:
        raise Ended(128 + signum)
    end(signum, frame)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def silence_broken_pipes(worker: int) -> None:
    """Let a worker end silently if a signal has ended the process that it sends batches to."""
    report = sys.excepthook

    def hook(kind: type[BaseException], *rest: Any) -> None:
        # multiprocessing's thread that sends tensors reports its errors here.
        if not issubclass(kind, BrokenPipeError | ConnectionError):
            report(kind, *rest)

    sys.excepthook = hook
