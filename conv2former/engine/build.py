"""Puts a run together, in the one order that works, from a checked configuration."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn

from .. import graphs
from ..compiling import private_folder
from ..config import BaseConfig, Plan
from ..errors import ConfigError, UserError, memory_for, raise_mistakes, shorten
from ..models.others import overwriting_convolution
from ..tasks.network import SMALLER, find_network
from ..tasks.registry import find_task
from ..tasks.task import Objective, Task
from .cuda_graph import StepGraphs, plan_graphs
from .distributed import World, wrap
from .optimizer import build_optimizer, build_scheduler, optimizer_args
from .trackers import missing_trackers

__all__ = ["Run", "autocast_for", "build_run", "check_names", "fit_memory_format"]

Autocast = Callable[[], AbstractContextManager]
C = TypeVar("C", bound=BaseConfig)


@dataclass
class Run:
    """Everything that a training step touches.

    Attributes:
        task: what it is trained for.
        model: the raw network; what is saved, averaged and evaluated.
        forward: the network to train through, wrapped where there are several processes.
        parameters: of the network, those that are trained.
        ema: the average, or None.
        objective: makes inputs and targets of a batch, and the loss of them.
        graphs: computes microbatches through CUDA graphs; None where there are none.
        about_graphs: a line on whether there are; '' where nobody asks.
    """

    config: BaseConfig
    task: Task
    plan: Plan
    world: World
    model: nn.Module
    forward: nn.Module
    parameters: list[nn.Parameter]
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    objective: Objective
    autocast: Autocast
    graphs: StepGraphs | None
    about_graphs: str

    def autocast_forward(self, *args: Any) -> Any:
        """Returns what the network to train through does in the run's precision."""
        with self.autocast():
            return self.forward(*args)

    def release(self) -> None:
        """Gives up the graphs, which must be before the process group ends."""
        if self.graphs:
            self.graphs.reset()


def autocast_for(precision: str, device: torch.device) -> tuple[str, Autocast]:
    """Returns the precision in effect, `auto` decided, and what makes its context."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return precision, partial(torch.autocast, device.type, dtype=dtype, enabled=precision != "fp32")


def fit_memory_format(config: C, model: nn.Module, device: torch.device) -> tuple[C, list[str]]:
    """Returns the configuration without `train.channels_last` where PyTorch would crash with it, and a line on that."""
    if device.type != "cpu" or not config.train.channels_last or not (name := overwriting_convolution(model)):
        return config, []
    train = config.train.model_copy(update={"channels_last": False})
    return config.model_copy(update={"train": train}), [
        f"train.channels_last: false on this CPU, where PyTorch's gradient of {name}, a 1 x 1 convolution of few "
        "channels with a stride, would overwrite other memory"
    ]


def build_run(config: BaseConfig, plan: Plan, world: World, model: nn.Module, statistics: Any = None) -> Run:
    """Builds all that trains a network. Every process builds the same.

    Args:
        config: the run.
        plan: its numbers.
        world: the processes, met.
        model: of the task; moved to the device.
        statistics: of the training data, as the task has them; None where they are not known.
    """
    task = find_task(config)
    _, autocast = autocast_for(config.train.precision, world.device)
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.train.tf32
        torch.backends.cudnn.deterministic = True  # else a run that is repeated or resumed may have other bits
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    with memory_for(f"the network on {world.device}", SMALLER):
        model.to(world.device)
        model.to(memory_format=memory_format)
    if config.train.batchnorm == "sync" and world.size > 1:
        model = convert_sync_batchnorm(model)
    task.freeze(model, config.model.freeze)
    ema = ModelEmaV3(model, decay=config.ema.decay, use_warmup=config.ema.warmup) if config.ema.decay else None
    optimizer = build_optimizer(config, plan, model)
    through = _compile(task, model) if config.train.compile else model
    step_graphs, about_graphs = plan_graphs(config, world, model)
    if step_graphs and world.size > 1:  # the wrapper keeps nodes of autograd, which belong to a stream
        forward = step_graphs.recorder.warm_up(partial(wrap, through, world))
    else:
        forward = wrap(through, world)
    return Run(
        config=config,
        task=task,
        plan=plan,
        world=world,
        model=model,
        forward=forward,
        parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        ema=ema,
        optimizer=optimizer,
        scheduler=build_scheduler(config, plan, optimizer),
        scaler=torch.amp.GradScaler(world.device.type, enabled=config.train.precision == "fp16"),
        objective=task.objective(config, plan, world.device, model, statistics),
        autocast=autocast,
        graphs=step_graphs,
        about_graphs=about_graphs,
    )


def _compile(task: Task, model: nn.Module) -> nn.Module:
    """Returns what to train a network through with torch.compile, whose code is kept in the store.

    What the environment says goes first. In torch's default, a folder below /tmp, the code is gone at the next start of
    a machine, and anybody could have made that folder first. Some imports of torch's put it into the environment.
    """
    default = os.path.join(tempfile.gettempdir(), "torchinductor_")
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default).startswith(default):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_folder("inductor"))
    return task.compile_model(model)


def check_names(config: BaseConfig, device: torch.device) -> None:
    """Checks all that needs more than the schema, before the data is opened, which can take minutes.

    Raises:
        ConfigError: lists every mistake: the network, the optimizer, what does not go with the device.
    """
    mistakes: list[str | UserError] = []
    for check in (find_network, optimizer_args, find_task(config).check):
        try:
            check(config)
        except ConfigError as e:
            mistakes.append(e)
    if config.train.batchnorm == "sync" and device.type != "cuda":
        mistakes.append("train.batchnorm: sync needs GPUs; use average on CPUs")
    if config.train.cuda_graph == "on" and not graphs.can_capture(device):
        mistakes.append("train.cuda_graph: on needs an NVIDIA GPU, and torch sees none here; leave it at auto")
    if missing := missing_trackers(config.log.trackers):
        extras = ",".join(missing)
        mistakes.append(
            f'log.trackers: not installed: {shorten(missing)}; pip install "conv2former[{extras}]", or leave it out'
        )
    if len(mistakes) == 1:
        raise ConfigError(*(mistakes[0].lines if isinstance(mistakes[0], UserError) else mistakes))
    raise_mistakes("the configuration", mistakes)
