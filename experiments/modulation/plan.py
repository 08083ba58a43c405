"""What the study consists of: its networks, the settings of the tuning, and the runs, each with its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conv2former._yaml import read_yaml
from conv2former.config import Config, apply_overrides, check_config, load_config
from conv2former.config.registry import as_classification
from conv2former.config.schema import NO_SPLIT
from conv2former.errors import ConfigError

from ..study import check_count, check_names, check_processes

__all__ = ["HUB", "Network", "Run", "Setting", "Study", "read_study"]

HUB = "hf"  # as the place of the data: the hub's CIFAR-10
_HUB_DATA = {"source": "hf", "root": "uoft-cs/cifar10", "image_key": "img", "label_key": "label"}
# keys that the study sets itself
_OWN_KEYS = ("data.root", "data.source", "data.val_split", "data.holdout", "data.holdout_seed", "train.seed", "model")

Setting = tuple[tuple[str, float], ...]  # keys of `optim` and their values


@dataclass(frozen=True)
class Network:
    """One of those that are compared.

    Attributes:
        name: of its folders.
        label: in tables.
        model: the section `model` of its runs, over the recipe's.
    """

    name: str
    label: str
    model: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        network: the name of one.
        is_final: on all training images, evaluated on the validation split; or else of the tuning.
        seed: of the weights, the order and the augmentation.
        setting: None of a final run as long as the tuning has not decided.
    """

    network: str
    is_final: bool
    seed: int
    setting: Setting | None


@dataclass(frozen=True)
class Study:
    """All that decides about the runs.

    Attributes:
        recipe: what they have in common; its batch is that of all processes together.
        networks: all; the first is what the others are compared with.
        only: the names of those that are trained.
        settings: that each network is tuned over.
        holdout: share of the training images that the tuning is evaluated on.
        tuning_seed: of all runs of the tuning.
        seeds: how many final runs each network has, with the seeds from 0 on.
        output: for the runs and the tables.
        processes: that train each run together.
        tuning_epochs: of the runs of the tuning; None for as many as the recipe has.
    """

    recipe: Config
    networks: tuple[Network, ...]
    only: tuple[str, ...]
    settings: tuple[Setting, ...]
    holdout: float
    tuning_seed: int
    seeds: int
    output: Path
    processes: int = 1
    tuning_epochs: int | None = None

    def network(self, name: str) -> Network:
        """Returns the network of that name."""
        return next(network for network in self.networks if network.name == name)

    def plan(self, chosen: Mapping[str, Setting]) -> list[Run]:
        """Returns all runs in their order: network after network for each setting, then for each seed.

        Args:
            chosen: the settings of the final runs, by network, as far as they are known.
        """
        tuning = [Run(name, False, self.tuning_seed, setting) for setting in self.settings for name in self.only]
        return tuning + [Run(name, True, seed, chosen.get(name)) for seed in range(self.seeds) for name in self.only]

    def config(self, run: Run) -> Config:
        """Returns the configuration of a run, as each of its processes has it."""
        raw = self.recipe.to_dict()
        raw["model"] |= self.network(run.network).model
        raw["optim"] |= dict(run.setting or ())
        raw["train"] |= {"seed": run.seed, "batch_size": self.recipe.train.batch_size // self.processes}
        if not run.is_final:
            raw["data"] |= {"val_split": NO_SPLIT, "holdout": self.holdout}
            raw["schedule"]["epochs"] = self.tuning_epochs or self.recipe.schedule.epochs
        return as_classification(check_config(raw, run.network))

    def folder(self, run: Run) -> Path:
        """Returns the run's folder. That of a final run has its setting, so that another choice is another run."""
        assert run.setting is not None
        words = "_".join(f"{key}={value:g}" for key, value in run.setting)
        if run.is_final:
            return self.output / "final" / run.network / words / f"seed{run.seed}"
        return self.output / "tuning" / run.network / words


def read_study(
    path: Path,
    data: str,
    output: Path,
    seeds: int = 3,
    epochs: int | None = None,
    only: Sequence[str] = (),
    processes: int = 1,
    overrides: Sequence[str] = (),
    tuning_epochs: int | None = None,
) -> Study:
    """Reads a study and checks every configuration that follows from it.

    Args:
        path: of the YAML file.
        data: a folder with the photos in train/CLASS and val/CLASS, or `hf`.
        output: for the runs and the tables.
        seeds: see `Study`.
        epochs: of every run; None for the recipe's.
        only: names of networks; none for all.
        processes: see `Study`.
        overrides: changes to the recipe, `key=value`.
        tuning_epochs: see `Study`.

    Raises:
        ConfigError: a mistake in one of these.
    """
    raw = read_yaml(path)
    try:
        networks = tuple(Network(name, one["label"], one["model"]) for name, one in raw["networks"].items())
        tuning, recipe = raw["tuning"], path.parent / raw["recipe"]
        settings = tuple(tuple((key, float(v)) for key, v in one.items()) for one in tuning["settings"])
        holdout, seed = float(tuning["holdout"]), int(tuning["seed"])
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ConfigError(f"{path}: not a study ({type(e).__name__}: {e}); experiments/modulation/ has one") from None
    names = [network.name for network in networks]
    check_names("--only", only, names, "network")
    check_count("--seeds", seeds)
    if tuning_epochs is not None:
        check_count("--tuning-epochs", tuning_epochs)
    config = _recipe(recipe, data, epochs, overrides)
    check_processes(processes, config.train.batch_size)
    chosen = tuple(name for name in names if name in only or not only)
    study = Study(config, networks, chosen, settings, holdout, seed, seeds, output, processes, tuning_epochs)
    for run in study.plan(dict.fromkeys(names, settings[0]) if settings else {}):
        study.config(run)
    return study


def _recipe(path: Path, data: str, epochs: int | None, overrides: Sequence[str]) -> Config:
    given = apply_overrides({}, overrides)
    for key in _OWN_KEYS:
        section, _, name = key.partition(".")
        if section in given and (not name or name in (given[section] or {})):
            raise ConfigError(f"{key}: has no effect here; the study sets it for every run (--data, study.yaml)")
    place = _HUB_DATA if data == HUB else {"source": "folder", "root": data}
    words = [f"data.{key}={value}" for key, value in place.items()]
    words += [] if epochs is None else [f"schedule.epochs={epochs}"]
    return as_classification(load_config(path, [*words, *overrides]))
