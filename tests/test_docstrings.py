"""The examples in docstrings give the results that they show."""

import doctest
from importlib import import_module

import pytest

MODULES = (
    "flows.gaussian",
    "guidance",
    "losses.residual",
    "path",
    "samplers.consistency",
    "samplers.euler",
    "samplers.mix",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    """Every module has at least one example, and all of them pass."""
    result = doctest.testmod(import_module(f"decm_lightning.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
