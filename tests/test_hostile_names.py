"""Names from files never reach a terminal, a log, a table or a picture raw, from training to export."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conv2former._yaml import dump_yaml, read_yaml
from conv2former.config.schema import DataConfig
from conv2former.data import batches, open_train_and_val
from conv2former.data.tables import read_table, write_table
from conv2former.engine import fonts
from conv2former.engine.terminal import say
from conv2former.errors import DataError
from conv2former.tasks import pictures
from conv2former.tools.checkpoints import publish
from conv2former.tools.output import save_figure, write_csv

from .hostile import NAMES, faults_in, faults_of

pytestmark = pytest.mark.slow

CLASSES = [name for name in NAMES if name.isascii() or "\udcff" not in name]  # which must be UTF-8
SHAPE = {"name": "conv2former_named", "dims": [8, 16, 24, 40], "depths": [1, 1, 2, 1], "kernel_size": 7}
SETTINGS = {
    "data": {"source": "folder", "img_size": 32, "workers": 0, "on_error": "skip", "max_skipped": 0.9},
    "train": {"batch_size": 4, "channels_last": False},
    "schedule": {"epochs": 1, "warmup_epochs": 0, "cooldown_epochs": 0},
    "log": {"tensorboard": False},
}


def picture(path: Path | io.BytesIO, seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")


class Terminal:
    """Runs commands in this process, and looks at all that they print."""

    def __init__(self, monkeypatch, capsys) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, command: str, *words: str | Path, code: int = 0) -> str:
        module = importlib.import_module(f"conv2former.commands.{command}")
        self.monkeypatch.setattr("sys.argv", ["conv2former", *map(str, words)])
        self.capsys.readouterr()
        try:
            module.run()
            ended = 0
        except SystemExit as e:
            ended = e.code or 0
        out, err = self.capsys.readouterr()
        assert not faults_of(out) + faults_of(err), command
        assert ended == code, err
        return out + err


@pytest.fixture
def terminal(monkeypatch, capsys, caplog):
    yield Terminal(monkeypatch, capsys)
    assert not [fault for record in caplog.records for fault in faults_of(record.getMessage())]


def test_from_training_to_export(tmp_path, terminal, request):
    """Class folders, images, folders and files with such names, in every command that takes them."""
    photos = tmp_path / "\x1b[32mphotos\nerror: disk full"
    for split, count in (("train", 2), ("val", 1)):
        for i, name in enumerate(CLASSES):
            (photos / split / name).mkdir(parents=True)
            for j in range(count):
                picture(photos / split / name / f"{'=' if j else NAMES[i - 2]}{i}{j}.png", 10 * i + j)
    (photos / "val" / NAMES[0] / f"{NAMES[1]}.png").write_bytes(b"no image")
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({**SETTINGS, "model": {"variant": SHAPE}}))
    run, root = tmp_path / "run\x1b[35m\nerror: disk full", f"data.root={json.dumps(str(photos))}"
    terminal("train", "--config", config, "--output", run, root, "--print-config")
    terminal("train", "--config", config, "--output", run, root)
    assert not faults_in(run)

    best = tmp_path / "best\nerror: disk full\x1b[0m=.pt"
    (run / "checkpoints" / "best.pt").rename(best)
    found = tmp_path / "found"
    extras = ["--per-class", "--confusion", "--calibration", "--worst", "3"]
    printed = terminal("validate", "--checkpoint", best, *extras, "--output", found)
    assert "cat\\nerror: disk full" in printed
    assert not faults_in(found)
    with (found / "per_class.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["class"].startswith("$'") for row in rows) == 4

    images = photos / "val"
    printed = terminal("predict", "--checkpoint", best, images, "--output", tmp_path / "predicted", code=2)
    assert "cat\\nerror: disk full" in printed
    terminal("predict", "--checkpoint", best, images, "--json", code=2)
    assert not faults_in(tmp_path / "predicted")

    terminal("convert", best, "--output", tmp_path / "hub")
    store = request.getfixturevalue("store")  # not before: what is compiled is kept in the usual one
    terminal("convert", best, "--install", "conv2former_named.mine")
    terminal("models", "--installed")
    assert not faults_in(tmp_path / "hub")
    assert not faults_in(store)
    other = shutil.copy(best, tmp_path / "other\nerror: disk full.pt")
    terminal("average", best, other, "--output", tmp_path / "soup\nerror: disk full.pt")
    terminal(
        "export", "--checkpoint", best, "--format", "torchscript", "--output", tmp_path / "net\nerror: disk full.pt"
    )


@pytest.mark.parametrize("source", ["csv", "wds"])
def test_training_on_tables_and_tars(tmp_path, terminal, source):
    """Labels and members with such names."""
    made = io.BytesIO()
    picture(made)
    words = [f"data.source={source}", f"data.root={tmp_path}", "data.on_error=raise"]
    if source == "csv":
        rows = []
        for i, name in enumerate(CLASSES):
            for split in ("train", "val"):
                (tmp_path / f"{split} {name}.png").write_bytes(made.getvalue())
                rows.append((f"{split} {name}.png", f"{name}{i}", split))
        write_table(tmp_path / "list.csv", rows)
        words.append("data.csv=" + str(tmp_path / "list.csv"))
    for split in ("train", "val") if source == "wds" else ():
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
            for i, name in enumerate(CLASSES):
                label = name.encode().strip()
                for ending, content in (("png", made.getvalue()), ("cls", label)):
                    member = tarfile.TarInfo(f"{i}{split}{name.replace('.', '')}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({**SETTINGS, "model": {"variant": SHAPE}}))
    terminal("train", "--config", config, "--output", tmp_path / "run", *words)
    assert not faults_in(tmp_path)


def test_wrong_keys_labels_and_tensors(tmp_path, terminal):
    """Mistakes whose messages name what is in the file."""
    for i, name in enumerate(NAMES[:4]):
        config, table, weights = tmp_path / f"{i}.yaml", tmp_path / f"{i}.csv", tmp_path / f"{i}.pt"
        config.write_text(json.dumps({"optim": {name: 1}, name: {}, "data": {"source": name}, "model": {"name": name}}))
        terminal("train", "--config", config, code=2)
        terminal("train", "--config", config, f"{name}=1", code=2)
        terminal("train", "--config", tmp_path / name, code=2)
        terminal("predict", "--checkpoint", weights, name, code=2)
        table.write_text(f"image,{json.dumps(name)}\na.png,b\n")
        source = [f"data.source=csv data.root={tmp_path} data.csv={table}".split()]
        terminal("train", "--config", "quickstart", *source[0], code=2)
        for content in ({name: torch.zeros(2)}, {"state_dict": {name: {name: 1}}}, {name: name}):
            torch.save(content, weights)
            terminal("convert", weights, "--output", tmp_path / "out", code=2)
            terminal("validate", "--checkpoint", weights, code=2)
        weights.write_bytes(b"cos" + name.replace("\n", "").encode("ascii", "ignore") + b"\nx\n.")
        assert "refers to code" in terminal("convert", weights, "--output", tmp_path / "out", code=2)


def test_a_split_is_read_back_whatever_the_names(tmp_path):
    rows = [(f"{name}/{i}.png", name, "train") for i, name in enumerate(["-1", *NAMES, " a", "$'a'", "it's\\n"])]
    write_table(tmp_path / "split.csv", rows)
    assert not faults_in(tmp_path)
    found = read_table(tmp_path / "split.csv", "image", "label", "split")
    assert [(row.image, row.label, row.split) for row in found] == rows
    assert "\n-1/0.png" not in (tmp_path / "split.csv").read_text()


def test_the_split_of_a_run_is_a_data_set(tmp_path):
    """What a run writes down about held-out images can be given to another as its table."""
    for name in ("=a", "b\n", "-1+1"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        picture(tmp_path / "photos" / name / "+0.png")
        picture(tmp_path / "photos" / name / "1.png", 1)
    files = (("train", "+0.png"), ("val", "1.png"))
    rows = [(f"{name}/{file}", name, split) for name in ("=a", "b\n", "-1+1") for split, file in files]
    write_table(tmp_path / "split.csv", rows)
    config = DataConfig(source="csv", root=str(tmp_path / "photos"), csv=str(tmp_path / "split.csv"))
    for source in open_train_and_val(config):
        assert source.class_names == sorted(["=a", "b\n", "-1+1"])
        assert [source.images[i][0].size for i in range(len(source))] == [(32, 32)] * 3


def test_a_figure_shows_names_and_obeys_none(tmp_path):
    figure = pictures.confusion_figure([[1] * len(NAMES)] * len(NAMES), NAMES, title="a title\x1b[31m\nin two lines")
    save_figure(figure, tmp_path / "a.png")
    texts = [text.get_text() for text in fonts._texts(figure)]
    assert all(line.isprintable() for text in texts for line in text.split("\n"))
    assert "a title\\x1b[31m\nin two lines" in texts
    assert sum("$\\frac{1}{0$" in text for text in texts) >= 2
    assert max(map(len, texts)) < 40


def test_yaml_has_each_text_in_one_line(tmp_path):
    content = {"root": "a\nerror: disk full", NAMES[1]: [NAMES[2], "x" * 500, "a b"]}
    (tmp_path / "a.yaml").write_text(dump_yaml(content))
    assert not faults_in(tmp_path)
    assert len((tmp_path / "a.yaml").read_text().splitlines()) == 5
    assert read_yaml(tmp_path / "a.yaml") == content


@pytest.mark.parametrize("name", ["a`b", "``", "a", "\n# title", "`" * 5])
def test_code_in_a_model_card_ends_where_it_should(name):
    code = publish._code(name)
    ticks = re.match("`+", code)[0]
    assert code.endswith(ticks)
    assert ticks not in code[len(ticks) : -len(ticks)]
    assert "\n" not in code


def test_an_error_of_a_loaders_worker_keeps_its_lines():
    """A worker's error comes as the text of its traceback."""

    class Loader:
        num_workers = 1

        def __iter__(self):
            told = str(DataError("a\nb:", "  - c"))
            yield 1
            start = (
                "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
            )
            raise DataError(f"{start}conv2former.errors.DataError: {told}\n")

    with pytest.raises(DataError) as caught:
        list(batches(Loader()))
    assert str(caught.value) == "a\\nb:\n  - c"


def test_numbers_in_tables_stay_numbers(tmp_path):
    write_csv(tmp_path / "a.csv", ["=a", "b"], [[-1.5, "-1"], [3, "-1+1"], [None, "+1e5"]])
    assert (tmp_path / "a.csv").read_text().split() == ["$'=a',b", "-1.5,-1", "3,$'-1+1'", ",+1e5"]


def test_output_in_ascii(monkeypatch):
    """A terminal that knows no other letters shows escapes instead of an error."""
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", out)
    say(*NAMES, "猫")
    assert not faults_of(raw.getvalue().decode("ascii"))
