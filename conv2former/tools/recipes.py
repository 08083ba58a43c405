"""The table of recipes, read from their YAML files: what a file says is in its keys, the rest in its header."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from .._configs import find_recipes
from ..config import BaseConfig, Plan, load_config, make_plan
from ..config.auto import AUTO
from ..errors import ConfigError
from ..tasks.registry import find_task, known_tasks

__all__ = ["Recipe", "find_recipes", "read_recipe", "recipes_table", "run_name"]

PUBLISHED = re.compile(r"^# Published: (none|[\d.]+ % (?:(?:top-1|mIoU) at \d+|box AP))\b", re.MULTILINE)


@dataclass(frozen=True)
class Recipe:
    """A configuration file that is a run, and what its header says.

    Attributes:
        path: the file.
        config: what it resolves to.
        header: the comments above its first key, without the marks, lines joined by blanks.
        published: the result that its header gives, `83.2 % top-1 at 224` or `none`.
        devices: for which the command in the header is.
        plan: batch and rate on these devices; its steps are not those of a run, because the data is not opened. What is
            `auto` is not known.
    """

    path: Path
    config: BaseConfig
    header: str
    published: str
    devices: int
    plan: Plan


def run_name(path: Path) -> str:
    """Returns the name of a recipe's run folder: the file's, with its folder's if it only says what the data is."""
    sources = {source for task in known_tasks() for source in _sources(task.config)}
    return f"{path.resolve().parent.name}_{path.stem}" if path.stem in sources else path.stem


def _sources(config: type[BaseConfig]) -> tuple[str, ...]:
    """Returns what `data.source` may be."""
    section: Any = config.model_fields["data"].annotation
    return get_args(section.model_fields["source"].annotation)


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Raises:
        ConfigError: it has mistakes, or its header has no line `# Published: ...`.
    """
    config = load_config(path)
    lines = path.read_text().splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    header = "\n".join(lines[:end])
    published = PUBLISHED.search(header)
    if published is None:
        raise ConfigError(f"{path}: the header needs a line '# Published: none' or '# Published: 83.2 % top-1 at 224'")
    devices = re.search(r"--nproc-per-node=(\d+)", header)
    world_size = int(devices[1]) if devices else 1
    batch = config.train.batch_size * config.train.accum_steps * world_size
    return Recipe(
        path=path,
        config=config,
        header=re.sub(r"\s*\n#\s*", " ", header.removeprefix("# ")),
        published=published[1],
        devices=world_size,
        plan=make_plan(config, world_size, num_train_images=batch),
    )


def recipes_table(configs: Path) -> str:
    """Returns a Markdown table of all recipes below a folder of configurations.

    Raises:
        ConfigError: a recipe has mistakes, or its header does not say what is published.
    """
    rows = [
        "| recipe | model | start weights | data | size | epochs | global batch | peak rate | published |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in find_recipes(configs):
        recipe = read_recipe(path)
        config, plan = recipe.config, recipe.plan
        model, data = config.model, config.data
        network = f"`{model.variant['name'] if model.variant else model.name}`"
        if network == "`auto`":
            network = "the file's"
        start = f"`{model.checkpoint}`" if model.checkpoint else "random"
        known = find_task(config).known_classes(config)
        classes = f"{known:,} classes" if known else "classes found"
        batch = f"{plan.global_batch_size} = {config.train.batch_size} x {config.train.accum_steps} x {recipe.devices}"
        epochs = AUTO if "schedule.epochs" in config.auto else plan.epochs
        rate = AUTO if "optim.base_lr" in config.auto else f"{plan.lr:g}"
        rows.append(
            f"| `{path.relative_to(configs)}` | {network} | {start} | {data.source}, {classes} | {config.size_shown} | "
            f"{epochs} | {batch} | {rate} | {recipe.published} |"
        )
    return "\n".join(rows)
