"""Exact resuming: rewrite the counters of Lightning's loops, and compare a run's settings with its checkpoint's.

Lightning saves the current counters of its loops, and several of these states do not resume correctly. After an
epoch's last batch it skips an epoch or trains one without batches. After validation it counts a step twice. Accumulated
gradients are not saved. So each checkpoint is written with one of two states: the clean start of an epoch, or the end
of an optimizer step within an epoch.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from math import inf
from typing import Any

import lightning as L
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

FIT, BATCHES, EPOCHS = "fit_loop", "epoch_loop.batch_progress", "epoch_progress"
FINISHED = "_iterator_finished"
"""The key with which torchdata's StatefulDataLoader marks the end of its epoch."""
PLAIN = (str, int, float, bool, type(None))
ABSENT = "none"
NEW_RUN = "start a new run from its weights (decm export, then decm_lightning.networks.load as the network)"
FIXED = {
    "teacher": "use the teacher that it was trained with, or " + NEW_RUN,
    "optimizer.class": "use the same optimizer, or " + NEW_RUN,
}
"""Settings that a resumed run cannot change, and what to do instead."""


def normalize_progress(trainer: L.Trainer, loops: dict[str, Any]) -> None:
    """Rewrite a checkpoint's loop counters, in place, to its last optimizer step.

    Batches after the last optimizer step are repeated, because their accumulated gradients are not saved. The result is
    exact if the data loader sets its position by the trainer's counters, as `data.EpochLoader` does.

    Args:
        trainer: in a fit, at any moment between two batches or at an exception.
        loops: `checkpoint["loops"]`.
    """
    fit = loops[FIT]
    progress, epochs = fit[BATCHES], fit[EPOCHS]
    trained, started = progress["current"]["processed"], epochs["current"]["started"]
    # is_last_batch is set before the batch is trained on, and an exception may occur in between.
    is_finished = progress["is_last_batch"] and trained == progress["current"]["ready"]
    loaders = [state for state in fit["state_dict"].get("combined_loader", []) if state]
    # A loader that saves its position has already passed these batches.
    repeated = 0 if is_finished or loaders else trained % trainer.accumulate_grad_batches
    trained -= repeated
    if is_finished:
        done, trained = started, 0
    elif trained:
        # Lightning counts an epoch as processed even if max_steps or a signal cut it short.
        done = started - 1
    else:
        done = min(started, epochs["current"]["processed"])
    for loader in loaders if is_finished else []:
        if FINISHED in loader:
            loader[FINISHED] = True
    _set_epochs(epochs, done, in_epoch=trained > 0)
    _set_batches(progress, trained, progress["total"]["processed"] - repeated)
    # Lightning adds the step of the batch with which an epoch is resumed.
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - (trained > 0)
    validated = fit["epoch_loop.val_loop.batch_progress"]
    validated |= {"is_last_batch": False, "current": _counters(0), "total": _counters(0)}


def start_first_epoch(trainer: L.Trainer) -> None:
    """Start the first epoch of a resumed run like any other epoch, if the checkpoint is from the end of an epoch.

    In the middle of an epoch Lightning does not call `on_train_epoch_start` of GradientAccumulationScheduler, so this
    function does.

    Args:
        trainer: in `on_train_start`.
    """
    loop = trainer.fit_loop.epoch_loop
    if not loop.restarting:
        return
    trained = loop.batch_progress.current.ready
    if not trained:
        loop.restarting = False
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            callback.on_train_epoch_start(trainer)
    loaders = trainer.fit_loop._combined_loader
    saves_position = loaders is None or all(isinstance(loader, _Stateful) for loader in loaders.flattened)
    # If the length is known, Lightning warns.
    if trainer.num_training_batches == inf and not saves_position:
        remedy = "give it state_dict and load_state_dict to resume exactly"
        rank_zero_warn(f"the data loader repeats the {trained} batches of this epoch before the checkpoint: {remedy}")


def _set_epochs(epochs: dict[str, Any], done: int, in_epoch: bool) -> None:
    before = epochs["total"]["started"] - epochs["current"]["started"]
    for part, count in (("current", done), ("total", before + done)):
        epochs[part] = {"ready": count + in_epoch, "started": count + in_epoch, "processed": count, "completed": count}


def _set_batches(progress: dict[str, Any], trained: int, total: int) -> None:
    within = trained > 0
    progress["current"] = _counters(trained) | {"completed": trained - within}
    progress["total"] = _counters(total) | {"completed": total - within}
    progress["is_last_batch"] = False


def _counters(count: int) -> dict[str, int]:
    return {"ready": count, "started": count, "processed": count, "completed": count}


def settings_of(value: Any, name: str = "") -> dict[str, Any]:
    """Return the settings in a nested value, by dotted names.

    Dataclasses, mappings, sequences and partial functions are traversed, and plain values are unchanged. Other objects
    become the name of their class, and classes and functions their own name, `module.qualname`.

    Example:
        >>> settings_of({"optimizer": {"lr": 0.1, "betas": (0.9, 0.99)}})
        {'optimizer.lr': 0.1, 'optimizer.betas': [0.9, 0.99]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in fields(value)}
        parts: dict[str, Any] = {"class": _name(type(value))} | own
    elif isinstance(value, partial):
        parts = {"function": value.func, **{str(i): part for i, part in enumerate(value.args)}, **value.keywords}
    elif isinstance(value, Mapping):
        parts = {str(key): part for key, part in value.items()}
    elif isinstance(value, (list, tuple)) and not all(isinstance(part, PLAIN) for part in value):
        parts = {str(number): part for number, part in enumerate(value)}
    elif isinstance(value, (list, tuple)):
        return {name: list(value)}
    else:
        return {name: value if isinstance(value, PLAIN) else _name(value)}
    prefix = f"{name}." if name else ""
    return {key: part for inner, value in parts.items() for key, part in settings_of(value, f"{prefix}{inner}").items()}


def _name(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def refuse_fixed(differing: Mapping[str, str], optimizer_known: bool) -> None:
    """Refuse `differences` in settings that a resumed run cannot change; in the optimizer's only once it exists."""
    for name, remedy in FIXED.items():
        if name in differing and (name == "teacher" or optimizer_known):
            raise ValueError(f"the checkpoint was saved with another {name}: got {differing[name]}; {remedy}")


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that differ, each as "value (saved value in the checkpoint)".

    Example:
        >>> differences({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0})
        {'lr': '0.2 (0.1 in the checkpoint)'}
    """
    names = [name for name in {**saved, **current} if saved.get(name, ABSENT) != current.get(name, ABSENT)]
    return {name: f"{current.get(name, ABSENT)} ({saved.get(name, ABSENT)} in the checkpoint)" for name in names}
