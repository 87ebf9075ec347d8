"""Exact resuming: the counters of Lightning's loops in a form that resumes, and the settings that are compared.

Lightning saves the counters of its loops as they are at the moment of saving, and several of these states do not
resume: after an epoch's last batch it skips an epoch or trains one of no batches, after validation it counts a step
twice, and accumulated gradients are not saved. So each checkpoint is written with one of two states: the clean start of
an epoch, or the end of an optimizer step within one.
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
"""The key by which torchdata's StatefulDataLoader says that its epoch is over."""
PLAIN = (str, int, float, bool, type(None))
ABSENT = "none"
NEW_RUN = "start a new run from its weights: decm export, then decm_lightning.networks.load as the network"
FIXED = {
    "teacher": "give the teacher that it was trained with, or " + NEW_RUN,
    "optimizer.class": "give the same optimizer, or " + NEW_RUN,
}
"""Settings that a resumed run cannot change, and what to do instead."""


def normalize_progress(trainer: L.Trainer, loops: dict[str, Any]) -> None:
    """Rewrite the loops of a checkpoint, in place, to what has been trained on for good.

    Batches after the last optimizer step are trained on again, as their accumulated gradients are not saved. That is
    exact where the data loader finds its place by the trainer's counters, as `data.EpochLoader` does.

    Args:
        trainer: in a fit, at any moment between two batches or at an exception.
        loops: `checkpoint["loops"]`.
    """
    fit = loops[FIT]
    progress, epochs = fit[BATCHES], fit[EPOCHS]
    trained, started = progress["current"]["processed"], epochs["current"]["started"]
    # The last batch is known before it is trained on; an exception may have come in between.
    is_finished = progress["is_last_batch"] and trained == progress["current"]["ready"]
    loaders = [state for state in fit["state_dict"].get("combined_loader", []) if state]
    # A loader that keeps its own place has already passed these batches.
    again = 0 if is_finished or loaders else trained % trainer.accumulate_grad_batches
    trained -= again
    if is_finished:
        done, trained = started, 0
    elif trained:
        # Lightning counts an epoch that max_steps or a signal has cut short as processed.
        done = started - 1
    else:
        done = min(started, epochs["current"]["processed"])
    for loader in loaders if is_finished else []:
        if FINISHED in loader:
            loader[FINISHED] = True
    _set_epochs(epochs, done, in_epoch=trained > 0)
    _set_batches(progress, trained, progress["total"]["processed"] - again)
    # Lightning adds the step of the batch at which an epoch is resumed.
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - (trained > 0)
    validated = fit["epoch_loop.val_loop.batch_progress"]
    validated |= {"is_last_batch": False, "current": _counters(0), "total": _counters(0)}


def start_first_epoch(trainer: L.Trainer) -> None:
    """Start the first epoch of a resumed run: as any other, if the checkpoint is from the end of one.

    In the middle of one Lightning calls no callback's `on_train_epoch_start`, which sets the accumulation by epochs.

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
    keeps_place = loaders is None or all(isinstance(loader, _Stateful) for loader in loaders.flattened)
    # Where the length is known, Lightning itself warns.
    if trainer.num_training_batches == inf and not keeps_place:
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
    """Return the settings within a value by dotted names: plain values as they are, everything else by its name.

    Dataclasses, mappings, sequences and partial functions are followed. Other objects have the name of their class, and
    classes and functions their own: `module.qualname`, which any later process finds again.
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
    """Refuse differences in settings that a resumed run cannot change.

    Args:
        differing: as `differences` returns them.
        optimizer_known: whether the optimizer has been made, so that its class can be compared.

    Raises:
        ValueError: naming the setting, both values and the remedy.
    """
    for name, remedy in FIXED.items():
        if name in differing and (name == "teacher" or optimizer_known):
            raise ValueError(f"the checkpoint is of a run with another {name}: got {differing[name]}; {remedy}")


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, str]:
    """Return which settings differ, each as `value (saved in the checkpoint)`."""
    names = [name for name in {**saved, **given} if saved.get(name, ABSENT) != given.get(name, ABSENT)]
    return {name: f"{given.get(name, ABSENT)} ({saved.get(name, ABSENT)} in the checkpoint)" for name in names}
