"""What a case consists of: its recipe, what is changed in each row of its table, and the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conv2former._yaml import read_yaml
from conv2former.config import BaseConfig, apply_overrides, check_config, load_config
from conv2former.errors import ConfigError
from conv2former.tasks.network import name_network
from conv2former.tasks.registry import find_task

from ..study import check_count, check_names, check_processes

__all__ = ["Case", "Row", "Run", "read_case"]


@dataclass(frozen=True)
class Row:
    """What is trained with every seed.

    Attributes:
        name: of its folder.
        label: in the table.
        changes: to the recipe, sections of keys.
    """

    name: str
    label: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        row: the name of one.
        seed: of the weights, the order and the augmentation.
    """

    row: str
    seed: int


@dataclass(frozen=True)
class Case:
    """All that decides about the runs.

    Attributes:
        recipe: what they have in common; its batch is that of all processes together.
        rows: those that are trained.
        metrics: what the table shows, labels by the names of metrics.
        per_class: the name of a metric of single classes, as metrics.jsonl has it before the slash.
        size: height and width of the image that multiply-accumulates are counted for; None for a row's crops.
        seeds: how many runs each row has, with the seeds from 0 on.
        output: for the runs and the table.
        processes: that train each run together.
    """

    recipe: BaseConfig
    rows: tuple[Row, ...]
    metrics: Mapping[str, str]
    per_class: str
    size: tuple[int, int] | None
    seeds: int
    output: Path
    processes: int

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def plan(self) -> list[Run]:
        """Returns all runs in their order: every row with the first seed, then with the next."""
        return [Run(row.name, seed) for seed in range(self.seeds) for row in self.rows]

    def config(self, run: Run) -> BaseConfig:
        """Returns the configuration of a run, as each of its processes has it."""
        raw = self.recipe.to_dict()
        for section, keys in self.row(run.row).changes.items():
            raw[section] |= keys
        raw["train"] |= {"seed": run.seed, "batch_size": self.recipe.train.batch_size // self.processes}
        return name_network(check_config(raw, run.row))

    def folder(self, run: Run) -> Path:
        return self.output / run.row / f"seed{run.seed}"


def read_case(
    path: Path,
    data: str,
    output: Path,
    seeds: int,
    only: Sequence[str] = (),
    processes: int = 1,
    overrides: Sequence[str] = (),
) -> Case:
    """Reads a case and checks every configuration that follows from it.

    Args:
        path: of its YAML file.
        data: the folder of the data set.
        output, seeds, processes: see `Case`.
        only: names of rows; none for all.
        overrides: changes to the recipe, `key=value`.

    Raises:
        ConfigError: a mistake in one of these.
    """
    raw = read_yaml(path)
    try:
        rows = tuple(Row(name, one["label"], one.get("changes") or {}) for name, one in raw["rows"].items())
        recipe, metrics, per_class = path.parent / raw["recipe"], dict(raw["metrics"]), str(raw["per_class"])
        height, width = raw.get("size") or (0, 0)
        size = (int(height), int(width)) if height else None
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ConfigError(f"{path}: not a case ({type(e).__name__}: {e}); experiments/real_cases/ has one") from None
    names = [row.name for row in rows]
    check_names("--only", only, names, "row")
    check_count("--seeds", seeds)
    given = apply_overrides({}, overrides)
    for section, key in (("data", "root"), ("train", "seed")):
        if key in (given.get(section) or {}):
            raise ConfigError(f"{section}.{key}: has no effect here; the case sets it for every run")
    config = load_config(recipe, [f"data.root={data}", *overrides])
    unknown = [name for name in metrics if name not in find_task(config).metrics]
    if unknown:
        raise ConfigError(f"{path}: metrics: {config.task} has no {unknown[0]}: {', '.join(find_task(config).metrics)}")
    check_processes(processes, config.train.batch_size)
    chosen = tuple(row for row in rows if row.name in only or not only)
    case = Case(config, chosen, metrics, per_class, size, seeds, output, processes)
    for run in case.plan():
        case.config(run)
    return case
