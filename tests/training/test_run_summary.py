"""The number of floating-point operations that a run begins with, against counts by hand."""

import torch
from torch import nn

from decm_lightning.networks import DiT
from decm_lightning.training.run_summary import forward_flops


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x_t, t, s, condition):
        return self.layer(x_t)


class Attention(Linear):
    def forward(self, x_t, t, s, condition):
        return nn.functional.scaled_dot_product_attention(x_t, x_t, x_t)


class ReadsValues(Linear):
    def forward(self, x_t, t, s, condition):
        return self.layer(x_t) * float(t[0])


def example(*shape: int):
    return torch.zeros(shape), torch.zeros(shape[0]), torch.zeros(shape[0]), None


def test_a_linear_layer_has_a_product_and_a_sum_for_each_weight_and_row():
    assert forward_flops(Linear(), example(3, 6)) == 2 * 6 * 4
    assert forward_flops(Linear(), example(3, 5, 6)) == 5 * 2 * 6 * 4


def test_attention_has_two_products_of_matrices():
    assert forward_flops(Attention(), example(3, 2, 7, 4)) == 2 * (2 * 7 * 7 * 4 * 2)


def test_a_network_that_reads_values_is_not_counted():
    assert forward_flops(ReadsValues(), example(3, 6)) is None


def test_the_operations_of_a_transformer_are_those_of_its_weights_and_attention():
    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    tokens, products = 4, [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    # All weights once per token bounds the layers that see one row: the embeddings of times and the modulation.
    most = tokens * sum(2 * module.weight.numel() for module in products) + 2 * 2 * tokens * tokens * 16
    flops = forward_flops(network, network.example())
    assert flops is not None
    assert most / tokens < flops <= most
