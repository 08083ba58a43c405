"""What the evaluations of dense tasks share: options that they do not have, their settings, and a checkpoint's turn."""

from __future__ import annotations

import contextlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..._preprocessing import FIELDS
from ...config import apply_overrides, check_config, load_config
from ...config.base import BaseConfig, BaseTrainConfig
from ...data import batches
from ...data.loader import usable_cores
from ...engine.distributed import World
from ...errors import ConfigError, DataError, closest, shorten
from ...models import CheckpointInfo
from ...tasks.task import Evaluator
from ...weights.reading import read_checkpoint
from .run import Announce, Prepared, measure, run_evaluations
from .settings import OF_TRAIN, EvaluationOptions, check_one_root, given_on_command_line

__all__ = [
    "OF_ANY_DATA",
    "DenseKind",
    "DenseValidation",
    "check_classes",
    "folder_words",
    "names_in",
    "settings_for",
    "validate_dense",
]

# of a checkpoint's own data section, what holds for other data, too
OF_ANY_DATA = {
    *FIELDS, "on_error", "max_skipped", "value_range", "max_image_pixels", "workers", "check", "short_side",
}  # fmt: skip

C = TypeVar("C", bound=BaseConfig)
S = TypeVar("S", bound="AnySource")


class AnySource(Protocol):
    """A split with a note for its owner, '' for none."""

    @property
    def name(self) -> str: ...

    @property
    def class_names(self) -> list[str]: ...

    @property
    def note(self) -> str: ...

    def __len__(self) -> int: ...


class DenseKind(NamedTuple):
    """How the evaluation of one task differs from that of another.

    Attributes:
        task: its name.
        config: the class of its configurations.
        restore: from a file's content, its path, whether to take averaged weights, and an expected variant to the
            network and what its file says.
        of_any_data: keys of a checkpoint's own data section that hold for other data, too.
        places: keys of the data section that say that the data is another.
        settled: from the configuration in a file to overrides that settle what an evaluation does not use, so that
            nothing of it can be in conflict, and what is the network's.
        words_for: from what `--data` gives to overrides that say where data is and how it is stored.
        open: from settings, what the file says and its path to the images, whose classes are the network's.
        validation: a class of `DenseValidation`.
    """

    task: str
    config: type[BaseConfig]
    restore: Callable[..., tuple[nn.Module, CheckpointInfo]]
    of_any_data: set[str]
    places: set[str]
    settled: Callable[[Mapping[str, Any]], list[str]]
    words_for: Callable[[Path], list[str]]
    open: Callable[[Any, CheckpointInfo, Path], Any]
    validation: type[DenseValidation]


def validate_dense(
    kind: DenseKind,
    checkpoints: Sequence[str | Path],
    *args: Any,
    output: str | Path | None = None,
    announce: Announce | None = None,
    contents: list[dict[str, Any]] | None = None,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """As `validate.validate_files`, of checkpoints of a dense task.

    Args:
        kind: the task.
        checkpoints: files of training, or their average.
        *args, **kwargs: of `EvaluationOptions`, as there: the sections data and evaluation can be changed, `data` is in
            place of `data.root`, and options of classifiers are an error.
        output, announce, contents: see there.

    Returns:
        A row for each file, as the task's page of docs says.

    Raises:
        UserError: a file, the configuration, the data or the folder is wrong, or they do not go together.
    """
    options = EvaluationOptions(*args, **{key: value for key, value in kwargs.items() if value is not None})

    def prepare() -> list[Prepared]:
        _check_options(kind, options)
        check_one_root(options.data, options.overrides)
        keep = len(checkpoints) == 1
        found: list[Prepared] = []
        for path in map(Path, checkpoints):
            content = contents.pop() if contents else read_checkpoint(path)
            network, info = kind.restore(content, path, options.use_ema, options.model)
            settings = settings_for(kind, info, options)
            try:
                source = kind.open(settings, info, path)
            except DataError as e:
                raise (e if keep else e.below(path)) from None
            found.append(kind.validation(kind, path, info, settings, source, options, [network] if keep else []))
        return found

    return run_evaluations(prepare, options.extras.folder_for(output), announce)


def _check_options(kind: DenseKind, options: EvaluationOptions) -> None:
    """Raises a ConfigError if something is asked for that only classifiers have."""
    asked = {
        "--preprocessing": options.preprocessing not in (None, "checkpoint"),
        "--among": options.among not in (None, "all"),
        "--real": options.extras.real,
        "--calibration": options.extras.calibration,
    }
    for option, is_given in asked.items():
        if is_given:
            raise ConfigError(f"{option}: of classifiers, and this is a {kind.task}; leave it out")


# ------------------------------------------------------------------------------------------------------------ settings


def settings_for(kind: DenseKind, info: CheckpointInfo, options: EvaluationOptions) -> Any:
    """Returns the configuration to evaluate under: the file's own, or the sections of a given one, with overrides."""
    config, overrides, data = options.config, options.overrides, options.data
    _check_overrides(overrides)
    given = given_on_command_line(overrides, "data")
    noted = info.recipe
    own: dict[str, Any] = dict(noted["data"])
    words = [*kind.settled(noted), *(kind.words_for(Path(data)) if data is not None else ()), *overrides]
    if config is not None:
        _check_task(kind, config)
        loaded = load_config(config, words)
        unsaid = [key for key in loaded.image_fields if getattr(loaded.data, key) is None and own.get(key) is not None]
        noted_images = {key: tuple(own[key]) if isinstance(own[key], list) else own[key] for key in unsaid}
        found: BaseConfig = loaded.model_copy(update={"data": loaded.data.model_copy(update=noted_images)})
    else:
        if data is not None or kind.places & given.keys():
            root = own.get("root") if data is None else None
            own = {key: value for key, value in own.items() if key in kind.of_any_data}
            own |= {"root": root} if root else {}
        plain = {
            "task": kind.task,
            "data": own,
            "evaluation": noted["evaluation"],
            "train": {key: value for key, value in noted["train"].items() if key in OF_TRAIN},
        }
        found = check_config(apply_overrides(plain, words), "the configuration")
    found.data.given_for(info.in_chans)
    if "workers" not in given and found.data.workers is not None:  # a training machine may have more than this one
        workers = min(found.data.workers, usable_cores())
        found = found.model_copy(update={"data": found.data.model_copy(update={"workers": workers})})
    return found


def _check_task(kind: DenseKind, config: str | Path) -> None:
    """Raises a ConfigError if a file is of another task."""
    task = kind.task
    with contextlib.suppress(ConfigError):  # other mistakes are said of the file with its overrides
        task = load_config(config).task
    if task != kind.task:
        raise ConfigError(f"{config}: task: {task}, and the checkpoint is of task: {kind.task}")


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


def names_in(root: Path) -> set[str] | None:
    """Returns what is in the folder of a data set; None where it is no folder.

    Raises:
        DataError: it cannot be read.
    """
    if not root.is_dir():
        return None
    try:
        return {entry.name for entry in root.iterdir()}
    except OSError as e:
        raise DataError(f"{root}: cannot be read ({e.strerror})") from None


def folder_words(root: Path, source: str, **more: str) -> list[str]:
    """Returns overrides that say where data is and how it is stored, and further keys of the section."""
    return [f"data.{key}={json.dumps(value)}" for key, value in {"root": str(root), "source": source, **more}.items()]


def check_classes(source: AnySource, names: Sequence[str], path: Path, how: str) -> None:
    """Checks that data has the classes of a network, in its order.

    Args:
        source: the data.
        names: of the network's classes.
        path: of its file.
        how: what to do where they mean the same.

    Raises:
        DataError: they are others.
    """
    theirs = source.class_names
    if theirs == list(names):
        return
    if sorted(theirs) == sorted(names):
        place = next(i for i, pair in enumerate(zip(theirs, names, strict=True)) if len(set(pair)) > 1)
        raise DataError(
            f"{source.name} has the classes of {path} in another order: number {place} is '{theirs[place]}' and not "
            f"'{names[place]}'; {how}"
        )
    odd = [name for name in theirs if name not in names]
    missing = [name for name in names if name not in theirs]
    parts = [f"{shorten(odd, 5)} {'are' if len(odd) > 1 else 'is'} not among the network's"] if odd else []
    parts += [f"{shorten(missing, 5)} {'are' if len(missing) > 1 else 'is'} missing"] if missing else []
    near = closest(odd[0], missing) if odd else ""
    raise DataError(f"{source.name} has other classes than {path}: {', '.join(parts)}{near}; {how}")


# ---------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class DenseValidation(Generic[C, S]):
    """The evaluation of one checkpoint; see `run.Prepared`.

    Attributes:
        kind: its task.
        network: the network, or empty where it is built when its turn comes.
    """

    kind: DenseKind
    path: Path
    info: CheckpointInfo
    settings: C
    source: S
    options: EvaluationOptions
    network: list[Any]

    @property
    def views(self) -> list[str]:
        return ["checkpoint"]

    @property
    def timeout_minutes(self) -> float:
        return self.settings.train.timeout_minutes

    @property
    def signature(self) -> Any:
        return len(self.source), self.source.class_names, self.info.num_parameters

    def known_of_all(self, world: World, precision: str) -> dict[str, Any]:
        """Returns what every dense task notes in the row of a checkpoint."""
        data = self.settings.data
        return {
            "mean": list(data.preprocessing.mean),
            "std": list(data.preprocessing.std),
            "data": self.source.name,
            "classes": len(self.source.class_names),
            "precision": precision,
            "processes": world.size,
            "n": len(self.source),
            "notes": [self.source.note] if self.source.note else [],
        }

    @abstractmethod
    def known(self, world: World) -> list[dict[str, Any]]:
        """See `run.Prepared`."""

    @abstractmethod
    def row(self, known: dict[str, Any], result: Any) -> dict[str, Any]:
        """See `run.Prepared`."""

    @abstractmethod
    def write(self, folder: Path, row: dict[str, Any], result: Any) -> dict[str, Any]:
        """See `run.Prepared`."""

    @abstractmethod
    def evaluator(self, world: World) -> Evaluator:
        """Returns what counts the answers, with as many pictures as are wanted."""

    @abstractmethod
    def loader(self, world: World) -> DataLoader:
        """Returns the loader of this process's images."""

    def ready(self, network: Any) -> BaseTrainConfig:
        """Prepares the network for its answers, and returns how they are computed."""
        if self.settings.train.channels_last:  # as in training, for the same rounding
            network.to(memory_format=torch.channels_last)
        return self.settings.train

    def evaluate(self, world: World) -> tuple[Sequence[Any], dict[str, Any]]:
        network = self.network.pop() if self.network else self._load()
        train, evaluator, loader = self.ready(network), self.evaluator(world), batches(self.loader(world))
        return measure(network, loader, evaluator, self.source, self.path, self.settings.data, train, world)

    def _load(self) -> nn.Module:
        return self.kind.restore(read_checkpoint(self.path), self.path, self.options.use_ema, self.options.model)[0]
