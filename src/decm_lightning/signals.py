"""How processes end at a signal, if they have nothing to save."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import lightning as L


def end_at_sigterm(trainer: L.Trainer) -> Callable[[int, Any], NoReturn]:
    """Let SIGTERM end the process and those it has started; for a `setup` hook, before Lightning handles signals.

    On its own Lightning ends a fit after the next batch, with exit code 0, and no other method.

    Returns:
        the handler, which raises SystemExit with 128 + the signal's number.
    """
    # Spawned processes receive it with the trainer.
    end = partial(_end, trainer)
    trainer._signal_connector._sigterm_notifier_fn = end  # type: ignore[assignment,method-assign]
    return end


def _end(trainer: L.Trainer, signum: int, frame: Any) -> NoReturn:
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signum)
    raise SystemExit(128 + signum)


def silence_broken_pipes(worker: int) -> None:
    """Let a worker end silently if a signal has ended the process that it sends batches to."""
    report = sys.excepthook

    def hook(kind: type[BaseException], *rest: Any) -> None:
        # multiprocessing's thread that sends tensors reports its errors here.
        if not issubclass(kind, BrokenPipeError | ConnectionError):
            report(kind, *rest)

    sys.excepthook = hook
