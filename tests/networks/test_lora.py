"""LoRA on frozen weights: the output, the shared weights, and the saved weights."""

import copy
import sys

import pytest
import torch
from torch import nn

from decm_lightning.networks.embedding import TimeEmbedding
from decm_lightning.networks.lora import LoRANetwork
from decm_lightning.networks.pretrained import describe


class Body(nn.Module):
    """A pretrained model with two projections and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 3)
        self.places = nn.Module()
        self.places.register_buffer("table", torch.randn(3))
        self.end_time: nn.Module | None = None

    def forward(self, x, s):
        h = self.first(x + self.places.table)
        return self.second(h.tanh() if self.end_time is None else h.tanh() + self.end_time(s))


class Line(LoRANetwork):
    """A LoRA network around the model."""

    def __init__(self, body=None, lora_rank=None, targets=None):
        super().__init__(Body() if body is None else body, ["first"])
        self.config = {"body": None, "lora_rank": None, "targets": None}
        self.sample_shape, self.num_classes = (3,), 0
        if lora_rank is not None:
            self.adapt(lora_rank, targets)

    def add_end_time(self):
        self.model.end_time = TimeEmbedding(5, zero_output=True)

    def forward(self, x_t, t, s, condition):
        return self.model(x_t, s)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Line()


@pytest.fixture
def inputs():
    return torch.randn(4, 3), torch.full((4,), 0.2), torch.full((4,), 0.7), None


def trained(network):
    """Return the added parameters after making them nonzero."""
    found = {name: p for name, p in network.named_parameters() if name in network.added}
    for parameter in found.values():
        nn.init.normal_(parameter)
    return found


def test_adapter_adds_its_product(network, inputs):
    """The output is W x + c + B (A x), with the embedding of the end time added."""
    body = network.model
    student = network.with_end_time(lora_rank=2)
    own = trained(student)
    x = inputs[0] + body.places.table
    a, b = (own[f"model.first.lora_{part}.default.weight"] for part in "AB")
    assert a.shape == (2, 3)
    assert b.shape == (5, 2)
    h = x @ body.first.weight.T + body.first.bias + x @ a.T @ b.T
    expected = body.second(h.tanh() + student.model.end_time(inputs[2]))
    torch.testing.assert_close(student(*inputs), expected)


def test_nothing_is_changed_at_first_and_the_original_never(network, inputs):
    before = network(*inputs)
    student = network.with_end_time(lora_rank=2)
    assert torch.equal(student(*inputs), before)
    trained(student)
    assert not torch.allclose(student(*inputs), before)
    assert torch.equal(network(*inputs), before)
    assert network.config["lora_rank"] is None
    assert student.config == {"body": None, "lora_rank": 2, "targets": ["first"]}


def test_copies_share_what_is_frozen_through_moves_and_casts(network):
    student = network.with_end_time(lora_rank=2)
    average = copy.deepcopy(student).requires_grad_(False)
    for one in (student.double(), average.double(), network.double()):
        assert next(one.parameters()).dtype == torch.float64
    for a, b in ((student, average), (student, network)):
        assert a.model.second.weight is b.model.second.weight
        assert a.model.places.table is b.model.places.table
    own, other = (dict(n.named_parameters()) for n in (student, average))
    assert all(own[name] is not other[name] for name in student.added)
    assert {name for name, p in own.items() if p.requires_grad} == student.added
    assert {name for name, p in other.items() if p is not own[name]} == student.added


def test_state_is_what_was_added(network, inputs):
    """This holds for the network alone and inside another module; loading restores the base weights."""
    student, other = network.with_end_time(lora_rank=2), network.with_end_time(lora_rank=2)
    trained(student)
    assert student.state_dict().keys() == student.added
    assert network.state_dict() == {}
    holder, another = nn.ModuleDict({"network": student}), nn.ModuleDict({"network": other})
    state = holder.state_dict()
    assert state.keys() == {f"network.{name}" for name in student.added}
    assert another.load_state_dict(state) == ([], [])
    assert torch.equal(other(*inputs), student(*inputs))


@pytest.mark.parametrize(("change", "message"), [("lose", "Missing key"), ("add", "Unexpected key")])
def test_state_that_does_not_fit_is_refused(change, message, network):
    student = network.with_end_time(lora_rank=2)
    state = student.state_dict()
    if change == "lose":
        del state[min(student.added)]
    else:
        state["model.second.lora_A.default.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=message):
        student.load_state_dict(state)


def test_only_what_was_added_trains(network, inputs):
    student = network.with_end_time(lora_rank=2)
    optimizer = torch.optim.AdamW(student.parameters(), 0.1, weight_decay=0.1)
    before = network.model.second.weight.clone()
    for _ in range(2):
        student(*inputs).square().sum().backward()
        optimizer.step()
    assert {name for name, p in student.named_parameters() if p.grad is not None} == student.added
    assert torch.equal(student.model.second.weight, before)


def test_description_builds_it_again(network):
    student = network.with_end_time(lora_rank=3, targets=["first", "second"])
    arguments = describe(student)
    assert arguments.pop("_class_name").endswith("Line")
    again = Line(**arguments)
    assert again.added == student.added
    assert again.config == student.config


def test_bad_ranks_and_targets_are_refused(network):
    with pytest.raises(ValueError, match=r"lora_rank.*got 0"):
        network.with_end_time(lora_rank=0)
    with pytest.raises(ValueError, match=r"targets .*'third'"):
        network.with_end_time(lora_rank=1, targets=["first", "third"])


def test_missing_peft_is_said(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"peft.*'lora'"):
        network.with_end_time()
