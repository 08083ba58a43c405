"""The configured optimizer gets what is configured for it, and the rate falls as it is written down."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conv2former.config import apply_overrides, check_config
from conv2former.config.resolve import Plan, fit_auto
from conv2former.engine.optimizer import build_optimizer, build_scheduler, optimizer_args
from conv2former.engine.summary import describe
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


def test_further_arguments_reach_the_optimizer():
    plan = Plan(global_batch_size=8, lr=0.1, steps_per_epoch=1, epochs=1)
    for words, steps in (((), 5), (("optim.args={ns_steps: 3}",), 3)):
        for name in ("muon", "lookahead_muon"):
            optimizer = build_optimizer(config_of(f"optim.opt={name}", *words), plan, nn.Linear(4, 4))
            assert {group["ns_steps"] for group in optimizer.param_groups} == {steps}


@pytest.mark.parametrize(
    ("opt", "args", "message"),
    [
        ("muon", "{ns_step: 3}", r"optim\.args: muon has no 'ns_step' \(did you mean 'ns_steps'\?\): nesterov, "),
        ("adamw", "{ns_steps: 3}", r"optim\.args: adamw has no 'ns_steps'"),
        ("adamw", "{lr: 1}", r"optim\.args\.lr: is not set here; set optim\.base_lr"),
        ("adamw", "{fused: false}", r"optim\.args\.fused: is not set here; the loop chooses it"),
        ("muon", "{ns_coefficients: nothing}", "optim.opt: muon with these optim.args cannot be used here: "),
    ],
)
def test_further_arguments_that_the_optimizer_does_not_take(opt, args, message):
    with pytest.raises(ConfigError, match=message):
        optimizer_args(config_of(f"optim.opt={opt}", f"optim.args={args}"))


def rates_of(*words: str, steps_per_epoch: int = 10, lr: float = 1.0) -> list[float]:
    """Returns the rate of every step of a run, of a parameter whose layer has half of it."""
    config = config_of(*words)
    schedule = config.schedule
    plan = Plan(1, lr, steps_per_epoch, schedule.epochs + schedule.cooldown_epochs)
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 0.5}], lr=lr)
    scheduler, found = build_scheduler(config, plan, optimizer), {}
    for step in reversed(range(plan.total_steps)):  # in any order: a step's rate is a function of its number
        scheduler.step_update(step)
        found[step] = 2 * optimizer.param_groups[0]["lr"]
    return [found[step] for step in range(plan.total_steps)]


LENGTH = (
    "optim.base_lr=1",
    "schedule.epochs=4",
    "schedule.cooldown_epochs=1",
    "schedule.warmup_lr=0",
    "schedule.min_lr=0.2",
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # 40 steps from 1 to 0.2, 0.02 a step, and the warm-up is their beginning: it goes up to 1, not to the line
        (["decay=linear", "warmup_epochs=0"], {0: 1.0, 1: 0.98, 10: 0.8, 25: 0.5, 39: 0.22, 40: 0.2, 49: 0.2}),
        (["decay=linear", "warmup_epochs=1"], {0: 0.0, 5: 0.5, 9: 0.9, 10: 0.8, 11: 0.78, 39: 0.22, 40: 0.2}),
        # 0.2 + 0.8 x (1 + cos(a)) / 2, a a quarter, a half and three quarters of pi
        (["decay=cosine", "warmup_epochs=1"], {5: 0.5, 10: 0.2 + 0.4 * (1 + 0.5**0.5), 20: 0.6, 40: 0.2}),
        (["warmup_epochs=0"], {0: 1.0, 20: 0.6, 30: 0.2 + 0.4 * (1 - 0.5**0.5), 49: 0.2}),
        (
            ["decay=multistep", "milestones=[2,3]", "warmup_epochs=1"],
            {0: 0.0, 5: 0.5, 10: 1.0, 19: 1.0, 20: 0.1, 29: 0.1, 30: 0.01, 39: 0.01, 40: 0.01, 49: 0.01},
        ),
        # parts of an epoch, to the nearest step: 12.5 (to the even one) and 36.7
        (
            ["decay=multistep", "milestones=[1.25,3.67]", "gamma=0.5", "warmup_epochs=0"],
            {0: 1.0, 11: 1.0, 12: 0.5, 36: 0.5, 37: 0.25, 49: 0.25},
        ),
    ],
)
def test_the_rate_of_single_steps(words, expected):
    rates = rates_of(*LENGTH, *(f"schedule.{word}" for word in words))
    assert {step: rates[step] for step in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 11, 71, 142, 1263, 7330])
def test_a_milestone_is_the_first_step_of_its_epoch(steps_per_epoch):
    """Whatever an epoch is divided into: rounding moves none."""
    words = ("decay=multistep", "milestones=[3,7,11]", "epochs=12", "warmup_epochs=0", "cooldown_epochs=0")
    rates = rates_of(*(f"schedule.{word}" for word in words), steps_per_epoch=steps_per_epoch)
    falls = [step for step in range(1, len(rates)) if rates[step] != rates[step - 1]]
    assert falls == [3 * steps_per_epoch, 7 * steps_per_epoch, 11 * steps_per_epoch]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["decay=cosin"], "schedule.decay: input should be 'cosine', 'linear' or 'multistep', found 'cosin'"),
        (["sched=linear"], r"schedule.sched: unknown key \(did you mean 'schedule.decay'\?\)"),
        (["milestone=[2]"], r"schedule.milestone: unknown key \(did you mean 'milestones'\?\)"),
        (["milestones=[2]"], "schedule.milestones: only with schedule.decay multistep, not cosine"),
        (["decay=linear", "gamma=0.5"], "schedule.gamma: only with schedule.decay multistep, not linear"),
        (["decay=multistep"], r"schedule.milestones: missing; .* give the epochs, such as \[8, 11\]"),
        (["decay=multistep", "milestones=[8,8]"], r"milestones: each must be above the one before: \[8, 8\]"),
        (["decay=multistep", "milestones=[9,8.5]"], r"milestones: each must be above the one before: \[9, 8.5\]"),
        (["decay=multistep", "milestones=[5,8]"], "milestones: must be above schedule.warmup_epochs: 5 of 5"),
        (["decay=multistep", "milestones=[6,300]"], "milestones: must be below schedule.epochs: 300 of 300"),
        (["decay=multistep", "milestones=8"], "schedule.milestones: input should be a valid tuple, found 8"),
        (["decay=multistep", "milestones=[0]"], "schedule.milestones.0: input should be greater than 0, found 0"),
        (["decay=multistep", "milestones=[8]", "gamma=1"], "schedule.gamma: input should be less than 1, found 1"),
    ],
)
def test_mistakes_in_a_schedule(words, expected):
    with pytest.raises(ConfigError, match=expected):
        config_of(*(f"schedule.{word}" for word in words))


def test_milestones_of_a_run_whose_length_is_open():
    """They are compared with the epochs once these are known."""
    words = ("decay=multistep", "milestones=[2,6]", "epochs=auto", "warmup_epochs=auto")
    config = config_of(*(f"schedule.{word}" for word in words))
    with pytest.raises(ConfigError, match=r"milestones: must be above schedule\.warmup_epochs: 2 of 3"):
        fit_auto(config, 1, 10**6)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ", adamw"),
        (["decay=linear", "min_lr=0"], ", adamw, in a straight line to 0"),
        (["decay=multistep", "milestones=[8,11.5]"], ", adamw, times 0.1 after epochs 8, 11.5"),
    ],
)
def test_a_run_says_how_the_rate_falls(words, expected):
    config = config_of(*(f"schedule.{word}" for word in words))
    assert describe(config, Plan(8, 0.1, 1, 1), 1)[2].endswith(expected)
