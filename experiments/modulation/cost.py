"""What the networks of the study cost: parameters, multiply-accumulates, and training steps timed in turns."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from conv2former.config import BaseConfig, make_plan
from conv2former.data import Batch
from conv2former.engine.build import build_run
from conv2former.engine.distributed import World
from conv2former.engine.step import FiniteCheck, train_step
from conv2former.tasks.network import build_model
from conv2former.tools.benchmark.networks import count_macs
from conv2former.tools.output import replacing

from ..study import Say
from .plan import Run, Study
from .runs import Results, choose

__all__ = ["Cost", "estimate", "measure_costs"]

CLASSES = 10
ROUNDS = 15


@dataclass(frozen=True)
class Cost:
    """Of one network.

    Attributes:
        parameters: how many it has.
        macs: multiply-accumulates of one image's forward pass.
        seconds: of a training step of the global batch in one process, the median.
        ratio: of that to the first network's, the median of the rounds' ratios.
    """

    parameters: int
    macs: int
    seconds: float
    ratio: float


def measure_costs(study: Study, path: Path, say: Say) -> dict[str, Cost]:
    """Returns the costs of all networks: those in a file, if they are of this machine and these networks.

    Args:
        study: whose networks are measured.
        path: of the file; written if need be.
        say: takes a line before steps are timed.
    """
    world = World(0, 1, World.from_environment().device)
    what = _described(study, world)
    try:
        noted = json.loads(path.read_text())
        if noted["of"] == what:
            return {name: Cost(**cost) for name, cost in noted["costs"].items()}
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or one that somebody has changed
        pass
    say(f"timing {ROUNDS} training steps of each network, in turns ...")
    costs = _measure(study, world)
    with replacing(path) as new:
        content = {"of": what, "costs": {name: asdict(cost) for name, cost in costs.items()}}
        new.write_text(json.dumps(content, indent=2) + "\n")
    return costs


def _described(study: Study, world: World) -> dict[str, Any]:
    """Returns, as JSON has it, what the times depend on."""
    recipe, name = study.recipe, "cpu"
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "batch": recipe.train.batch_size,
        "size": list(recipe.data.preprocessing.size),
        "optimizer": recipe.optim.opt,
        "networks": {network.name: dict(network.model) for network in study.networks},
    }


def _measure(study: Study, world: World) -> dict[str, Cost]:
    size = study.recipe.data.preprocessing.size
    batch_size = study.recipe.train.batch_size
    sizes: dict[str, tuple[int, int]] = {}
    steps: dict[str, Callable[[], object]] = {}
    for network in study.networks:
        run = Run(network.name, True, 0, study.settings[0])
        config = study.config(run)
        model = build_model(config, CLASSES)
        sizes[network.name] = sum(p.numel() for p in model.parameters()), count_macs(model, *size)
        steps[network.name] = _training_step(config, model, batch_size, world)
    seconds = time_in_turns(steps, ROUNDS, world.device)
    first = seconds[study.networks[0].name]
    return {
        name: Cost(
            *sizes[name],
            statistics.median(times),
            statistics.median(a / b for a, b in zip(times, first, strict=True)),
        )
        for name, times in seconds.items()
    }


def _training_step(config: BaseConfig, model: torch.nn.Module, batch_size: int, world: World) -> Callable[[], object]:
    """Returns a step of the run, with its optimizer and average, on random images."""
    images = config.data.preprocessing
    plan = make_plan(config, 1, 100 * batch_size)
    run = build_run(config, plan, world, model)
    batch = Batch(torch.randn(batch_size, images.channels, *images.size), torch.randint(CLASSES, (batch_size,)), [])
    check, done = FiniteCheck.of(run), iter(range(10**9))
    run.model.train()
    return lambda: train_step(run, [batch], next(done), check)


def time_in_turns(
    actions: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Returns the seconds of each action in every round, after one round that does not count.

    Every second round goes backwards, so that what a machine does besides hits all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name in sorted(actions, reverse=bool(number % 2)):
            since = time.perf_counter()
            actions[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - since)
    return seconds


def estimate(study: Study, results: Results, costs: Mapping[str, Cost], images: Mapping[bool, int]) -> dict[Run, float]:
    """Returns about how many seconds each run that is not done will train.

    A network of which a run is done takes as long for each step as that; others as much longer than their measured
    steps as those that are done, on average; if none is, as long as these steps.

    Args:
        study: the runs.
        results: of those that are done.
        costs: of the networks.
        images: training images of final runs (True) and of the tuning (False).
    """

    def steps(run: Run) -> int:
        return make_plan(study.config(run), study.processes, images[run.is_final]).total_steps

    per_step: dict[str, list[float]] = {}
    for run, outcome in results.items():
        if outcome.top1 is not None:
            per_step.setdefault(run.network, []).append(outcome.seconds / steps(run))
    known = {name: statistics.median(values) for name, values in per_step.items()}
    factor = statistics.mean(known[name] / costs[name].seconds for name in known) if known else 1.0
    of = {name: known.get(name, factor * cost.seconds) for name, cost in costs.items()}
    return {run: steps(run) * of[run.network] for run in study.plan(choose(study, results)) if run not in results}
