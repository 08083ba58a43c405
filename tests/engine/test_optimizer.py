"""The configured optimizer gets what is configured for it, and nothing that it does not have."""

from __future__ import annotations

import pytest
from torch import nn

from conv2former.config import apply_overrides, check_config
from conv2former.config.resolve import Plan
from conv2former.engine.optimizer import build_optimizer, optimizer_args
from conv2former.errors import ConfigError


def config_of(*words: str):
    return check_config(apply_overrides({"data": {"root": "photos"}}, words), "a test")


@pytest.mark.parametrize(
    ("opt", "key", "given", "expected", "default"),
    [
        ("sgd", "momentum", "0.6", 0.6, 0.9),
        ("nmuon", "momentum", "0.6", 0.6, 0.9),
        ("adamw", "betas", "[0.8,0.99]", (0.8, 0.99), (0.9, 0.999)),
        ("adamw", "eps", "1e-6", 1e-6, 1e-8),
    ],
)
def test_optional_arguments_reach_the_optimizer(opt, key, given, expected, default):
    plan = Plan(global_batch_size=8, lr=0.1, steps_per_epoch=1, epochs=1)
    for words, value in (((), default), ((f"optim.{key}={given}",), expected)):
        optimizer = build_optimizer(config_of(f"optim.opt={opt}", *words), plan, nn.Linear(4, 4))
        assert {tuple(v) if isinstance(v := group[key], list) else v for group in optimizer.param_groups} == {value}


@pytest.mark.parametrize(("opt", "key", "given"), [("adamw", "momentum", "0.6"), ("sgd", "betas", "[0.8,0.99]")])
def test_an_argument_that_the_optimizer_lacks_is_a_mistake(opt, key, given):
    with pytest.raises(ConfigError, match=f"optim.{key}: {opt} has none; leave it out"):
        optimizer_args(config_of(f"optim.opt={opt}", f"optim.{key}={given}"))
