"""The study of docs/transfer.md: pre-train on the digits 0 to 4, then learn 5 to 9 from few images in three ways."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from conv2former.config import BaseConfig, apply_overrides, check_config, load_config
from conv2former.errors import ConfigError, OutputError, counted, shorten
from conv2former.printing import print_lines
from conv2former.tools.output import check_writable, replacing, save_figure, write_csv

from ..study import (
    Say,
    check_alone,
    deviation,
    final_row,
    is_finished,
    table,
    top1_of,
    train_quietly,
    with_deviation,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "EPOCHS",
    "RATES",
    "WAYS",
    "Result",
    "compare",
    "comparison_table",
    "prepare",
    "summarise",
    "tune",
    "tuning_table",
    "write_results",
]

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PRETRAIN = NAMES[:5]
FEW = NAMES[5:]
WAYS = {"scratch": "from scratch", "linear_probe": "linear probe", "finetune": "fine-tuned"}
PRETRAIN_VAL = 36  # validation images of each class of the pre-training, a fifth
PER_CLASS = 10  # that the epochs in the three configurations are for; other numbers get as many steps
# What `tune` tries: as many settings for each way. A classifier alone takes higher rates.
RATES = {
    "scratch": (3e-4, 1e-3, 3e-3, 1e-2),
    "linear_probe": (3e-3, 1e-2, 3e-2, 1e-1),
    "finetune": (3e-4, 1e-3, 3e-3, 1e-2),
}
EPOCHS = (10, 30)
_OWN_KEYS = ("data.root", "model.checkpoint", "train.seed")  # what a comparison sets itself


# ------------------------------------------------------------------------------------------------------ the images


def prepare(root: Path, per_class: int, seed: int) -> list[str]:
    """Writes the digits as two sets of image folders, SET/{train,val}/CLASS/*.png, 8 x 8 and grey.

    What is there already stays as it is.

    Args:
        root: for `pretrain`, the digits 0 to 4, a fifth of them for validation; and `finetune`, 5 to 9.
        per_class: training images of each class of `finetune`; all others are held out, in its `val`.
        seed: which images these are. A larger `per_class` adds to those of a smaller one.

    Returns:
        A line for each of the four folders.

    Raises:
        ConfigError: there are not so many images.
        OutputError: a folder holds something else, or cannot be written.
    """
    sets = {"pretrain": _pretrain_split(seed), "finetune": _few_split(per_class, seed)}
    for name, chosen in sets.items():
        _check_folder(root / name, _files(chosen))  # both, before the first is written
    for name, chosen in sets.items():
        _write_folder(root / name, _files(chosen))
    return [
        f"{root / name / split}: {counted(len(indices), 'image')} of {', '.join(PRETRAIN if i == 0 else FEW)}"
        for i, (name, chosen) in enumerate(sets.items())
        for split, indices in chosen.items()
    ]


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's digits, (1797, 8, 8) of 8 bits, and their labels, (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


def _shuffled(label: int, seed: int) -> np.ndarray:
    """Returns the numbers of all images of a digit, in an order that the seed decides."""
    if seed < 0:
        raise ConfigError(f"seed {seed}: give 0 or more")
    return np.random.default_rng([seed, label]).permutation(np.flatnonzero(_digits()[1] == label))


def _pretrain_split(seed: int) -> dict[str, np.ndarray]:
    parts = [np.split(_shuffled(label, seed), [-PRETRAIN_VAL]) for label in range(5)]
    train_parts, val_parts = zip(*parts, strict=True)
    return {"train": np.concatenate(train_parts), "val": np.concatenate(val_parts)}


def _few_split(per_class: int, seed: int) -> dict[str, np.ndarray]:
    images = [_shuffled(label, seed) for label in range(5, 10)]
    most = min(map(len, images)) - 1
    if not 1 <= per_class <= most:
        raise ConfigError(
            f"{per_class} images per class: give 1 to {most}, so that a class of {most + 1} has one that is held out"
        )
    return {
        "train": np.concatenate([indices[:per_class] for indices in images]),
        "val": np.concatenate([indices[per_class:] for indices in images]),
    }


def _files(chosen: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Returns the path of every image below its folder, and its number in scikit-learn's list."""
    labels = _digits()[1]
    return {
        f"{split}/{NAMES[labels[index]]}/{index:04d}.png": int(index)
        for split, indices in chosen.items()
        for index in indices
    }


def _check_folder(folder: Path, files: Mapping[str, int]) -> bool:
    """Returns whether a folder holds just these files; False if there is nothing.

    Raises:
        OutputError: it holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    found = {str(path.relative_to(folder)) for path in folder.glob("**/*") if path.is_file()}
    if found != files.keys():
        raise OutputError(f"{folder} holds other images or another choice of them; remove it, or choose another one")
    return True


def _write_folder(folder: Path, files: Mapping[str, int]) -> None:
    from PIL import Image

    if _check_folder(folder, files):
        return
    pixels = _digits()[0]
    with replacing(folder) as new:
        for name, index in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index]).save(new / name)


# -------------------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Result:
    """A run on few images, and what it came to.

    Attributes:
        way: a key of WAYS.
        per_class: training images of each class.
        seed: of the images, the weights, the order and the augmentation.
        lr, epochs, steps: peak rate and length.
        top1: accuracy after the last epoch, percent.
        held_out: images that it was measured on.
        folder: of the run.
    """

    way: str
    per_class: int
    seed: int
    lr: float
    epochs: int
    steps: int
    top1: float
    held_out: int
    folder: str


class _Runs:
    """Trains one network after the other, in silence, and says a line for each.

    Args:
        configs: the folder of `digits_pretrain.yaml` and the three others.
        output: for the runs and their images.
        overrides: of every run.
        total: how many runs there will be.
        say: takes a line.
    """

    def __init__(self, configs: Path, output: Path, overrides: Sequence[str], total: int, say: Say) -> None:
        self.configs, self.output, self.total, self.say = configs, output, total, say
        self.overrides = ["log.tensorboard=false", *overrides]
        self.done = 0

    def pretrain(self, seed: int) -> Path:
        """Trains on 0 to 4, and returns the weight file that a user would go on with."""
        folder = self.output / f"seed{seed}"
        images = folder / "images" / "pretrain"
        _write_folder(images, _files(_pretrain_split(seed)))
        raw = self._read("pretrain", images, seed)
        self._train(raw, folder / "pretrain", f"seed {seed}  {'pre-trained on 0 to 4':27s}")
        return folder / "pretrain" / "checkpoints" / "best.pt"

    def few(self, way: str, per_class: int, seed: int, pretrained: Path, **setting: Any) -> Result:
        """Trains on few images of 5 to 9.

        Args:
            way: a key of WAYS.
            per_class: training images of each class.
            seed: of everything that is drawn.
            pretrained: a weight file.
            setting: `base_lr` and `epochs` (for `PER_CLASS` images per class) instead of the configuration's.
        """
        images = self.output / f"seed{seed}" / "images" / f"finetune_{per_class}"
        _write_folder(images, _files(_few_split(per_class, seed)))
        raw = self._read(way, images, seed)
        if raw["model"]["checkpoint"]:
            raw["model"]["checkpoint"] = str(pretrained)
        raw["optim"]["base_lr"] = setting.get("base_lr", raw["optim"]["base_lr"])
        raw["schedule"]["epochs"] = setting.get("epochs", raw["schedule"]["epochs"])
        _keep_steps(raw, per_class)
        words = [f"{key}={value:g}" for key, value in setting.items()]
        folder = self.output / f"seed{seed}" / f"{per_class}_per_class" / "_".join([way, *words])
        what = "  ".join([f"seed {seed}  {per_class:3d} per class  {WAYS[way]:12s}", *words])
        row, config = self._train(raw, folder, what)
        lr = config.optim.base_lr * config.train.batch_size / config.optim.base_batch_size
        return Result(way, per_class, seed, lr, row["epoch"], row["step"], top1_of(row), row["n"], str(folder))

    def _read(self, name: str, images: Path, seed: int) -> dict[str, Any]:
        raw = load_config(self.configs / f"digits_{name}.yaml", self.overrides).to_dict()
        raw["data"]["root"], raw["train"]["seed"] = str(images), seed
        return raw

    def _train(self, raw: dict[str, Any], folder: Path, what: str) -> tuple[dict[str, Any], BaseConfig]:
        """Trains, unless it was done before; returns the last evaluation's row of metrics.jsonl."""
        config = check_config(raw, folder)
        before = is_finished(folder, config)
        if not before:
            train_quietly(config, folder)
        self.done += 1
        row = final_row(folder)
        count = f"[{self.done:{len(str(self.total))}d}/{self.total}]"
        again = ", done before" if before else ""
        self.say(f"{count}  {what}  top-1 {top1_of(row):6.2f} %  ({row['n']} images, {row['step']} steps{again})")
        return row, config


def _keep_steps(raw: dict[str, Any], per_class: int) -> None:
    """Gives a run on any number of images the steps that its configuration has on `PER_CLASS` of each class.

    A batch is not larger than the set.
    """
    batch = raw["train"]["batch_size"]
    images = per_class * len(FEW)
    raw["train"]["batch_size"] = min(batch, images)
    steps_per_epoch = images // min(batch, images)
    ratio = max(1, PER_CLASS * len(FEW) // batch) / steps_per_epoch
    schedule = raw["schedule"]
    schedule["epochs"] = max(1, round(schedule["epochs"] * ratio))
    schedule["warmup_epochs"] = min(round(schedule["warmup_epochs"] * ratio), schedule["epochs"] - 1)


def compare(
    configs: Path,
    seeds: Sequence[int],
    per_class: Sequence[int],
    output: Path,
    overrides: Sequence[str] = (),
    say: Say = print_lines,
) -> list[Result]:
    """Pre-trains, then trains in the three ways on each number of images, for every seed.

    A run that is done is not repeated, and one that was stopped goes on.

    Args:
        configs: the folder of the four configurations `digits_*.yaml`.
        seeds: each decides which images are for training, the weights, the order and the augmentation.
        per_class: numbers of training images of each class.
        output: for the runs.
        overrides: changes to the configuration of every run.
        say: takes a line for every run.

    Raises:
        UserError: a mistake in the arguments or the configurations, or `output` cannot be written.
    """
    _check(configs, seeds, per_class, output, overrides)
    runs = _Runs(configs, output, overrides, len(seeds) * (1 + len(per_class) * len(WAYS)), say)
    results = []
    for seed in seeds:
        pretrained = runs.pretrain(seed)
        results += [runs.few(way, number, seed, pretrained) for number in per_class for way in WAYS]
    return results


def tune(
    configs: Path,
    seeds: Sequence[int],
    per_class: Sequence[int],
    output: Path,
    overrides: Sequence[str] = (),
    say: Say = print_lines,
    rates: Mapping[str, Sequence[float]] = RATES,
    epochs: Sequence[int] = EPOCHS,
) -> list[Result]:
    """Tries every rate of a way with every length. The checkpoints of these runs are removed.

    The arguments are those of `compare`; the seeds should be others.
    """
    _check(configs, seeds, per_class, output, overrides)
    total = len(seeds) * (1 + len(per_class) * sum(len(rates[way]) for way in WAYS) * len(epochs))
    runs = _Runs(configs, output, overrides, total, say)
    results = []
    for seed in seeds:
        pretrained = runs.pretrain(seed)
        for number in per_class:
            for way in WAYS:
                for length in epochs:
                    for rate in rates[way]:
                        result = runs.few(way, number, seed, pretrained, base_lr=rate, epochs=length)
                        shutil.rmtree(Path(result.folder) / "checkpoints", ignore_errors=True)
                        results.append(result)
    return results


def _check(
    configs: Path, seeds: Sequence[int], per_class: Sequence[int], output: Path, overrides: Sequence[str]
) -> None:
    """Finds the mistakes before the first run.

    Raises:
        UserError: see `compare`.
    """
    if not seeds or not per_class:
        raise ConfigError("give at least one seed and one number of images per class")
    twice = sorted({number for number in per_class if list(per_class).count(number) > 1})
    if twice:
        raise ConfigError(f"{shorten(twice)} images per class: given twice")
    for number in per_class:
        _few_split(number, seeds[0])
    for name in ("pretrain", *WAYS):
        load_config(configs / f"digits_{name}.yaml", overrides)
    given = apply_overrides({}, overrides)
    own = [key for key in _OWN_KEYS if key.split(".")[1] in given.get(key.split(".")[0], {})]
    if own:
        raise ConfigError(f"{', '.join(own)}: has no effect here; the comparison sets it for every run")
    check_alone()
    check_writable(output / "results.json")


# ----------------------------------------------------------------------------------------------------- the results


@dataclass(frozen=True)
class Summary:
    """One way on one number of images, over the seeds.

    Attributes:
        mean, std: of the accuracy, percent; the standard deviation is the sample's, None of one seed.
        n: seeds.
    """

    way: str
    per_class: int
    held_out: int
    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """How much better one way is than another on the same images with the same seed, in points of top-1.

    Attributes:
        wins: seeds in which it is better.
    """

    better: str
    worse: str
    per_class: int
    mean: float
    std: float | None
    wins: int
    n: int


DIFFERENCES = (("finetune", "scratch"), ("finetune", "linear_probe"))


def summarise(results: Sequence[Result]) -> tuple[list[Summary], list[Difference]]:
    """Returns mean and standard deviation over the seeds, of each way and of the differences between ways."""
    numbers = sorted({result.per_class for result in results})
    of = {(r.per_class, r.way, r.seed): r for r in results}
    seeds = sorted({result.seed for result in results})
    summaries, differences = [], []
    for number in numbers:
        for way in WAYS:
            runs = [of[number, way, seed] for seed in seeds]
            values = [run.top1 for run in runs]
            summaries.append(Summary(way, number, runs[0].held_out, mean(values), deviation(values), len(values)))
        for better, worse in DIFFERENCES:
            values = [of[number, better, seed].top1 - of[number, worse, seed].top1 for seed in seeds]
            wins = sum(value > 0 for value in values)
            differences.append(Difference(better, worse, number, mean(values), deviation(values), wins, len(values)))
    return summaries, differences


def comparison_table(results: Sequence[Result], markdown: bool = False) -> str:
    """Returns a table with a row per number of images, for a terminal or in Markdown."""
    summaries, differences = summarise(results)
    header = ["images per class", "held out", "seeds", *WAYS.values()]
    header += [f"{WAYS[better]} minus {WAYS[worse]}" for better, worse in DIFFERENCES]
    rows = []
    for number in sorted({summary.per_class for summary in summaries}):
        own = [summary for summary in summaries if summary.per_class == number]
        cells = [with_deviation(summary.mean, summary.std) for summary in own]
        cells += [
            f"{with_deviation(d.mean, d.std, '+')} ({d.wins} of {d.n})" for d in differences if d.per_class == number
        ]
        rows.append([str(number), str(own[0].held_out), str(own[0].n), *cells])
    return table(header, rows, markdown)


def tuning_table(results: Sequence[Result], markdown: bool = False) -> str:
    """Returns a table of the settings that `tune` tried: means over seeds and numbers of images, a row per length."""
    rates = sorted({result.lr for result in results})
    rows = []
    for way in WAYS:
        for steps in sorted({result.steps for result in results}):
            cells = []
            for rate in rates:
                values = [r.top1 for r in results if (r.way, r.steps, r.lr) == (way, steps, rate)]
                cells.append(f"{mean(values):.1f}" if values else "")
            rows.append([WAYS[way], str(steps), *cells])
    return table(["way", "steps", *(f"rate {rate:g}" for rate in rates)], rows, markdown)


def write_results(results: Sequence[Result], output: Path) -> list[Path]:
    """Writes results.json, results.csv (a row per run), table.md and accuracy.png, and returns their paths.

    Raises:
        OutputError: they cannot be written.
    """
    summaries, differences = summarise(results)
    paths = [output / name for name in ("results.json", "results.csv", "table.md", "accuracy.png")]
    rows = [asdict(result) for result in results]
    content = {
        "table": [asdict(summary) for summary in summaries],
        "differences": [asdict(difference) for difference in differences],
        "runs": rows,
    }
    with replacing(paths[0]) as new:
        new.write_text(json.dumps(content, indent=2) + "\n")
    write_csv(paths[1], list(rows[0]), [list(row.values()) for row in rows])
    with replacing(paths[2]) as new:
        new.write_text(comparison_table(results, markdown=True) + "\n")
    save_figure(_figure(results), paths[3])
    return paths


def _figure(results: Sequence[Result]) -> Figure:
    from matplotlib.figure import Figure

    summaries, _ = summarise(results)
    figure = Figure(figsize=(7, 4.5), layout="constrained", dpi=110)
    axes = figure.subplots()
    for i, (way, name) in enumerate(WAYS.items()):
        own = [summary for summary in summaries if summary.way == way]
        places = [summary.per_class * 1.04 ** (i - 1) for summary in own]  # beside each other
        spread = [summary.std or 0.0 for summary in own] if own[0].n > 1 else None
        axes.errorbar(places, [summary.mean for summary in own], spread, marker="o", capsize=4, label=name)
    numbers = sorted({summary.per_class for summary in summaries})
    axes.set_xscale("log")
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    n = summaries[0].n
    bars = "" if n == 1 else ", mean and standard deviation"
    axes.set(
        xlabel="training images per class",
        ylabel="top-1 on the held-out images, %",
        title=f"The digits 5 to 9, {counted(n, 'seed')}{bars}",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure
