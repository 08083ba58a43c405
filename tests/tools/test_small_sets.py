"""The study of small sets: its images, its runs with trainings that are played, its table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conv2former._yaml import dump_yaml
from conv2former.config.auto import AUTO_KEYS
from conv2former.data.tables import read_table
from conv2former.errors import ConfigError
from experiments.small_sets import command, images, runs
from experiments.small_sets.plan import PRETRAINING, Run, read_study
from experiments.small_sets.results import comparison, small_sets_table, write_results
from experiments.small_sets.runs import (
    Outcome,
    find_results,
    passes,
    run_study,
    seconds_of,
    settled_config,
    write_tables,
)

from ..conftest import ROOT, TINY_YAML
from ..engine.conftest import without_pictures  # noqa: F401 - an automatic fixture

STUDY = ROOT / "experiments" / "small_sets" / "study.yaml"
SHAPE = ", ".join(TINY_YAML.splitlines())
TINY = """
pretraining: {recipe: pretrain.yaml, classes: [ant, bee]}
known: [ant, cat]
common:
  model.fused: false
  data.workers: 0
  augment.mixup: 0
  train.batch_size: 4
  train.eval_every: 1000
  log.tensorboard: false
validation: {photos: 2, known: 1, digits: 3, cells: 1}
sets:
  p4: {label: 4 photos, images: photos, per_class: 2}
  p8: {label: 8 photos, images: photos, per_class: 4, settings: [before, probe, auto]}
  k2: {label: 2 photos, images: known, per_class: 1, start: conv2former_cifar10, settings: [extra]}
  c2: {label: 2 cells, images: cells, per_class: 1, settings: [auto], overrides: {augment.hflip: 0.0}}
settings:
  before: {label: before, recipe: finetune/csv, overrides: {schedule.epochs: 2, optim.base_lr: 1.0e-4}}
  probe: {label: probe, recipe: linear_probe/csv, overrides: {schedule.epochs: 1}}
  auto: {label: adaptive, recipe: finetune/csv}
  more: {label: more, recipe: finetune/csv, overrides: {schedule.epochs: 3}}
  extra: {label: extra, recipe: finetune/csv, extra: true}
"""
PRETRAIN = f"""
model: {{fused: false, variant: {{name: conv2former_small_sets, ls_init_value: null, {SHAPE}}}}}
data: {{img_size: 32, workers: 0}}
augment: {{mixup: 0.0, cutmix: 0.0, auto_augment: null}}
schedule: {{epochs: 1, warmup_epochs: 0, cooldown_epochs: 0}}
train: {{batch_size: 4, eval_every: 100}}
log: {{every_steps: 1, tensorboard: false}}
"""


def noise(path: Path, size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    Image.fromarray(rng.integers(0, 255, (*size, 3)).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Photos of four classes, and cells of two in COCO's format."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 6), ("val", 3)):
        for name in ("ant", "bee", "cat", "dog"):
            for i in range(count):
                noise(root / "photos" / split / name / f"{i}.png")
        noise(root / "cells" / split / "a.png", (40, 60))
        boxes = [(1, [0, 0, 10, 8]), (2, [50, 30, 20, 6]), (1, [5, 5, 2, 9]), (2, [1, 1, 5, 5])]
        content = {
            "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "white"}],
            "images": [{"id": 7, "file_name": "a.png"}],
            "annotations": [
                {"id": i, "image_id": 7, "category_id": kind, "bbox": box} for i, (kind, box) in enumerate(boxes)
            ],
        }
        (root / "cells" / f"{split}.json").write_text(json.dumps(content))
    (root / "study.yaml").write_text(TINY)
    (root / "pretrain.yaml").write_text(PRETRAIN)
    return root


@pytest.fixture
def tiny(data, tmp_path):
    def read(**changes):
        given = {"cells": data / "cells", "seeds": 2, **changes}
        return read_study(data / "study.yaml", data / "photos", output=tmp_path / "out", **given)

    return read


# -------------------------------------------------------------------------------------------------------- the plan


def test_the_whole_study(tmp_path):
    study = read_study(STUDY, tmp_path, tmp_path, Path("out"))
    plan = study.plan()
    extra = read_study(STUDY, tmp_path, tmp_path, Path("out"), settings=["frozen", "average"])
    assert len(extra.plan()) == 1 + 2 * 10 * 3
    assert plan[0] == PRETRAINING
    assert len({study.folder(run) for run in plan}) == len(plan)
    for one in study.sets.values():
        assert {"before", "probe", "auto"} <= set(one.settings)  # what is compared
        config = study.config(Run(one.name, "before", 0))
        assert config.auto == ()  # the recipe as it was: nothing of it follows this version's table
        assert study.config(Run(one.name, "auto", 2)).auto == tuple(k for k in AUTO_KEYS if k != "train.eval_every")
        assert study.config(Run(one.name, "probe", 1)).model.freeze == "backbone"
        assert config.train.eval_every > config.schedule.epochs  # what is held out chooses no epoch
        assert config.train.linear_probe == "none"  # which it had not
    first, second = (study.config(Run("photos_40", "auto", seed)) for seed in (0, 1))
    assert (first.train.seed, second.train.seed) == (0, 1)
    assert first.data.csv != second.data.csv  # other images


def test_a_part_of_the_study(tiny):
    assert [run.set for run in tiny(cells=None, seeds=1).plan()] == ["", *["p4"] * 4, *["p8"] * 3]
    assert tiny(sets=["p8"], settings=["auto"], seeds=1).plan() == [PRETRAINING, Run("p8", "auto", 0)]
    assert Run("p4", "extra", 1) in tiny(settings=["extra"]).plan()  # where it is asked for, alone
    for changes, message in (
        ({"sets": ["p5"]}, r"--sets: no 'p5': p4, p8, k2, c2"),
        ({"settings": ["autp"]}, r"--settings: no 'autp' \(did you mean 'auto'\?\)"),
        ({"seeds": 0}, "--seeds 0: give at least one"),
        ({"sets": ["c2"], "cells": None}, "give its folder, --cells"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny(**changes)
    assert command.part_of("2/3") == (2, 3)
    for text in ("3/2", "0/2", "2", "a/b"):
        with pytest.raises(ConfigError, match=f"--part {text}: expected 1/2"):
            command.part_of(text)


# ------------------------------------------------------------------------------------------------------ the images


def test_tables(tiny):
    """A seed's larger set holds its smaller one; no class of the pre-training is in one; all are held out alike."""
    study = tiny()
    counts = write_tables(study)
    assert counts[PRETRAINING] == 12
    assert {counts[run] for run in study.plan() if run.set == "p8"} == {8}

    def rows(name, seed, split):
        table = read_table(study.table(Run(name, "auto", seed)), "image", "label", "split")
        return {row.image for row in table if row.split == split}

    assert rows("p4", 0, "train") < rows("p8", 0, "train")
    assert rows("p4", 0, "train") != rows("p4", 1, "train")
    assert rows("p4", 0, "val") == rows("p8", 1, "val")
    assert all(name.split("/")[1] in ("cat", "dog") for name in rows("p8", 0, "train") | rows("p8", 0, "val"))
    assert len(rows("p8", 0, "val")) == 4


def test_cells_are_cut_out(data, tmp_path):
    pool = images.cells(data / "cells", tmp_path / "cells")
    assert {name: len(paths) for name, paths in pool["train"].items()} == {"red": 1, "white": 2}  # one is too thin
    sizes = {}
    for path in pool["val"]["red"] + pool["val"]["white"]:
        with Image.open(tmp_path / "cells" / path) as image:
            sizes[Path(path).stem] = image.size
    assert sizes == {"00007_000000": (10, 9), "00007_000001": (10, 17), "00007_000003": (5, 5)}
    (data / "cells" / "val.json").rename(data / "cells" / "old.json")
    assert images.cells(data / "cells", tmp_path / "cells") == pool  # they are there
    with pytest.raises(ConfigError, match=r"val\.json: No such file or directory; --cells is the folder"):
        images.cells(data / "cells", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    (data / "cells" / "val.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"val\.json: not a data set in COCO's format"):
        images.cells(data / "cells", tmp_path / "again")
    (data / "cells" / "old.json").replace(data / "cells" / "val.json")


def test_photos_of_known_classes(tiny, data):
    """Of those that no network here is trained on, apart from what they are evaluated on."""
    pool = images.known(images.photos(data / "photos"), ["ant", "cat"])
    assert pool["train"]["cat"] == ["val/cat/0.png", "val/cat/2.png"]
    assert pool["val"] == {"ant": ["val/ant/1.png"], "cat": ["val/cat/1.png"]}
    config = tiny(sets=["k2"]).config(Run("k2", "auto", 0))
    assert (config.model.checkpoint, config.data.root) == ("conv2former_cifar10", str(data / "photos"))


def test_what_is_missing(data, tmp_path):
    with pytest.raises(ConfigError, match=r"train: no folders with images; give the folder that has train/CLASS"):
        images.photos(tmp_path)
    pool = images.photos(data / "photos")
    with pytest.raises(ConfigError, match=r"t\.csv: 6 images of cat in train, not 7"):
        images.write_choice(tmp_path / "t.csv", pool, ["cat"], 7, 1, 0)


def test_digits(tmp_path):
    pool = images.digits(tmp_path / "digits")
    assert sum(map(len, pool["train"].values())) == 1198
    assert min(map(len, pool["val"].values())) >= 50


# -------------------------------------------------------------------------------------------------- played trainings

TOP1 = {"before": 50.0, "probe": 60.0, "auto": 65.0, "more": 70.0}


class Played:
    """Plays trainings: writes what a run leaves, with the accuracies of TOP1 and a point more for each seed."""

    def __init__(self, monkeypatch) -> None:
        self.folders: list[str] = []
        self.ends_at = -1
        monkeypatch.setattr(runs, "train_quietly", self)
        monkeypatch.setattr("experiments.study.changes_of", self.changes)  # there are no starting weights to read

    def changes(self, folder, config):
        return [] if (folder / "config.yaml").read_text() == dump_yaml(config.to_dict()) else ["optim.x: 1 -> 2"]

    def __call__(self, config, folder) -> None:
        if len(self.folders) == self.ends_at:
            raise KeyboardInterrupt
        self.folders.append("/".join(folder.parts[-3:]))
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_yaml(config.to_dict()))
        top1 = TOP1.get(folder.parts[-2], 80.0) + config.train.seed
        row = {"kind": "eval", "step": 6, "epoch": 1, "top1": top1, "loss": 1.0, "n": 40}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (folder / "report.json").write_text(json.dumps({"seconds": 2.0, "top1": top1}))


@pytest.fixture
def played(monkeypatch):
    return Played(monkeypatch)


def test_runs_and_their_table(tiny, played, tmp_path):
    study, lines, noted = tiny(sets=["p4"]), [], []
    played.ends_at = 3
    with pytest.raises(KeyboardInterrupt):
        run_study(study, lines.append, lambda results: noted.append(len(results)))
    played.ends_at = -1
    results = run_study(study, lines.append, lambda results: noted.append(len(results)))
    assert played.folders[1:] == [f"p4/{name}/seed{seed}" for seed in (0, 1) for name in TOP1]  # none twice
    assert len(played.folders) == 1 + 8
    assert noted == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    assert lines[1] == "[2/9]  p4            before        seed 0  top-1  50.00 %  (6 steps, 2 s)"
    kept = [study.folder(run) for run in study.plan() if (study.folder(run) / "checkpoints").exists()]
    assert kept == [study.folder(PRETRAINING)]
    assert find_results(study, write_tables(study)) == results
    assert comparison(study, results, "p4") == (5.0, 0.0)  # the probe is the better one
    table = small_sets_table(study, results, markdown=True).splitlines()
    assert table[0] == (
        "| training images | before | probe | adaptive | more | adaptive minus the better of the first two |"
    )
    assert table[2] == "| 4 photos | 50.5 ± 0.7 | 60.5 ± 0.7 | 65.5 ± 0.7 | 70.5 ± 0.7 | +5.0 ± 0.0 |"
    paths = write_results(study, results)
    assert [path.name for path in paths] == ["results.json", "results.csv", "table.md"]
    assert paths[2].read_text().startswith("9 of 9 runs. Top-1, percent: mean")
    assert len(paths[1].read_text().splitlines()) == 10
    half = {run: outcome for run, outcome in results.items() if run.seed == 0 and run.setting != "auto"}
    assert small_sets_table(study, half, True).splitlines()[2] == "| 4 photos | 50.0 | 60.0 | - | 70.0 | - |"
    with pytest.raises(ConfigError, match=r"before/seed0 holds a run with another configuration; remove it"):
        folder = study.folder(Run("p4", "before", 0))
        (folder / "config.yaml").write_text("{}")
        find_results(study, write_tables(study))


def test_two_share_the_work(tiny, played, monkeypatch):
    study = tiny(sets=["p4"])
    waits = []

    def other(seconds):
        """What the first one does meanwhile."""
        waits.append(seconds)
        run_study(study, lambda line: None, lambda results: None, (1, 2))

    monkeypatch.setattr(runs.time, "sleep", other)
    lines: list[str] = []
    results = run_study(study, lines.append, lambda results: None, (2, 2))
    assert len(waits) == 1
    assert lines[0] == "waiting for the pre-training, which part 1 does"
    assert len(played.folders) == len(set(played.folders)) == len(results) == 9
    assert len(lines) == 1 + 4


def test_the_time_that_is_left(tiny):
    study = tiny(cells=None, seeds=1)
    counts = {run: 12 if run == PRETRAINING else 8 for run in study.plan()}
    costs = {run: passes(settled_config(study, run, images), images) for run, images in counts.items()}
    assert costs[PRETRAINING] == 12
    assert costs[Run("p8", "before", 0)] == 16
    assert costs[Run("p8", "probe", 0)] == pytest.approx(8 * runs.FROZEN_COST)
    left = seconds_of(study, {}, costs, 0.5)
    assert left[Run("p8", "before", 0)] == 8.0
    done = {PRETRAINING: Outcome(80.0, 40, 1, 3, 24.0, "x")}  # two seconds for an image
    left = seconds_of(study, done, costs, 0.5)
    assert PRETRAINING not in left
    assert left[Run("p8", "before", 0)] == 32.0


# --------------------------------------------------------------------------------------------------------- for real


@pytest.mark.slow
def test_a_study(tiny, capfd, monkeypatch):
    """The pre-training and a run, which begins with its weights."""
    monkeypatch.setattr("conv2former.config.auto.MIN_STEPS", 2)
    monkeypatch.setattr("conv2former.config.auto.MIN_EPOCHS", 2)
    study = tiny(sets=["p4"], settings=["auto"], seeds=1)
    lines: list[str] = []
    command.list_runs(study, lines.append)
    assert lines[-1].startswith("0 of 2 runs done; the others train for about ")
    command.run(study, lines.append)
    assert capfd.readouterr() == ("", "")
    assert "2 of 2 runs" in lines
    report = json.loads((study.folder(Run("p4", "auto", 0)) / "report.json").read_text())
    assert (report["steps"], report["n"]) == (2, 4)
    assert report["started_from"].endswith("pretraining/checkpoints/best.pt")
    lines.clear()
    command.run(study, lines.append)
    assert not any(line.startswith("[") for line in lines)  # all is done
