"""The private APIs of other packages that we lean on still do what we need: see docs/private-apis.md.

An upgrade that changes one fails here, by its name, and not in the middle of a training.
"""

import ast
import inspect
import re
from pathlib import Path

import lightning as L
import pytest
import torch
import torch._functorch.config
from diffusers import ModelMixin, StableDiffusion3Pipeline
from einops import rearrange
from einops._backends import TorchBackend
from huggingface_hub import PyTorchModelHubMixin
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils import _pytree
from torchmetrics import Metric

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "docs" / "private-apis.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (nn.Module._apply, ["self", "fn", "recurse"]),
        (LightningCLI._set_seed, ["self"]),
        (Metric._apply, ["self", "fn"]),
        (ModelCheckpoint._find_last_checkpoints, ["self", "trainer"]),
        (ModelCheckpoint._monitor_candidates, ["self", "trainer"]),
        (ModelCheckpoint._save_last_checkpoint, ["self", "trainer", "monitor_candidates"]),
        (PyTorchModelHubMixin._save_pretrained, ["self", "save_directory"]),
        (_pytree.register_pytree_node, ["cls", "flatten_fn", "unflatten_fn"]),
        (_pytree.tree_map, ["func", "tree"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_functions_have_the_parameters_that_are_passed(function, parameters):
    assert list(inspect.signature(function).parameters)[: len(parameters)] == parameters


def test_a_trainer_has_the_parts_that_are_read(tmp_path):
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    environment = trainer._accelerator_connector.cluster_environment
    assert environment.creates_processes_externally is False
    assert trainer._checkpoint_connector._hpc_resume_path is None
    assert callable(trainer._signal_connector._sigterm_notifier_fn)
    assert trainer.fit_loop._combined_loader is None
    assert trainer.fit_loop.epoch_loop.restarting is False
    assert L.LightningModule()._trainer is None
    # In which an error of a run is told from one of a setting.
    assert callable(trainer._run_stage)


def test_an_epoch_asks_for_sigterm_by_the_method_that_is_replaced():
    loop = L.Trainer(accelerator="cpu", logger=False).fit_loop.epoch_loop
    assert callable(loop._broadcast_sigterm_tensor)
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(type(loop))


def test_loops_are_saved_under_the_names_that_are_rewritten():
    loops = L.Trainer(accelerator="cpu", logger=False).fit_loop.state_dict()
    assert "_batches_that_stepped" in loops["epoch_loop.state_dict"]
    for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
        counters = loops[name]["current"].keys()
        assert counters == {"ready", "started", "processed", "completed"}
    assert "is_last_batch" in loops["epoch_loop.batch_progress"]


def test_a_checkpoint_callback_knows_what_it_has_saved_last(tmp_path):
    callback = ModelCheckpoint(tmp_path)
    assert callback._last_global_step_saved == 0
    assert callback._last_checkpoint_saved == ""


def test_a_loader_keeps_its_place_if_it_has_both_methods():
    class Keeps:
        def state_dict(self): ...

        def load_state_dict(self, state): ...

    assert isinstance(Keeps(), _Stateful)
    assert not isinstance([], _Stateful)


def test_the_sharding_strategy_has_the_attributes_that_are_set():
    strategy = ModelParallelStrategy("auto", 1, True)
    assert strategy._save_distributed_checkpoint is True
    assert strategy._data_parallel_size == "auto"


def test_einops_finds_a_backend_among_the_subclasses_of_its_own():
    class Value:
        def __init__(self, shape):
            self.shape = shape

    class Backend(TorchBackend):
        framework_name = __name__

        def is_appropriate_type(self, tensor):
            return isinstance(tensor, Value)

        def reshape(self, x, shape):
            return Value(tuple(shape))

        def transpose(self, x, axes):
            return Value(tuple(x.shape[axis] for axis in axes))

    assert rearrange(Value((2, 6, 3)), "a (b c) d -> d (a b) c", c=2).shape == (3, 6, 2)


def test_pytrees_map_tensors_in_containers_and_in_registered_classes():
    class Pair:
        def __init__(self, first, second):
            self.first, self.second = first, second

    _pytree.register_pytree_node(Pair, lambda pair: ([pair.first, pair.second], None), lambda parts, _: Pair(*parts))
    mapped = _pytree.tree_map_only(Tensor, lambda value: value + 1, {"a": Pair(torch.zeros(1), None)})
    assert mapped["a"].first == 1
    assert mapped["a"].second is None
    assert _pytree.tree_map(lambda a, b: a + b, (1, [2]), (3, [4])) == (4, [6])


def test_foreach_functions_of_torch_work_in_place():
    left, right = [torch.zeros(2)], [torch.ones(2)]
    torch._foreach_lerp_(left, right, 0.25)
    torch.testing.assert_close(left[0], torch.full((2,), 0.25))
    torch._foreach_mul_(left, torch.tensor(4.0))
    torch.testing.assert_close(left[0], torch.ones(2))


def test_the_derivative_of_softmax_is_that_of_autograd():
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gradient, value = torch.linspace(0, 1, 15, dtype=torch.float64).view(3, 5), x.softmax(-1)
    (expected,) = torch.autograd.grad(value, x, gradient)
    torch.testing.assert_close(torch._softmax_backward_data(gradient, value.detach(), -1, torch.float64), expected)


def test_operations_of_torch_have_the_classes_by_which_others_are_told_apart():
    assert isinstance(torch.ops.aten.sin, torch._ops.OpOverloadPacket)
    assert isinstance(torch.ops.aten.sin.default, torch._ops.OpOverload)
    assert not isinstance(torch.sin, torch._ops.OpOverload | torch._ops.OpOverloadPacket)


def test_donated_buffers_are_a_setting_of_the_process():
    assert isinstance(torch._functorch.config.donated_buffer, bool)


def test_a_fused_optimizer_says_that_it_takes_a_scaler():
    parameter = nn.Parameter(torch.zeros(1))
    assert torch.optim.AdamW([parameter], fused=True)._step_supports_amp_scaling is True
    assert not getattr(torch.optim.AdamW([parameter]), "_step_supports_amp_scaling", False)


def test_a_compiled_module_puts_its_prefix_before_names():
    names = torch.compile(nn.Sequential(nn.Linear(1, 1))).state_dict().keys()
    assert names == {"_orig_mod.0.weight", "_orig_mod.0.bias"}


def test_pipelines_and_models_of_diffusers_have_the_attributes_that_are_set():
    for name in ("_execution_device", "_optional_components", "_callback_tensor_inputs"):
        assert hasattr(StableDiffusion3Pipeline, name)
    assert not ModelMixin._supports_gradient_checkpointing
    assert ModelMixin._no_split_modules is None
    for name in ("_get_clip_prompt_embeds", "_get_t5_prompt_embeds"):
        assert callable(getattr(StableDiffusion3Pipeline, name))


def test_a_parser_has_its_options_by_name():
    parser = ArgumentParser()
    parser.add_argument("--size")
    assert "--size" in parser._option_string_actions


def test_every_private_name_in_the_source_is_in_the_table():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "src").rglob("*.py")]
    # These names are public.
    own = {"_replace", "_asdict", "_exit"}.union(*map(_defined, trees))
    used = set().union(*map(_used, trees))
    assert {"_pytree", "_functorch", "_backends", "_signal_connector"} <= used
    documented = set(re.findall(r"_[A-Za-z_]\w*", TABLE))
    assert used - own - documented == set(), "add a row to docs/private-apis.md and a test"


def _defined(tree: ast.Module) -> set[str]:
    """Return the names of functions, classes and attributes that a file defines."""
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    found |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    return found | {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _used(tree: ast.Module) -> set[str]:
    """Return the private names of attributes and imports, those with two underscores left out."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= set(node.module.split("."))
    return {name for name in names if re.fullmatch(r"_[^_].*", name)}
