"""The study of docs/transfer.md, small: its images, its runs, the table's arithmetic, and what the page shows."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import conv2former
from conv2former.config import check_config, load_config, make_plan
from conv2former.data import eval_transform
from conv2former.engine.logging import read_metrics
from experiments import study
from experiments.digits_transfer import transfer
from experiments.digits_transfer.transfer import (
    WAYS,
    Result,
    compare,
    comparison_table,
    prepare,
    summarise,
    tune,
    tuning_table,
    write_results,
)

from ..conftest import ROOT, TINY_YAML, run_script
from ..engine.conftest import without_pictures  # noqa: F401 - an automatic fixture

pytestmark = pytest.mark.slow

CONFIGS = ROOT / "configs" / "finetune"
PAGE = ROOT / "docs" / "transfer.md"


def images(folder: Path) -> dict[str, set[str]]:
    """Returns the file names of every class folder."""
    return {path.name: {file.name for file in path.iterdir()} for path in folder.iterdir()}


def test_images(tmp_path):
    lines = prepare(tmp_path / "data", 2, seed=3)
    few, held_out = images(tmp_path / "data/finetune/train"), images(tmp_path / "data/finetune/val")
    assert list(map(len, few.values())) == [2] * 5
    assert few.keys() == held_out.keys() == {"five", "six", "seven", "eight", "nine"}
    assert images(tmp_path / "data/pretrain/train").keys() == {"zero", "one", "two", "three", "four"}
    digits, seen = load_digits(), set()
    for path in (tmp_path / "data").glob("**/*.png"):
        index = int(path.stem)
        assert index not in seen  # on one side of one split only
        seen.add(index)
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (8, 8))
            assert np.array_equal(np.round(np.asarray(image) / 255 * 16), digits.images[index])
        assert path.parent.name == transfer.NAMES[digits.target[index]]
    assert len(seen) == 1797
    counts = [len(list((tmp_path / "data" / name).glob("*/*.png"))) for name in ("finetune/train", "finetune/val")]
    assert lines[2] == f"{tmp_path}/data/finetune/train: {counts[0]} images of five, six, seven, eight, nine"
    assert lines[3].startswith(f"{tmp_path}/data/finetune/val: {counts[1]} images of ")

    prepare(tmp_path / "more", 5, seed=3)
    more = images(tmp_path / "more/finetune/train")
    assert all(few[name] < more[name] for name in few)
    prepare(tmp_path / "other", 2, seed=4)
    assert images(tmp_path / "other/finetune/train") != few


def test_images_that_are_there_stay(tmp_path):
    prepare(tmp_path, 2, seed=0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/*")}
    prepare(tmp_path, 2, seed=0)
    with pytest.raises(conv2former.errors.OutputError, match="holds other images or another choice of them; remove it"):
        prepare(tmp_path, 3, seed=0)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/*")} == before


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    path = tmp_path_factory.mktemp("variant") / "conv2former_transfer.yaml"
    path.write_text(TINY_YAML + "head_hidden_size: 16\nls_init_value: 0.5\n")
    return [f"model.variant={path}", "schedule.epochs=1", "schedule.warmup_epochs=0"]


@pytest.fixture(scope="module")
def compared(overrides, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared")
    lines: list[str] = []
    results = compare(CONFIGS, [7], [3], output, overrides, lines.append)
    return output, results, lines


def test_comparison(compared, capfd):
    output, results, lines = compared
    assert [(r.way, r.per_class, r.seed) for r in results] == [(way, 3, 7) for way in WAYS]
    assert [line.split()[0] for line in lines] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert capfd.readouterr() == ("", "")  # the loop is silent
    logs = {r.way: Path(r.folder, "train.log").read_text() for r in results}
    source = f"from {output}/seed7/pretrain/checkpoints/best.pt"
    assert [source in logs[way] for way in WAYS] == [False, True, True]
    assert [", frozen up to backbone" in logs[way] for way in WAYS] == [False, True, False]

    weights = {r.way: final(r)["model"] for r in results}
    pretrained = torch.load(output / "seed7/pretrain/checkpoints/best.pt", weights_only=True)["model"]
    classifier = {key for key, value in pretrained.items() if value.shape[:1] == (5,)}
    kept = [
        {key for key in pretrained.keys() - classifier if torch.equal(pretrained[key], weights[way][key])}
        for way in WAYS
    ]
    assert kept[1] == pretrained.keys() - classifier
    assert not {key for key in kept[0] | kept[2] if key.endswith("conv_dw.weight")}


def final(result: Result) -> dict:
    (path,) = Path(result.folder, "checkpoints").glob("step_*.pt")
    return torch.load(path, weights_only=True)


def test_the_accuracy_is_that_of_the_last_weights_on_all_held_out_images(compared):
    _, results, _ = compared
    result = results[-1]
    (path,) = Path(result.folder, "checkpoints").glob("step_*.pt")
    model, info = conv2former.load_model(path)
    folder = Path(read_config(result)["data"]["root"], "val")
    transform = eval_transform(check_config(read_config(result), "test").data)
    files = sorted(folder.glob("*/*.png"))
    batch = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    with torch.inference_mode():
        found = model(batch).argmax(1).tolist()
    right = sum(info.class_names[k] == file.parent.name for k, file in zip(found, files, strict=True))
    assert result.held_out == len(files) == 5 * 3 * -1 + sum(load_digits().target >= 5)
    assert result.top1 == pytest.approx(100 * right / len(files))
    # looked at once, so they chose nothing
    assert [r["epoch"] for r in read_metrics(Path(result.folder, "metrics.jsonl")) if r["kind"] == "eval"] == [
        result.epochs
    ]


def read_config(result: Result) -> dict:
    return conv2former._yaml.read_yaml(Path(result.folder, "config.yaml"))


def test_what_is_done_is_not_repeated(compared, overrides, monkeypatch):
    output, results, _ = compared
    trained = []

    def spy(config, folder):
        trained.append(folder)
        return real(config, folder)

    real = study.train
    monkeypatch.setattr(study, "train", spy)
    lines: list[str] = []
    assert compare(CONFIGS, [7], [3], output, overrides, lines.append) == results
    assert not trained
    assert all("done before" in line for line in lines)
    lost = Path(results[1].folder)
    (lost / "report.json").unlink()
    assert compare(CONFIGS, [7], [3], output, overrides, lines.append) == results
    assert trained == [lost]

    with pytest.raises(conv2former.ConfigError, match=r"seed7/pretrain: this run was started with another config") as e:
        compare(CONFIGS, [7], [3], output, [*overrides, "augment.smoothing=0.2"], lines.append)
    assert "augment.smoothing: 0.1 -> 0.2" in str(e.value)


def test_tuning(compared, overrides):
    output, compared_results, _ = compared
    lines: list[str] = []
    results = tune(
        CONFIGS, [7], [3], output, overrides, lines.append, rates=dict.fromkeys(WAYS, (1e-4, 1e-3)), epochs=(1,)
    )
    assert [(r.way, r.lr) for r in results] == [(way, rate) for way in WAYS for rate in (1e-4, 1e-3)]
    assert lines[0].endswith("done before)")
    assert all(Path(r.folder, "report.json").is_file() and not Path(r.folder, "checkpoints").exists() for r in results)
    assert all(Path(r.folder, "checkpoints").exists() for r in compared_results)
    table = tuning_table(results).splitlines()
    assert table[0].split() == ["way", "steps", "rate", "0.0001", "rate", "0.001"]
    assert table[1].split() == ["from", "scratch", "5", *(f"{r.top1:.1f}" for r in results[:2])]


def made_up() -> list[Result]:
    values = {
        ("scratch", 2): [50, 60, 70], ("linear_probe", 2): [60, 60, 63], ("finetune", 2): [55, 60, 75],
        ("scratch", 10): [90, 92, 94], ("linear_probe", 10): [80, 80, 80], ("finetune", 10): [91, 93, 95],
    }  # fmt: skip
    return [
        Result(way, number, seed, 1e-3, 30, 150, float(top1), 896 - 5 * number, "runs/x")
        for (way, number), tops in values.items()
        for seed, top1 in enumerate(tops)
    ]


def test_arithmetic(tmp_path):
    summaries, differences = summarise(made_up())
    first = summaries[0]
    assert (first.way, first.per_class, first.held_out, first.n) == ("scratch", 2, 886, 3)
    assert (first.mean, first.std) == (60, pytest.approx(10))
    paired = next(d for d in differences if (d.worse, d.per_class) == ("linear_probe", 2))
    assert (paired.mean, paired.std, paired.wins, paired.n) == (pytest.approx(7 / 3), pytest.approx(8.7369), 1, 3)
    table = comparison_table(made_up()).splitlines()
    assert re.split(r"  +", table[1]) == [
        "2", "886", "3", "60.0 ± 10.0", "61.0 ± 1.7", "63.3 ± 10.4", "+3.3 ± 2.9 (2 of 3)", "+2.3 ± 8.7 (1 of 3)"
    ]  # fmt: skip
    assert re.split(r"  +", table[2])[-2:] == ["+1.0 ± 0.0 (3 of 3)", "+13.0 ± 2.0 (3 of 3)"]
    one = comparison_table([r for r in made_up() if r.seed == 0], markdown=True).splitlines()
    assert one[2] == "| 2 | 886 | 1 | 50.0 | 60.0 | 55.0 | +5.0 (1 of 1) | -5.0 (0 of 1) |"

    paths = write_results(made_up(), tmp_path)
    content = json.loads(paths[0].read_text())
    assert len(content["runs"]) == 18
    assert content["table"][0]["mean"] == 60
    with paths[1].open() as file:
        assert [float(row["top1"]) for row in csv.DictReader(file)] == [r.top1 for r in made_up()]
    assert paths[2].read_text() == comparison_table(made_up(), markdown=True) + "\n"
    with Image.open(paths[3]) as picture:
        assert picture.width > 500


@pytest.mark.parametrize("way", WAYS)
def test_the_length_does_not_depend_on_the_number_of_images(way):
    config = load_config(CONFIGS / f"digits_{way}.yaml", ["schedule.warmup_epochs=10"])
    steps = make_plan(config, 1, 50).total_steps
    for number in (1, 2, 5, 10, 20, 50, 173):
        raw = config.to_dict()
        transfer._keep_steps(raw, number)
        changed = check_config(raw, "test")
        plan = make_plan(changed, 1, 5 * number)
        assert plan.total_steps == pytest.approx(steps, abs=plan.steps_per_epoch / 2), number
        assert changed.schedule.warmup_epochs / plan.epochs == pytest.approx(10 / config.schedule.epochs, abs=0.2)
    raw = config.to_dict()
    transfer._keep_steps(raw, transfer.PER_CLASS)
    assert raw == config.to_dict()  # the commands of the page are a row of the table


def test_the_three_ways_differ_in_what_the_page_says():
    scratch, probe, finetune = (load_config(CONFIGS / f"digits_{way}.yaml").to_dict() for way in WAYS)
    for key in ("data", "augment", "train", "ema"):
        assert scratch[key] == probe[key] == finetune[key]
    assert (scratch["model"]["checkpoint"], scratch["model"]["freeze"]) == (None, "nothing")
    assert (probe["model"]["freeze"], finetune["model"]["freeze"]) == ("backbone", "nothing")
    assert probe["model"]["checkpoint"] == finetune["model"]["checkpoint"] == "runs/digits_pretrain/checkpoints/best.pt"
    assert scratch["model"]["variant"] == load_config(CONFIGS / "digits_pretrain.yaml").model.variant
    assert len({len(rates) for rates in transfer.RATES.values()}) == 1
    for way, raw in zip(WAYS, (scratch, probe, finetune), strict=True):  # what was chosen is what was tried
        assert raw["optim"]["base_lr"] in transfer.RATES[way]
        assert raw["schedule"]["epochs"] in transfer.EPOCHS


def start(monkeypatch, *words) -> int:
    return run_script(monkeypatch, "transfer.py", *words)


MISTAKES = [
    ("prepare --per-class 0", "0 images per class: give 1 to 173"),
    ("prepare --per-class 174", "174 images per class: give 1 to 173"),
    ("prepare --seed -1", "seed -1: give 0 or more"),
    ("prepare data.root=x", "unrecognized arguments: data.root=x"),
    ("compare --seeds 0", "give at least one seed"),
    ("compare --first-seed -3", "seed -3: give 0 or more"),
    ("compare --per-class 2 500", "500 images per class: give 1 to 173"),
    ("compare --per-class 2 2", "2 images per class: given twice"),
    ("compare data.root=x", "data.root: has no effect here; the comparison sets it for every run"),
    ("compare optim.base_lt=1", "optim.base_lt: unknown key (did you mean 'base_lr'?)"),
    ("compare data=5", "data: input should be a valid dictionary"),
    ("compare surplus", "'surplus': expected key=value"),
    ("tune --seeds -2", "give at least one seed"),
    ("compare --output FILE", "cannot be written"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES)
def test_mistakes(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("mine")
    assert start(monkeypatch, *words.split()) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert len(re.findall(r"error: ", err)) == 1
    assert not list(tmp_path.glob("**/*.png"))
    assert Path("FILE").read_text() == "mine"


def test_torchrun_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert start(monkeypatch, "compare", "--output", tmp_path / "out") == 2
    assert "start it without torchrun" in capsys.readouterr().err


def test_the_script(compared, overrides, monkeypatch, capsys):
    output, results, _ = compared
    words = ("--seeds", 1, "--first-seed", 7, "--per-class", 3, "--output", output, *overrides)
    assert start(monkeypatch, "compare", *words) == 0
    out = capsys.readouterr().out
    assert comparison_table(results) in out
    assert (output / "table.md").read_text() == comparison_table(results, markdown=True) + "\n"


def test_the_commands_of_the_page_are_right():
    text = PAGE.read_text()
    commands = re.findall(r"^(?:\w+=\w+ )*(?:python|torchrun) (scripts/.+)$", text, re.MULTILINE)
    assert len(commands) >= 6
    seen = set()
    for script, *words in map(shlex.split, commands):
        assert (ROOT / script).is_file()
        if "--config" in words:
            config = words[words.index("--config") + 1]
            seen.add(Path(config).stem)
            load_config(ROOT / config, words[words.index("--config") + 2 :])
        elif script == "scripts/transfer.py":
            assert words[0] in ("prepare", "compare", "tune")
    assert seen == {"digits_pretrain", *(f"digits_{way}" for way in WAYS)}
    assert comparison_table(made_up(), markdown=True).splitlines()[0] in text


def test_the_settings_are_the_best_of_those_in_the_page():
    rates, best = None, {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:2] == ["way", "steps"]:
            rates = [float(cell.removeprefix("rate ")) for cell in cells[2:]]
        elif rates and cells[0] in WAYS.values() and len(cells) == 2 + len(rates):
            tried = {(float(top1), rate, int(cells[1])) for rate, top1 in zip(rates, cells[2:], strict=True) if top1}
            best[cells[0]] = max(tried | {best.get(cells[0], (0.0, 0.0, 0))})
    for way, name in WAYS.items():
        config = load_config(CONFIGS / f"digits_{way}.yaml")
        steps = make_plan(config, 1, transfer.PER_CLASS * len(transfer.FEW)).total_steps
        assert best[name][1:] == (config.optim.base_lr, steps)
