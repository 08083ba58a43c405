"""Evaluates segmentations' checkpoints: images against masks, whole or in windows, as their training did."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..._preprocessing import FIELDS
from ...config import apply_overrides, check_config, load_config
from ...data import batches
from ...data.loader import usable_cores
from ...data.split import VAL_NAMES
from ...data.tables import TABLE_ENDINGS
from ...engine.build import autocast_for
from ...engine.distributed import World
from ...errors import ConfigError, DataError, closest, shorten
from ...models import CheckpointInfo
from ...tasks.segmentation.check import check_source
from ...tasks.segmentation.config import SegmentationConfig
from ...tasks.segmentation.evaluation import MaskEvaluation, MaskEvaluator
from ...tasks.segmentation.layouts import LAYOUTS
from ...tasks.segmentation.loader import eval_loader
from ...tasks.segmentation.network import SegmentationNetwork
from ...tasks.segmentation.pairs import PairSource
from ...tasks.segmentation.restore import restore_network
from ...tasks.segmentation.sources import open_split
from ...weights.reading import read_checkpoint
from .files import Extras
from .masks import write_mask_extras
from .run import Announce, measure, run_evaluations
from .settings import OF_TRAIN, check_one_root, given_on_command_line, is_table

__all__ = ["MaskValidation", "validate_masks"]

# of a checkpoint's own data section, what holds for other data, too
_OF_ANY_DATA = {
    *FIELDS, "on_error", "max_skipped", "value_range", "max_image_pixels", "workers", "check", "labels", "ignore_index",
    "short_side",
}  # fmt: skip
# of an evaluation's configuration nothing else is used, so that nothing else can be in conflict
_NEUTRAL = ("model.head={name: fpn}", "loss.class_weights=none", "augment.scale=[1,1]")


def validate_masks(
    checkpoints: Sequence[str | Path],
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    use_ema: bool = True,
    *,
    model: str | Path | None = None,
    data: str | Path | None = None,
    preprocessing: str | None = None,
    among: str | None = None,
    extras: Extras | None = None,
    output: str | Path | None = None,
    announce: Announce | None = None,
    contents: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """As `validate.validate_files`, of checkpoints of segmentations.

    Args:
        checkpoints: files of training, or their average.
        config: a configuration whose sections data and evaluation to use; None for those in the file.
        overrides: changes to them, `evaluation.mode=slide`.
        use_ema: evaluate the averaged weights where a file has them.
        model: a variant, or its YAML file, that the backbone must be.
        data: in place of `data.root`; then where the data is, is not taken from the checkpoint.
        preprocessing, among: of classifiers; anything but their defaults is an error.
        extras: what else to find out; it needs files.
        output, announce, contents: see there.

    Returns:
        A row for each file: `miou`, `pixel_accuracy` and `mean_accuracy` in percent, `loss` and `n`, as
        `MaskEvaluation`; `per_class`, for each class its `pixels`, `iou`, `recall`, `predicted` pixels and `precision`;
        and what was evaluated, see docs/segmentation.md.

    Raises:
        UserError: a file, the configuration, the data or the folder is wrong, or they do not go together.
    """
    extras = extras or Extras()

    def prepare() -> list[MaskValidation]:
        _check_options(preprocessing, among, extras)
        check_one_root(data, overrides)
        keep = len(checkpoints) == 1
        found = []
        for path in map(Path, checkpoints):
            network, info = restore_network(contents.pop() if contents else read_checkpoint(path), path, use_ema, model)
            settings = settings_for(info, config, overrides, data)
            try:
                source = _open(settings, info, path)
            except DataError as e:
                raise (e if keep else e.below(path)) from None
            found.append(
                MaskValidation(path, info, settings, source, use_ema, model, extras, [network] if keep else [])
            )
        return found

    return run_evaluations(prepare, extras.folder_for(output), announce)


def _check_options(preprocessing: str | None, among: str | None, extras: Extras) -> None:
    """Raises a ConfigError if something is asked for that a segmentation does not have."""
    asked = {
        "--preprocessing": preprocessing not in (None, "checkpoint"),
        "--among": among not in (None, "all"),
        "--real": extras.real,
        "--calibration": extras.calibration,
    }
    for option, is_given in asked.items():
        if is_given:
            raise ConfigError(f"{option}: of classifiers, and this is a segmentation; leave it out")


# ------------------------------------------------------------------------------------------------------------ settings


def settings_for(
    info: CheckpointInfo, config: str | Path | None, overrides: Sequence[str], data: str | Path | None
) -> SegmentationConfig:
    """Returns the configuration to evaluate under: the file's own, or the sections of a given one, with overrides."""
    _check_overrides(overrides)
    given = given_on_command_line(overrides, "data")
    noted = info.recipe
    own: dict[str, Any] = dict(noted["data"])
    words = [*_NEUTRAL, *(_words_for(Path(data)) if data is not None else ()), *overrides]
    if config is not None:
        loaded = load_config(config, words)
        if not isinstance(loaded, SegmentationConfig):
            raise ConfigError(f"{config}: task: {loaded.task}, and the checkpoint is of task: segmentation")
        unsaid = [key for key in loaded.image_fields if getattr(loaded.data, key) is None and own.get(key) is not None]
        noted_images = {key: tuple(own[key]) if isinstance(own[key], list) else own[key] for key in unsaid}
        found = loaded.model_copy(update={"data": loaded.data.model_copy(update=noted_images)})
    else:
        if data is not None or {"source", "csv"} & given.keys():
            root = own.get("root") if data is None else None
            own = {key: value for key, value in own.items() if key in _OF_ANY_DATA} | ({"root": root} if root else {})
        plain = {
            "task": "segmentation",
            "data": own,
            "evaluation": noted["evaluation"],
            "train": {key: value for key, value in noted["train"].items() if key in OF_TRAIN},
        }
        checked = check_config(apply_overrides(plain, words), "the configuration")
        assert isinstance(checked, SegmentationConfig)
        found = checked
    found.data.given_for(info.in_chans)
    if "workers" not in given and found.data.workers is not None:  # a training machine may have more than this one
        workers = min(found.data.workers, usable_cores())
        found = found.model_copy(update={"data": found.data.model_copy(update={"workers": workers})})
    return found


def _check_overrides(overrides: Sequence[str]) -> None:
    raw = apply_overrides({}, overrides)
    useless = sorted(raw.keys() - {"data", "train", "evaluation"})
    useless += [f"train.{key}" for key in sorted(given_on_command_line(overrides, "train").keys() - OF_TRAIN)]
    if "pictures" in given_on_command_line(overrides, "evaluation"):
        useless.append("evaluation.pictures (it is --worst here)")
    if useless:
        raise ConfigError(
            f"{', '.join(useless)}: no effect on an evaluation, which takes the sections data and evaluation and, of "
            f"train, {', '.join(sorted(OF_TRAIN))}"
        )


def _words_for(data: Path) -> list[str]:
    """Returns overrides that say where data is and how it is stored: a table, a folder, or a name on the hub."""
    if is_table(data):
        return [f"data.root={json.dumps(str(data.parent))}", "data.source=csv", f"data.csv={json.dumps(str(data))}"]
    return [f"data.root={json.dumps(str(data))}", f"data.source={_detect(data)}"]


def _detect(root: Path) -> str:
    """Tells how a data set is stored, by the names in its folder."""
    if not root.is_dir():
        return "folder" if root.exists() or root.parent.exists() else "hf"
    try:
        names = {entry.name for entry in root.iterdir()}
    except OSError as e:
        raise DataError(f"{root}: cannot be read ({e.strerror})") from None
    for source, (images, masks, *_) in LAYOUTS.items():
        if {images, masks} <= names:
            return source
    if "dataset_dict.json" in names or any(name.endswith((".parquet", ".arrow")) for name in names):
        return "hf"
    tables = [name for name in names if Path(name).stem in VAL_NAMES and Path(name).suffix.lower() in TABLE_ENDINGS]
    return "csv" if tables else "folder"


def _open(settings: SegmentationConfig, info: CheckpointInfo, path: Path) -> PairSource:
    """Opens the images, whose classes must be those of the network.

    Raises:
        DataError: they are not, or a mask is wrong.
    """
    names = list(info.class_names or ())
    source = open_split(settings, None, names)
    if source.class_names != names:
        raise DataError(_other_classes(source, names, path))
    if settings.data.check:
        source = check_source(source, settings.data.on_error == "skip")
    return source


def _other_classes(source: PairSource, names: Sequence[str], path: Path) -> str:
    """Returns a sentence on how the classes of data differ from a network's."""
    theirs = source.class_names
    how = "give the network's names, one a line (data.class_names=FILE), if the numbers in the masks mean the same"
    if sorted(theirs) == sorted(names):
        place = next(i for i, pair in enumerate(zip(theirs, names, strict=True)) if len(set(pair)) > 1)
        return (
            f"{source.name} has the classes of {path} in another order: number {place} is '{theirs[place]}' and not "
            f"'{names[place]}'; {how}"
        )
    odd = [name for name in theirs if name not in names]
    missing = [name for name in names if name not in theirs]
    parts = [f"{shorten(odd, 5)} {'are' if len(odd) > 1 else 'is'} not among the network's"] if odd else []
    parts += [f"{shorten(missing, 5)} {'are' if len(missing) > 1 else 'is'} missing"] if missing else []
    near = closest(odd[0], missing) if odd else ""
    return f"{source.name} has other classes than {path}: {', '.join(parts)}{near}; {how}"


# ---------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class MaskValidation:
    """The evaluation of one checkpoint; see `run.Prepared`.

    Attributes:
        network: the network, or empty where it is built when its turn comes.
    """

    path: Path
    info: CheckpointInfo
    settings: SegmentationConfig
    source: PairSource
    use_ema: bool
    expected: str | Path | None
    extras: Extras
    network: list[SegmentationNetwork]

    @property
    def views(self) -> list[str]:
        return ["checkpoint"]

    @property
    def timeout_minutes(self) -> float:
        return self.settings.train.timeout_minutes

    @property
    def signature(self) -> Any:
        return len(self.source), self.source.class_names, self.info.num_parameters

    def known(self, world: World) -> list[dict[str, Any]]:
        evaluation, data = self.settings.evaluation, self.settings.data
        window = list(self.settings.window) if evaluation.mode == "slide" else None
        return [
            {
                "task": "segmentation",
                "checkpoint": str(self.path),
                "variant": self.info.name or "unnamed variant",
                "head": self.info.recipe["model"]["head"]["name"],
                "weights": self.info.weights(self.use_ema),
                "mode": evaluation.mode,
                "window": window,
                "overlap": evaluation.overlap if window else None,
                "flip": evaluation.flip,
                "short_side": data.short_side,
                "mean": list(data.preprocessing.mean),
                "std": list(data.preprocessing.std),
                "data": self.source.name,
                "classes": len(self.source.class_names),
                "precision": autocast_for(self.settings.train.precision, world.device)[0],
                "processes": world.size,
                "n": len(self.source),
                "notes": [self.source.note] if self.source.note else [],
            }
        ]

    def evaluate(self, world: World) -> tuple[Sequence[MaskEvaluation], dict[str, Any]]:
        network = self.network.pop() if self.network else self._load()
        shown = self.settings.evaluation.model_copy(update={"pictures": self.extras.worst})
        evaluator = MaskEvaluator(self.settings.model_copy(update={"evaluation": shown}), world.device)
        loader = batches(eval_loader(self.source, self.settings, world.rank, world.size, world.device, None))
        data, train = self.settings.data, self.settings.train
        if train.channels_last:  # as in training, for the same rounding
            network.to(memory_format=torch.channels_last)
        return measure(network, loader, evaluator, self.source, self.path, data, train, world)

    def _load(self) -> SegmentationNetwork:
        return restore_network(read_checkpoint(self.path), self.path, self.use_ema, self.expected)[0]

    def row(self, known: dict[str, Any], result: MaskEvaluation) -> dict[str, Any]:
        return {**known, **result.metrics, "per_class": class_rows(result, self.source.class_names)}

    def write(self, folder: Path, row: dict[str, Any], result: MaskEvaluation) -> dict[str, Any]:
        return write_mask_extras(folder, row, result, self.source.class_names, self.extras)


def class_rows(result: MaskEvaluation, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns for each class what `ClassCounts.rows` has, `predicted` pixels, and the share of those that are right."""
    counts = result.counts
    rows: list[dict[str, Any]] = []
    for row, right, predicted in zip(
        counts.rows(class_names), counts.right.tolist(), counts.predicted.tolist(), strict=True
    ):
        rows.append({**row, "predicted": predicted, "precision": 100 * right / predicted if predicted else None})
    return rows
