"""The study of docs/modulation.md: its networks, its runs with trainings that are played, its tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from conv2former._yaml import dump_yaml, read_yaml
from conv2former.engine.images import settle_images
from conv2former.engine.logging import read_metrics
from conv2former.errors import ConfigError, TrainingError
from conv2former.tasks.network import build_model, name_network
from conv2former.tools.benchmark.networks import count_macs
from experiments.modulation import command, cost, runs
from experiments.modulation.cost import Cost, estimate, time_in_turns
from experiments.modulation.plan import Run, read_study
from experiments.modulation.results import comparison_table, progress_text, rows_of, tuning_table, write_results
from experiments.modulation.runs import Outcome, find_results, run_study

from ..conftest import ROOT, TINY_YAML, run_script
from ..engine.conftest import without_pictures  # noqa: F401 - an automatic fixture

STUDY = ROOT / "experiments" / "modulation" / "study.yaml"
PAGE = ROOT / "docs" / "modulation.md"


def whole(output=Path("runs/x"), **changes):
    return read_study(STUDY, "photos", output, **changes)


# -------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.slow
def test_the_networks_cost_the_same_and_see_the_same_maps():
    study = whole()
    macs, size = {}, study.recipe.data.preprocessing.size
    text = PAGE.read_text()
    for network in study.networks:
        model = build_model(study.config(Run(network.name, True, 0, study.settings[0])), 10)
        macs[network.name] = count_macs(model, *size)
        assert [size[0] // info["reduction"] for info in model.feature_info] == [16, 8, 4, 2], network
        scales = [p for name, p in model.named_parameters() if "gamma" in name or "layer_scale" in name]
        assert len(scales) == (8 if network.name == "convnext" else 0)
        assert all((scale == 1).all() for scale in scales)
        assert not any(
            "drop_path" in name and getattr(module, "drop_prob", 0) for name, module in model.named_modules()
        )
        numbers = f"| {sum(p.numel() for p in model.parameters()) / 1e6:.2f} | {macs[network.name] / 1e6:.1f} |"
        assert f"| {network.label} |" in text
        assert numbers in text, numbers
    assert max(macs.values()) <= 1.03 * min(macs.values()), macs


def test_plan():
    study = whole()
    plan = study.plan(dict.fromkeys(study.only, study.settings[1]))
    assert len(plan) == 5 * (5 + 3) == len(set(plan))
    assert len({study.folder(run) for run in plan}) == 40
    tuning, final = [run for run in plan if not run.is_final], [run for run in plan if run.is_final]
    assert {(run.network, run.setting) for run in tuning} == {(n, s) for n in study.only for s in study.settings}
    assert {run.seed for run in tuning}.isdisjoint({run.seed for run in final})
    assert [run.network for run in plan[:5]] == [run.network for run in final[:5]] == list(study.only)
    for run in (tuning[3], final[3]):
        config = study.config(run)
        split = ("none", 0.1) if run is tuning[3] else (None, None)  # the tuning never sees the validation split
        assert (config.data.val_split, config.data.holdout) == split
        assert config.train.eval_every > config.schedule.epochs  # evaluated at the end only
        assert (config.train.seed, config.data.root) == (run.seed, "photos")
    assert study.config(tuning[0]).optim.base_lr != study.config(tuning[-1]).optim.base_lr
    two = whole(processes=2, epochs=5, seeds=1, only=["swin", "sum"])
    assert two.only == ("sum", "swin")
    assert len(two.plan({})) == 2 * (5 + 1)
    changed = two.config(two.plan({})[0])
    assert (2 * changed.train.batch_size, changed.schedule.epochs) == (study.recipe.train.batch_size, 5)
    shorter = whole(epochs=5, tuning_epochs=2)
    assert {(run.is_final, shorter.config(run).schedule.epochs) for run in shorter.plan({})} == {(False, 2), (True, 5)}
    hub = read_study(STUDY, "hf", Path("x")).recipe.data
    assert (hub.source, hub.root, hub.image_key) == ("hf", "uoft-cs/cifar10", "img")


# -------------------------------------------------------------------------------------------------- played trainings

SHAPE = ", ".join(TINY_YAML.splitlines())
TINY = f"""
recipe: recipe.yaml
tuning: {{holdout: 0.25, seed: 9, settings: [{{base_lr: 0.01}}, {{base_lr: 0.02}}]}}
networks:
  a: {{label: A, model: {{variant: {{name: conv2former_a, ls_init_value: null, {SHAPE}}}}}}}
  b: {{label: B, model: {{name: timm/convnext_atto, args: {{dims: [8, 8, 8, 8], depths: [1, 1, 1, 1]}}}}}}
"""
RECIPE = {
    "data": {"img_size": 32, "workers": 0},
    "augment": {"mixup": 0.0, "cutmix": 0.0, "auto_augment": None},
    "schedule": {"epochs": 1, "warmup_epochs": 0, "cooldown_epochs": 0},
    "train": {"batch_size": 4, "eval_every": 100},
    "log": {"every_steps": 1, "tensorboard": False},
    "checkpoint": {"keep": 1},
}
TOP1 = {("a", 0.01): 50.0, ("a", 0.02): 60.0, ("b", 0.01): 70.0, ("b", 0.02): 65.0}


@pytest.fixture
def file(tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump_yaml(RECIPE))
    (tmp_path / "study.yaml").write_text(TINY)
    return tmp_path / "study.yaml"


@pytest.fixture
def tiny(file):
    def read(**changes):
        return read_study(file, "photos", file.parent / "out", **{"seeds": 2, **changes})

    return read


class Played:
    """Plays trainings: writes what a run leaves, with the accuracies of TOP1 and a point more for each seed."""

    def __init__(self, monkeypatch) -> None:
        self.folders: list[str] = []
        self.errors: dict[int, BaseException] = {}
        monkeypatch.setattr(runs, "train_quietly", self)

    def __call__(self, config, folder, processes) -> None:
        self.folders.append("/".join(folder.parts[-4 if "final" in folder.parts else -3 :]))
        config = settle_images(name_network(config))[0]
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        name = "a" if config.model.variant else "b"
        noted = config.to_dict()
        noted["train"]["channels_last"] = name == "a"  # as some of timm's networks are trained, on a CPU
        (folder / "config.yaml").write_text(dump_yaml(noted))
        if error := self.errors.pop(len(self.folders), None):
            raise error
        is_final = config.data.val_split is None
        top1 = TOP1[name, config.optim.base_lr] + (config.train.seed if is_final else 0)
        row = {"kind": "eval", "step": 6, "epoch": 1, "top1": 1.0, "ema_top1": top1, "loss": 1.0, "n": 40}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        batch = config.train.batch_size * processes
        report = {"seconds": 120.0 if name == "a" else 90.0, "global_batch_size": batch}
        (folder / "report.json").write_text(json.dumps(report))


@pytest.fixture
def played(monkeypatch):
    return Played(monkeypatch)


TUNING = [f"tuning/{name}/base_lr={lr}" for lr in (0.01, 0.02) for name in "ab"]
FINAL = [f"final/{name}/base_lr={lr}/seed{seed}" for seed in (0, 1) for name, lr in (("a", 0.02), ("b", 0.01))]
COSTS = {"a": Cost(1_000_000, 2_000_000, 0.1, 1.0), "b": Cost(3_000_000, 2_000_000, 0.2, 2.0)}


def test_each_is_tuned_and_then_trained_with_its_best_setting(tiny, played):
    study, lines, noted = tiny(), [], []
    results = run_study(study, lines.append, lambda results: noted.append(progress_text(study, results)))
    assert played.folders == TUNING + FINAL
    assert noted == [f"{i} of 8 runs" for i in range(9)]
    assert lines[0] == "[1/8]  a             tuning, rate 0.01               top-1  50.00 %  (40 images, 2.0 min)"
    assert [Path(folder, "checkpoints").exists() for folder in map(study.output.joinpath, TUNING + FINAL)] == (
        [False] * 4 + [True] * 4
    )
    assert find_results(study) == results
    assert [out.top1 for run, out in results.items() if run.is_final] == [60.0, 70.0, 61.0, 71.0]


def test_what_is_done_is_not_repeated(tiny, played):
    played.errors[3] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_study(tiny(), print, lambda results: None)
    assert played.folders == TUNING[:3]
    # another division of the batch, other workers and more seeds are the same study
    played.folders.clear()
    lines: list[str] = []
    run_study(tiny(processes=2, overrides=["data.workers=3"]), lines.append, lambda results: None)
    assert played.folders == TUNING[2:] + FINAL
    assert lines[0] == "2 of 8 runs are done"
    played.folders.clear()
    run_study(tiny(seeds=3), print, lambda results: None)
    assert [folder[-5:] for folder in played.folders] == ["seed2"] * 2
    played.folders.clear()
    assert len(run_study(tiny(only=["b"]), print, lambda results: None)) == 4
    with pytest.raises(ConfigError, match=r"base_lr=0.01 holds a run with another configuration; give another") as e:
        run_study(tiny(overrides=["augment.hflip=0"]), print, lambda results: None)
    assert "augment.hflip: 0.5 -> 0.0" in str(e.value)
    # a batch of another size is another run, which the number of processes does not tell
    run_study(tiny(overrides=["train.batch_size=2"]), print, lambda results: None)
    assert played.folders == TUNING + FINAL


def test_what_diverges_is_not_chosen(tiny, played):
    error = "the gradients are not finite at step 3"
    played.errors = {4: TrainingError(error), 6: TrainingError(error)}  # b with 0.02; b with seed 0
    study = tiny()
    lines: list[str] = []
    results = run_study(study, lines.append, lambda results: None)
    assert played.folders == TUNING + FINAL
    assert lines[3].endswith("tuning, rate 0.02               diverged")
    assert (study.output / TUNING[3] / "diverged.txt").read_text() == f"{error}\n"
    played.folders.clear()
    assert run_study(study, print, lambda results: None) == results
    assert not played.folders
    rows = rows_of(study, results, COSTS)
    assert (rows[1].top1, rows[1].diverged, rows[1].std) == ({1: 71.0}, 1, None)
    assert comparison_table(study, rows, True).splitlines()[3].startswith("| B | 1, 1 diverged | 71.00 | +10.00 |")
    assert tuning_table(study, results, True).splitlines()[3] == "| B | 70.00 | diverged |"

    played.errors = {len(played.folders) + 1: TrainingError("a process has died")}
    with pytest.raises(TrainingError, match="has died"):
        run_study(tiny(seeds=3), print, lambda results: None)
    played.errors = {1 + len(played.folders): TrainingError(error)}


def test_all_settings_diverged(tiny, played):
    played.errors = {i: TrainingError("loss is not finite") for i in range(1, 5)}
    with pytest.raises(TrainingError, match="a: diverged with every setting; list lower rates"):
        run_study(tiny(), print, lambda results: None)


# ------------------------------------------------------------------------------------------------------- the tables


def test_tables(tiny, played, tmp_path):
    study = tiny()
    results = run_study(study, print, lambda results: None)
    rows = rows_of(study, results, COSTS)
    table = comparison_table(study, rows, True).splitlines()
    assert table[2] == "| A | 2 | 60.50 ± 0.71 | - | 1.00 | 2.0 | 2.0 | 1.00 | rate 0.02 |"
    assert table[3] == "| B | 2 | 70.50 ± 0.71 | +10.00 ± 0.00 | 3.00 | 2.0 | 1.5 | 2.00 | rate 0.01 |"
    assert tuning_table(study, results, True).splitlines()[2:] == ["| A | 50.00 | 60.00 |", "| B | 70.00 | 65.00 |"]
    paths = write_results(study, results, COSTS)
    assert [path.name for path in paths] == ["results.json", "results.csv", "table.md", "accuracy.png"]
    content = json.loads(paths[0].read_text())
    assert (content["done"], len(content["runs"])) == ("8 of 8 runs", 8)
    assert len(paths[1].read_text().splitlines()) == 9
    assert paths[2].read_text().startswith("8 of 8 runs, 1 epoch each.")
    with Image.open(paths[3]) as picture:
        assert picture.width > 500
    shorter = tiny(epochs=3, tuning_epochs=1)
    text = write_results(shorter, results, COSTS)[2].read_text()
    assert text.startswith("8 of 8 runs, 3 epochs each final run, 1 each of the tuning.")


def test_tables_of_what_there_is(tiny, played):
    study = tiny()
    played.errors[2] = KeyboardInterrupt()
    noted: list[list[Path]] = []
    with pytest.raises(KeyboardInterrupt):
        run_study(study, print, lambda results: noted.append(write_results(study, results, COSTS)))
    assert [path.name for path in noted[-1]] == ["results.json", "results.csv", "table.md"]
    text = (study.output / "table.md").read_text()
    assert text.startswith("1 of 8 runs, ")
    assert "| A | 0 | - | - | 1.00 | 2.0 | - | 1.00 | - |\n" in text
    assert text.endswith("| A | 50.00 | - |\n| B | - | - |\n")


def test_the_page_shows_the_columns(tiny, played):
    study = whole()
    header = comparison_table(study, [], True).splitlines()[0]
    assert header in PAGE.read_text()


# --------------------------------------------------------------------------------------------------------- the time


def test_time_in_turns():
    calls: list[str] = []
    actions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = time_in_turns(actions, 3, torch.device("cpu"))
    assert calls == list("abbaabba")
    assert [len(values) for values in seconds.values()] == [3, 3]


@pytest.mark.slow
def test_costs_are_measured_once(tiny, tmp_path, monkeypatch):
    study, lines = tiny(), []
    monkeypatch.setattr(cost, "ROUNDS", 1)
    costs = cost.measure_costs(study, tmp_path / "costs.json", lines.append)
    assert costs["a"].ratio == 1.0
    assert all(one.parameters > 1000 and one.macs > 1000 and one.seconds > 0 for one in costs.values())
    assert cost.measure_costs(tiny(only=["b"]), tmp_path / "costs.json", lines.append) == costs
    assert len(lines) == 1
    (tmp_path / "costs.json").write_text("{}")
    monkeypatch.setattr(cost, "_measure", lambda *_: COSTS)
    assert cost.measure_costs(study, tmp_path / "costs.json", lines.append) == COSTS
    assert cost.measure_costs(study, tmp_path / "costs.json", lines.append) == COSTS
    assert len(lines) == 2


def test_estimate(tiny, played):
    study, images = tiny(), {True: 40, False: 20}
    assert list(estimate(study, {}, COSTS, images).values()) == [0.5, 1.0] * 2 + [1.0, 2.0] * 2  # 5 and 10 steps
    done = {Run("a", False, 9, (("base_lr", 0.01),)): Outcome(50.0, 40, 3.0, "x")}  # 0.6 s a step, six times as long
    left = estimate(study, done, COSTS, images)
    assert list(left.values()) == pytest.approx([6.0, 3.0, 6.0, 6.0, 12.0, 6.0, 12.0])


# --------------------------------------------------------------------------------------------------------- for real


@pytest.fixture
def photos(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("val", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.slow
def test_a_study(file, photos, monkeypatch, capfd):
    monkeypatch.setattr(cost, "ROUNDS", 1)
    study = read_study(file, str(photos), file.parent / "out", seeds=1, only=["a"])
    lines: list[str] = []
    command.list_runs(study, lines.append)
    assert lines[-1].startswith("0 of 3 runs done; the others train for about ")
    command.run(study, lines.append)
    assert capfd.readouterr() == ("", "")
    folders = {name: study.output / path for name, path in (("tuning", TUNING[0]), ("final", "final/a"))}
    held_out = [line.rsplit(",", 1) for line in (folders["tuning"] / "split.csv").read_text().splitlines()[1:]]
    assert [part for _, part in held_out].count("val") == 8
    assert all(name.startswith("train/") for name, _ in held_out)
    (final,) = folders["final"].glob("*/seed0")
    assert [(row["n"], row["epoch"]) for row in read_metrics(final / "metrics.jsonl") if row["kind"] == "eval"] == [
        (8, 1)
    ]
    assert json.loads((final / "report.json").read_text())["steps"] == 8  # 32 photos, all of them
    assert "3 of 3 runs" in lines
    lines.clear()
    command.list_runs(study, lines.append)
    assert [line.split()[-1] for line in lines[:3]] == ["done"] * 3


# --------------------------------------------------------------------------------------------------------- mistakes


def start(monkeypatch, *words) -> int:
    return run_script(monkeypatch, "modulation.py", *words)


MISTAKES = [
    ("--only sums", "--only: no network 'sums' (did you mean 'sum'?): product, sum, small_kernel"),
    ("--only sum optim.base_lt=1", "optim.base_lt: unknown key (did you mean 'base_lr'?)"),
    ("--seeds 0", "--seeds 0: give at least one"),
    ("--epochs 0", "schedule.epochs: input should be greater than or equal to 1"),
    ("--tuning-epochs 0", "--tuning-epochs 0: give at least one"),
    ("--tuning-epochs 1", "schedule.warmup_epochs: must be below schedule.epochs: 1 of 1"),
    ("--processes 3", "--processes 3: a batch of 128 images cannot be divided among them"),
    ("--processes 0", "--processes 0: "),
    ("data.root=x", "data.root: has no effect here; the study sets it for every run"),
    ("model.name=conv2former_t", "model: has no effect here"),
    ("--data nowhere", "nowhere: no such folder (data.root)"),
    ("--study FILE", "FILE: not a study"),
    ("--study nowhere.yaml", "nowhere.yaml: no such file"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES)
def test_mistakes(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("networks: 3")
    assert start(monkeypatch, *words.split()) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert len(re.findall(r"error: ", err)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_torchrun_is_refused(tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start it without torchrun"):
        run_study(tiny(), print, lambda results: None)


def test_the_settings_of_the_page_are_those_of_the_study():
    listed = read_yaml(STUDY)["tuning"]["settings"]
    text = PAGE.read_text()
    for setting in listed:
        assert f"{setting['base_lr']:g} and {setting['weight_decay']:g}" in text
