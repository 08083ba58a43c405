"""Under which configuration a checkpoint is evaluated: its own data section or another, changed by the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..._preprocessing import FIELDS
from ...config import Config, apply_overrides, check_config, load_config
from ...config.registry import as_classification
from ...config.schema import DataConfig, TrainConfig
from ...data.classes import class_names_of
from ...data.loader import usable_cores
from ...data.sources import VAL_NAMES, is_bare
from ...data.tables import TABLE_ENDINGS, read_class_list
from ...data.tars import COMPRESSED
from ...errors import ConfigError, DataError, counted
from ...models import CheckpointInfo
from ...weights.preprocessing import Preprocessing, candidates
from .files import Extras

__all__ = [
    "OF_TRAIN",
    "PREPROCESSINGS",
    "EvaluationOptions",
    "class_names_for",
    "given_on_command_line",
    "preprocessings_for",
    "settings_for",
]

PREPROCESSINGS = ("checkpoint", "imagenet", "inception", "both")

# of a checkpoint's own data section, what holds for other data too
_OF_ANY_DATA = {*FIELDS, "on_error", "max_skipped", "value_range", "max_image_pixels", "workers"}
OF_TRAIN = {"batch_size", "eval_batch_size", "precision", "channels_last", "cuda_graph", "timeout_minutes"}
# of an evaluation's configuration nothing else is used, so that nothing else can be in conflict
_NEUTRAL = ("augment.mixup=0", "augment.cutmix=0", "augment.first_img_size=null")


@dataclass(frozen=True)
class EvaluationOptions:
    """What `validate.validate_files` was given; see there."""

    config: str | Path | None = None
    overrides: tuple[str, ...] = ()
    use_ema: bool = True
    model: str | Path | None = None
    data: str | Path | None = None
    preprocessing: str | None = None
    among: str | None = None
    extras: Extras = field(default_factory=Extras)


def settings_for(info: CheckpointInfo, path: Path, options: EvaluationOptions) -> Config:
    """Returns the configuration to evaluate under: the file's own data section, or the given one, with overrides."""
    useless = sorted(apply_overrides({}, options.overrides).keys() - {"data", "train"})
    given = given_on_command_line(options.overrides, "data")
    train = given_on_command_line(options.overrides, "train")
    useless += [f"train.{key}" for key in sorted(train.keys() - OF_TRAIN) if key in TrainConfig.model_fields]
    if useless:
        raise ConfigError(
            f"{', '.join(useless)}: no effect on an evaluation, which takes the data section and, of train, "
            f"{', '.join(sorted(OF_TRAIN))}"
        )
    root = [] if options.data is None else [f"data.root={json.dumps(str(options.data))}"]
    words = [*_NEUTRAL, *root, *options.overrides]
    if options.config is not None:
        settings = as_classification(load_config(options.config, words))
    else:
        own = check_config(apply_overrides(_own(info, path, options, given), words), "the configuration")
        settings = as_classification(own)
    located = _located(settings.data)
    if "workers" not in given and located.workers is not None:  # what a training machine has may be more than this one
        located = located.model_copy(update={"workers": min(located.workers, usable_cores())})
    return settings.model_copy(update={"data": located})


def is_table(data: Path) -> bool:
    """Returns whether data is a table of images, by its ending."""
    return data.suffix.lower() in TABLE_ENDINGS and data.is_file()


def check_one_root(data: str | Path | None, overrides: Sequence[str]) -> None:
    """Raises a ConfigError if `--data` and an override both say where images are."""
    if data is not None and "root" in given_on_command_line(overrides, "data"):
        raise ConfigError("--data and data.root are two ways to say the same; give one")


def given_on_command_line(overrides: Sequence[str], section: str) -> dict[str, Any]:
    """Returns the keys of a section that are on the command line."""
    found = apply_overrides({}, overrides).get(section)
    return found if isinstance(found, dict) else {}


def _own(info: CheckpointInfo, path: Path, options: EvaluationOptions, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of the configuration in a checkpoint of this project holds; nothing of another's."""
    sections = {key: info.recipe.get(key) for key in ("data", "train")}
    is_own = info.layout == "conv2former" and all(isinstance(section, dict) for section in sections.values())
    data, train = (dict(section) if is_own else {} for section in sections.values())  # type: ignore[arg-type]
    if {"source", "csv"} & given.keys():  # a list of images, with splits of its own
        data = {key: value for key, value in data.items() if key in _OF_ANY_DATA | {"root"}}
    if options.data is not None:
        data = {key: value for key, value in data.items() if key in _OF_ANY_DATA}
    elif not data.get("root") and "root" not in given:
        raise ConfigError(f"{path} does not say where images are: give --data FOLDER, or data.root=...")
    return {"data": data, "train": {key: value for key, value in train.items() if key in OF_TRAIN}}


def _located(data: DataConfig) -> DataConfig:
    """Returns the data section with its source, where nothing says it, and the split '.' of a folder of classes."""
    found: dict[str, Any] = {}
    root = Path(data.root)
    source: str = data.source
    if "source" not in data.model_fields_set:
        if root.is_file() and root.suffix.lower() in TABLE_ENDINGS and data.csv is None:
            found = {"csv": str(root), "root": str(root.parent)}
        source = found["source"] = "csv" if found or data.csv else _detect(root)
        if source == "folder" and not root.exists():
            raise DataError(f"{root}: no such folder; a data set on the Hugging Face hub is OWNER/NAME")
    if source == "folder" and root.is_dir() and data.val_split is None and not data.holdout:
        if is_bare(root):
            found["val_split"] = "."
        elif not any(entry.is_dir() for entry in root.iterdir()):
            raise DataError(f"{root} has no class folders; expected {root}/CLASS/IMAGE or {root}/val/CLASS/IMAGE")
    return data.model_copy(update=found)


def _detect(root: Path) -> str:
    """Tells the kind of a data set: by the files in a folder and in those right below it, or by the form of a name."""
    if not root.is_dir():
        is_hub_name = not root.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(root)) and not root.parent.exists()
        return "hf" if is_hub_name else "folder"
    try:
        entries = sorted(root.iterdir())
        below = [entry for folder in entries if folder.is_dir() for entry in folder.iterdir()]
    except OSError as e:
        raise DataError(f"{e.filename or root}: cannot be read ({e.strerror})") from None
    names = [entry.name.lower() for entry in (*entries, *below)]
    if any(name.endswith((".tar", *COMPRESSED)) for name in names):
        return "wds"
    if "dataset_dict.json" in names or any(name.endswith((".parquet", ".arrow")) for name in names):
        return "hf"
    is_table = any(entry.stem in VAL_NAMES and entry.suffix.lower() in TABLE_ENDINGS for entry in entries)
    return "csv" if is_table else "folder"


def preprocessings_for(
    info: CheckpointInfo, settings: Config, options: EvaluationOptions
) -> tuple[dict[str, Preprocessing], list[str]]:
    """Returns the preprocessings by name, and the keys of them that were given."""
    wanted = options.preprocessing or "checkpoint"
    if wanted not in PREPROCESSINGS:
        raise ConfigError(f"preprocessing '{wanted}': expected {', '.join(PREPROCESSINGS)}")
    data = settings.data
    keys = set(given_on_command_line(options.overrides, "data"))
    if options.config is not None and options.preprocessing is None:
        keys |= data.model_fields_set
    given = {key: value for key, value in data.given.items() if key in keys}
    data.model_copy(update=dict.fromkeys(set(FIELDS) - keys)).given_for(info.in_chans)
    size = info.preprocessing.img_size
    chosen = {"checkpoint": info.preprocessing, **candidates(given.get("img_size", size), info.in_chans)}
    names = ("imagenet", "inception") if wanted == "both" else (wanted,)
    views = {name: Preprocessing(**{**vars(chosen[name]), **given}) for name in names}
    if len(views) > len(set(views.values())):
        raise ConfigError(f"preprocessing 'both': with {', '.join(given)} given, both are the same")
    unchanged = {"checkpoint": info.preprocessing, **candidates(size, info.in_chans)}
    changed = [key for key in given if any(given[key] != getattr(unchanged[name], key) for name in names)]
    return views, changed


def class_names_for(info: CheckpointInfo, path: Path, data: DataConfig, options: EvaluationOptions) -> list[str] | None:
    """Returns the names of the network's classes: a list that was given, the file's, or ImageNet's."""
    is_given = options.config is not None or "class_names" in given_on_command_line(options.overrides, "data")
    if data.class_names is None or not is_given:
        return class_names_of(info.num_classes, info.class_names)
    listed = read_class_list(Path(data.class_names))
    if len(listed) != info.num_classes:
        raise DataError(
            f"{data.class_names} has {counted(len(listed), 'name')}, {path} has {info.num_classes:,} classes "
            "(data.class_names)"
        )
    return listed
