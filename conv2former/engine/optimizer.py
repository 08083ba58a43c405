"""The optimizer of a run and the schedule of its learning rate."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from timm.optim import Muon, create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from .._yaml import cut
from ..config import BaseConfig, Plan
from ..errors import ConfigError, closest, first_line
from .muon import GroupedMuon

__all__ = ["build_optimizer", "build_scheduler", "optimizer_args"]

# arguments of optimizers that `optim.args` does not set, and what does
TAKEN = {
    "betas": "set optim.betas",
    "eps": "set optim.eps",
    "foreach": "the loop chooses it",
    "fused": "the loop chooses it",
    "layer_decay": "set optim.layer_decay",
    "lr": "set optim.base_lr",
    "momentum": "set optim.momentum",
    "param_group_fn": "the loop makes the groups",
    "params": "the loop makes the groups",
    "weight_decay": "set optim.weight_decay",
}
# before an optimizer's name: every 6 steps the weights go back half of the way to where they were 6 steps before
LOOKAHEAD = "lookahead_"


def build_optimizer(config: BaseConfig, plan: Plan, model: nn.Module) -> torch.optim.Optimizer:
    """Builds the configured optimizer for what is trained of a network, in parameter groups by decay."""
    optim = config.optim
    optimizer = create_optimizer_v2(
        model,
        optim.opt,
        lr=plan.lr,
        weight_decay=optim.weight_decay,
        layer_decay=optim.layer_decay,
        **optimizer_args(config),
    )
    return GroupedMuon.of(optimizer) if type(optimizer) is Muon else optimizer


def build_scheduler(config: BaseConfig, plan: Plan, optimizer: torch.optim.Optimizer) -> Any:
    """Builds the schedule of the learning rate, by steps: linear warm-up, the way down, and a constant end.

    It has no state: `step_update(step)` sets the rate from the number of the step alone.
    """
    schedule = config.schedule
    decay: dict[str, dict[str, Any]] = {
        "cosine": {"sched": "cosine"},
        "linear": {"sched": "poly", "decay_rate": 1.0},  # which is the power
        "multistep": {
            "sched": "multistep",
            "decay_rate": schedule.gamma,
            "decay_milestones": _milestones(config, plan),
        },
    }
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=schedule.epochs,
        warmup_epochs=schedule.warmup_epochs,
        warmup_lr=schedule.warmup_lr,
        min_lr=schedule.min_lr,
        cooldown_epochs=schedule.cooldown_epochs,
        step_on_epochs=False,
        updates_per_epoch=plan.steps_per_epoch,
        **decay[schedule.decay],
    )
    return scheduler


def _milestones(config: BaseConfig, plan: Plan) -> list[float]:
    """Returns the milestones, in epochs, as timm is to be given them.

    It multiplies them by the steps of an epoch and compares them with the number of the step plus one: a milestone of 2
    epochs of 5 steps would lower the rate from step 9 on, the last of the second epoch, and rounding could move it.
    Half a step more lowers it from step 10 on, whatever the rounding.
    """
    steps = plan.steps_per_epoch
    return [(round(milestone * steps) + 0.5) / steps for milestone in config.schedule.milestones]


def optimizer_args(config: BaseConfig) -> dict[str, Any]:
    """Returns the optional arguments of the configured optimizer: those that are set, and `fused` where it exists.

    `optim.args` are among them.

    Raises:
        ConfigError: there is no such optimizer, it has no such argument, or it cannot be used in this loop.
    """
    optim = config.optim
    info = get_optimizer_info(_optimizer_name(optim.opt))
    if info.second_order:
        raise ConfigError(f"optim.opt: {optim.opt} needs second derivatives, which this loop does not compute")
    optional: dict[str, tuple[Any, bool]] = {
        "betas": (optim.betas, info.has_betas),
        "eps": (optim.eps, info.has_eps),
        "momentum": (optim.momentum, info.has_momentum),
    }
    for key, (value, is_known) in optional.items():
        if value is not None and not is_known:
            raise ConfigError(f"optim.{key}: {optim.opt} has none; leave it out")
    # empty where it is of another package, which may not be here
    known = list(inspect.signature(info.opt_class).parameters) if isinstance(info.opt_class, type) else []
    _check_further(config, known)
    args = {**optim.args, **{key: value for key, (value, _) in optional.items() if value is not None}}
    if "fused" in known:
        args["fused"] = True  # one kernel, and it can leave a step out by itself; see step.FiniteCheck
    try:
        weight = nn.Parameter(torch.zeros(8, 8))  # smaller ones are no matrices for timm's Muon
        trial = create_optimizer_v2([weight], optim.opt, lr=1e-3, **args)
        if optim.args:  # whose values some only look at in a step
            weight.grad = torch.zeros_like(weight)
            trial.step()
    except Exception as e:  # an assertion or an import error: some need a package that is not here
        what = f"{optim.opt} with these optim.args" if optim.args else optim.opt
        raise ConfigError(f"optim.opt: {what} cannot be used here: {first_line(e)}") from None
    return args


def _check_further(config: BaseConfig, known: list[str]) -> None:
    """Checks the names in `optim.args`.

    Args:
        config: the run.
        known: names of the optimizer's arguments; empty for not known.

    Raises:
        ConfigError: the optimizer has no such argument, or another key sets it.
    """
    for key in config.optim.args:
        if key in TAKEN:
            raise ConfigError(f"optim.args.{cut(key)}: is not set here; {TAKEN[key]}")
        if known and key not in known:
            free = [name for name in known if name not in TAKEN]
            raise ConfigError(
                f"optim.args: {config.optim.opt} has no '{cut(key)}'{closest(key, free)}: {', '.join(free)}"
            )


def _optimizer_name(opt: str) -> str:
    """Returns timm's name of an optimizer, without the prefix `lookahead_`.

    Raises:
        ConfigError: there is none of that name. timm reads a name only up to its first and from its last underscore,
            and would take others for what they are not.
    """
    names = [str(name) for name in list_optimizers()]
    name = opt.lower()
    if (base := name.removeprefix(LOOKAHEAD)) in names:
        return base
    near = closest(name, [*names, *(LOOKAHEAD + known for known in names)])
    raise ConfigError(f"optim.opt: timm has no optimizer '{cut(opt)}'{near}")
