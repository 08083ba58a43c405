"""What the study consists of: its sets, its settings, and the runs, each with its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conv2former._configs import find_config
from conv2former._yaml import read_yaml
from conv2former.config import Config, load_config
from conv2former.config.registry import as_classification
from conv2former.errors import ConfigError

from ..study import check_count, check_names

__all__ = ["PRETRAINING", "Run", "Setting", "SmallSet", "Study", "read_study"]


@dataclass(frozen=True)
class SmallSet:
    """A row of the table.

    Attributes:
        name: of its folders.
        label: in tables.
        images: of which kind: photos, digits, cells, or known, photos of classes that `start` knows and has not seen.
        per_class: training images of each class.
        start: the weights to fine-tune; None for those of the pre-training.
        settings: names of those that it is trained with.
        overrides: of its runs, by dotted keys.
    """

    name: str
    label: str
    images: str
    per_class: int
    start: str | None
    settings: tuple[str, ...]
    overrides: Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """A column of the table.

    Attributes:
        name: of its folders.
        label: in tables.
        recipe: that is trained.
        overrides: what is changed in it, by dotted keys.
        is_extra: whether it is left out unless it is asked for.
    """

    name: str
    label: str
    recipe: str
    overrides: Mapping[str, Any]
    is_extra: bool


@dataclass(frozen=True)
class Run:
    """A training: of a set with a setting, or, without both, the pre-training."""

    set: str
    setting: str
    seed: int


PRETRAINING = Run("", "", 0)


@dataclass(frozen=True)
class Study:
    """All that decides about the runs.

    Attributes:
        sets, settings: those that are trained, by name.
        seeds: how many, from 0 on.
        classes: of the photos, that the network is pre-trained on; the others are the small sets'.
        known: of the photos, the classes of sets of known ones.
        pretraining: the recipe.
        held: validation images of each class, by kind of images.
        common: what all runs on small sets have in common, by dotted keys.
        photos, cells: folders with the images; None for no cells.
        output: for the runs and the tables.
    """

    sets: Mapping[str, SmallSet]
    settings: Mapping[str, Setting]
    seeds: int
    classes: tuple[str, ...]
    known: tuple[str, ...]
    pretraining: Path
    held: Mapping[str, int]
    common: Mapping[str, Any]
    photos: Path
    cells: Path | None
    output: Path

    def plan(self) -> list[Run]:
        """Returns all runs in their order, the pre-training first."""
        return [PRETRAINING] + [
            Run(one.name, setting, seed)
            for seed in range(self.seeds)
            for one in self.sets.values()
            for setting in self.settings
            if setting in one.settings
        ]

    def folder(self, run: Run) -> Path:
        """Returns the run's folder."""
        if run == PRETRAINING:
            return self.output / "pretraining"
        return self.output / "runs" / run.set / run.setting / f"seed{run.seed}"

    def table(self, run: Run) -> Path:
        """Returns the table of the run's images."""
        name = "pretraining" if run == PRETRAINING else f"{run.set}_seed{run.seed}"
        return self.output / "tables" / f"{name}.csv"

    def root(self, run: Run) -> Path:
        """Returns the folder that the paths in this table are relative to."""
        images = "photos" if run == PRETRAINING else self.sets[run.set].images
        return self.photos if images in ("photos", "known") else self.output / "images" / images

    def config(self, run: Run) -> Config:
        """Returns the configuration of a run."""
        own: dict[str, Any] = {"data.source": "csv", "data.root": self.root(run), "data.csv": self.table(run)}
        if run == PRETRAINING:
            return as_classification(load_config(self.pretraining, own))
        one, setting = self.sets[run.set], self.settings[run.setting]
        start = one.start or self.folder(PRETRAINING) / "checkpoints" / "best.pt"
        own |= {"model.checkpoint": start, "train.seed": run.seed}
        values = {**self.common, **setting.overrides, **one.overrides, **own}
        return as_classification(load_config(find_config(setting.recipe), values))


def read_study(
    path: Path,
    photos: Path,
    cells: Path | None,
    output: Path,
    seeds: int = 3,
    sets: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> Study:
    """Reads a study and checks every configuration that follows from it.

    Args:
        path: of the YAML file.
        photos, cells, output, seeds: see `Study`.
        sets, settings: names; none for all but the settings that are extra. Without `cells` the sets of cells are left
            out.

    Raises:
        ConfigError: a mistake in one of these.
    """
    raw = read_yaml(path)
    try:
        columns = {name: Setting(name, one["label"], one["recipe"], one.get("overrides", {}), bool(one.get("extra")))
                   for name, one in raw["settings"].items()}  # fmt: skip
        rows = {
            name: SmallSet(name, one["label"], one["images"], int(one["per_class"]), one.get("start"),
                           tuple(one.get("settings", columns)), one.get("overrides", {}))
            for name, one in raw["sets"].items()
        }  # fmt: skip
        study = Study(
            {name: row for name, row in rows.items()
             if name in (sets or rows) and (row.images != "cells" or cells is not None or sets)},
            {name: column for name, column in columns.items()
             if (name in settings if settings else not column.is_extra)},
            seeds, tuple(raw["pretraining"]["classes"]), tuple(raw["known"]),
            path.parent / raw["pretraining"]["recipe"], raw["validation"], raw["common"], photos, cells, output,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ConfigError(f"{path}: not a study ({type(e).__name__}: {e}); experiments/small_sets/ has one") from None
    for option, given, known in (("--sets", sets, rows), ("--settings", settings, columns)):
        check_names(option, given, known)
    check_count("--seeds", seeds)
    if cells is None and any(row.images == "cells" for row in study.sets.values()):
        raise ConfigError("--sets: blood cells are cut out of a data set in COCO's format; give its folder, --cells")
    for run in study.plan():
        if run.seed == 0:
            study.config(run)
    return study
