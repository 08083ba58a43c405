"""`conv2former COMMAND`: what the scripts are where the package is installed."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conv2former import ConfigError, __version__
from conv2former._configs import configs_folder, find_config, near_recipes, recipe_names
from conv2former.commands import console
from conv2former.commands.train import summary
from conv2former.config import Config, load_config
from conv2former.config.suggest import NAMES_ELSEWHERE, suggest_key
from conv2former.tools.arguments import SCRIPTS, command_line
from conv2former.tools.recipes import run_name

from .conftest import FIXTURES, ROOT

pytestmark = pytest.mark.slow


def start(monkeypatch, *words: object, program: str = "conv2former") -> int:
    """Runs `conv2former WORDS` in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [program, *map(str, words)])
    try:
        console.run()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_every_script_is_a_command_and_the_other_way_round():
    modules = {path.stem for path in (ROOT / "conv2former" / "commands").glob("*.py")} - {"__init__", "console"}
    assert modules == {name.replace("-", "_") for name in console.COMMANDS}
    scripts = {path.stem: path.read_text() for path in (ROOT / "scripts").glob("*.py")}
    for name in console.COMMANDS:
        script = SCRIPTS.get(name, name)
        assert f'run_command("{name}")' in scripts.pop(script)
        assert f"`conv2former {name}`" in (ROOT / "scripts" / f"{script}.py").read_text()
    # of the clone alone
    assert scripts.keys() == {"kill_test", "modulation", "real_cases", "sample_digits", "small_sets", "transfer"}


def test_help_and_version(monkeypatch, capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert start(monkeypatch, *words) == 0
        listed = re.findall(r"^  (\S+)  +\S", capsys.readouterr().out, re.MULTILINE)
        assert listed == list(console.COMMANDS)
    assert start(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"conv2former {__version__}\n"


@pytest.mark.parametrize("name", console.COMMANDS)
def test_help_of_a_command_shows_it_as_it_is_started(monkeypatch, capsys, name):
    assert start(monkeypatch, name, "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: conv2former {name} ")
    assert f"\nconv2former {name}" in out
    assert "scripts/" not in out
    assert "--config configs/" not in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("trian", "error: 'trian' is no command of conv2former (did you mean 'train'?)"),
        ("dance", "error: 'dance' is no command of conv2former; there are: train, validate, "),
        ("--vresion", "error: '--vresion' is no command of conv2former; there are: train, "),
        ("train", "error: the following arguments are required: --config; write --config FILE"),
        ("train --config", "error: argument --config: expected one argument; write --config FILE"),
        ("train quickstart.yaml", "required: --config; write --config quickstart.yaml"),
        ("train --confg quickstart", "error: --confg: no such option (did you mean '--config'?)"),
        ("train --config quickstart --outptu x", "error: --outptu: no such option (did you mean '--output'?)"),
        (
            "train --config quickstart --data-root x",
            "--data-root: no such option (did you mean 'data.root'?); a key",
        ),
        ("train --config quickstart --data_root=x", "error: --data_root: no such option (did you mean 'data.root'?)"),
        ("train --config quickstart data_root=x", "data_root: unknown key (did you mean 'data.root'?)"),
        ("train --config quickstart --lr 1", "(did you mean 'optim.base_lr'?); a key is set by optim.base_lr=VALUE"),
        ("train --config quickstart lr=1", "lr: unknown key (did you mean 'optim.base_lr'?)"),
        ("train --config quickstart optim.lr=1", "optim.lr: unknown key (did you mean 'optim.base_lr'?)"),
        ("train --config quickstart --batch-size 1", "--batch-size: no such option (did you mean 'train.batch_size'?)"),
        ("train --config quickstart --epochs=1", "--epochs: no such option (did you mean 'schedule.epochs'?)"),
        ("train --config quickstart --model conv2former_t", "--model: no such option (did you mean 'model.name'?)"),
        ("train --config quickstart model=conv2former_t", "its keys are set one by one, such as model.name"),
        ("train --config quickstart --foo", "error: --foo: no such option; --help lists them"),
        ("train --config quickstart -c 3", "error: -c: no such option; --help lists them"),
        ("train --config quickstart data.root = x", "'data.root': expected key=value without blanks"),
        ("train --local-rank=0 --config quickstart", "torch.distributed.launch passes it: take torchrun"),
        ("train --config quickstart --local_rank 0", "torch.distributed.launch passes it: take torchrun"),
        ("train --config conv2former_t", "no recipe of that name; near it: imagenet1k/conv2former_t, "),
        ("train --config finetune/foldr.yaml", "near it: finetune/folder, "),
        ("train --config none.yaml", "error: none.yaml: no such file"),
        ("validate --checkpoint a.pt --batch-size 1", "(did you mean 'train.eval_batch_size'?)"),
        ("validate --checkpoint a.pt --local-rank=0", "torch.distributed.launch passes it"),
        ("validate --checkpoint a.pt --preprocessing bth", "(did you mean 'both'?)"),
        ("validate --checkpoint a.pt --worst x", "argument --worst: expected a number from 1 to 200, found 'x'"),
        ("predict a.jpg --checkpoint x.pt --top-k 3", "error: --top-k: no such option (did you mean '--topk'?)"),
        ("predict a.jpg --checkpoint x.pt --img-size 3", "(did you mean 'data.img_size'?)"),
        ("convert a.pt --instal", "error: --instal: no such option (did you mean '--install'?)"),
        ("export --checkpoint a.pt", "required: --output; write --output FILE"),
        ("models --instaled", "unrecognized arguments: --instaled (did you mean '--installed'?)"),
        ("benchmark modles", "(did you mean 'models'?)"),
        ("benchmark models x --sizes 1", "unrecognized arguments: --sizes 1 (did you mean '--size'?)"),
        ("benchmark loop --lr 1", "--lr: no such option (did you mean 'optim.base_lr'?)"),
        ("average a.pt --output b.pt --gredy", "--gredy: no such option (did you mean '--greedy'?)"),
    ],
)
def test_a_mistake_of_the_first_hour_is_one_message(monkeypatch, capsys, tmp_path, words, expected):
    monkeypatch.chdir(tmp_path)
    assert start(monkeypatch, *words.split()) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.startswith("error: ")
    assert err.count("error: ") == 1
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_said_by_one_process(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert start(monkeypatch, "train", "--confg", "quickstart") == 2
    assert not capsys.readouterr().err


def test_names_elsewhere_lead_to_keys():
    config = Config(data={"root": "x"}).to_dict()
    for word, key in NAMES_ELSEWHERE.items():
        section, last = key.split(".")
        assert last in config[section]
        assert suggest_key(f"--{word.replace('_', '-')}") == key


# ---------------------------------------------------------------------------------------------------------- recipes


def test_recipes_are_found_by_name(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    file = configs_folder() / "imagenet1k" / "conv2former_t.yaml"
    for name in ("imagenet1k/conv2former_t", "imagenet1k/conv2former_t.yaml", "configs/imagenet1k/conv2former_t.yaml"):
        assert find_config(name) == file
        assert run_name(find_config(name)) == "conv2former_t"
    assert run_name(find_config("finetune/folder")) == "finetune_folder"
    assert start(monkeypatch, "train", "--config", "imagenet1k/conv2former_t", "--print-config", "data.root=x") == 0
    assert yaml.safe_load(capsys.readouterr().out) == load_config(file, ["data.root=x"]).to_dict()


def test_a_file_in_the_working_directory_wins(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()  # a folder is no configuration
    assert find_config("quickstart") == configs_folder() / "quickstart.yaml"
    Path("quickstart.yaml").write_text("data: {root: mine}")
    for name in ("quickstart", "quickstart.yaml"):
        assert find_config(name) == Path("quickstart.yaml")
        assert load_config(name).data.root == "mine"


def test_a_recipe_can_be_the_base_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: finetune/folder\ndata: {root: leaves}")
    (tmp_path / "copy.yaml").write_text("base: configs/finetune/folder.yaml\ndata: {root: leaves}")
    expected = load_config(configs_folder() / "finetune" / "folder.yaml", ["data.root=leaves"])
    assert load_config(tmp_path / "mine.yaml") == load_config(tmp_path / "copy.yaml") == expected


def test_no_way_out_of_the_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_config("../pyproject") == Path("../pyproject")
    assert find_config("finetune/../quickstart") == Path("finetune/../quickstart")
    for name in ("", ".", "a\0b", "x" * 100_000):
        with pytest.raises(ConfigError):
            load_config(Path(name))
        assert not near_recipes(name)


def test_the_names_are_those_of_the_table(monkeypatch, capsys):
    assert start(monkeypatch, "recipes", "--names") == 0
    names = capsys.readouterr().out.split()
    assert names == recipe_names()
    assert start(monkeypatch, "recipes") == 0
    assert re.findall(r"^\| `(.*?)\.yaml`", capsys.readouterr().out, re.MULTILINE) == names


# --------------------------------------------------------------------------------------------- how it was started


def test_what_comes_next_is_started_in_the_same_way(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    mine = tmp_path / "bin" / "conv2former"
    mine.touch(0o755)
    package = str(Path(console.__file__).parents[1])
    for program, path, expected in (
        ("scripts/train.py", "", "python scripts/validate.py"),
        ("/a clone/scripts/train.py", "", "python '/a clone/scripts/validate.py'"),
        (f"{package}/__main__.py", "", "python -m conv2former validate"),
        (f"{package}/train.py", "", "python -m conv2former validate"),
        (str(mine), str(mine.parent), "conv2former validate"),
        (str(mine), "", "bin/conv2former validate"),
    ):
        monkeypatch.setattr(sys, "argv", [program])
        monkeypatch.setenv("PATH", path)
        assert command_line("validate") == expected
    monkeypatch.setattr(sys, "argv", ["scripts/validate.py"])
    assert command_line("models") == "python scripts/list_models.py"
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert command_line("train") == ".venv/bin/python scripts/train.py"


def test_modules(monkeypatch, capsys):
    """What `python -m` and torchrun's `-m` start."""
    for module, words in (("conv2former.train", []), ("conv2former", ["train"])):
        monkeypatch.setattr(sys, "argv", ["x.py", *words, "--config", "quickstart", "--print-config"])
        runpy.run_module(module, run_name="__main__")
        assert "conv2former_digits" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ a minimal install

MINIMAL = """
import json, sys
for name in "pydantic datasets pyarrow tensorboard matplotlib sklearn onnx onnxruntime onnxscript captum".split():
    sys.modules[name] = None
import runpy
from conv2former.commands import console
for words in json.loads(sys.argv[1]):
    sys.argv = ["conv2former", *words]
    code = 0
    try:
        runpy.run_path(words[0], run_name="__main__") if words[0].endswith(".py") else console.run()
    except SystemExit as stop:
        code = stop.code or 0
    print("->", code, file=sys.stderr, flush=True)
"""


def test_under_a_minimal_install_a_command_works_or_says_what_it_lacks(tmp_path):
    """Without what `pip install conv2former` does not bring, in a process of its own: here all is imported already."""
    file = FIXTURES / "official_format.pth.tar"
    works = [
        ["--help"],
        ["models"],
        ["models", "--installed"],
        ["recipes", "--names"],
        ["convert", file, "--output", "out", "--name", "mini.mine"],
    ]
    lacks = [
        (["convert", file, "--output", "other", "data.crop_pct=1"], "train"),
        (["recipes"], "train"),
        (["train", "--config", "quickstart"], "train"),
        (["validate", "--checkpoint", file], "train"),
        (["predict", "--checkpoint", file, "a.jpg"], "train"),
        (["export", "--checkpoint", file, "--output", "a.onnx"], "export"),
        (["average", file, file, "--output", "b.pt"], "train"),
        (["receptive-field", "--checkpoint", file], "train"),
        (["compare-runs", "a", "b"], "train"),
        (["benchmark", "models", "conv2former_n"], "train"),
        *(
            ([ROOT / "scripts" / name], "train")
            for name in ("kill_test.py", "modulation.py", "real_cases.py", "small_sets.py", "transfer.py")
        ),
        ([ROOT / "scripts" / "sample_digits.py"], "train"),
    ]
    words = json.dumps([*works, *(line for line, _ in lacks)], default=str)
    environment = {**os.environ, "CONV2FORMER_COMPILE": "0"}
    command = [sys.executable, "-c", MINIMAL, words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "-> ", "Traceback"))]
    lines = [re.sub(r"this needs (pydantic|sklearn),", "this needs it,", line) for line in lines]
    missing = 'error: this needs it, which is not installed: pip install "conv2former[{}]"'
    assert lines == ["-> 0"] * len(works) + [line for _, e in lacks for line in (missing.format(e), "-> 2")]
    assert "| `conv2former_t` |" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --------------------------------------------------------------------------------------------------- end of training


def test_the_command_at_the_end_of_training_can_be_pasted(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # an interpreter below the working directory, as `make` has one, is named with its path
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    report = dict.fromkeys(("skipped", "tensorboard", "curves", "confusion", "last_top1", "stopped_early"))
    report |= {"task": "classification", "seconds": 61.0, "top1": 99.0, "n": 5000}
    report |= {"weights": "raw", "epoch": 2, "epochs": 2}
    report |= {"classes": [], "checkpoint": "my runs/a/best.pt", "last_checkpoint": "my runs/a/last.pt"}
    assert summary(report, Path("my runs/a"))[-1] == "next: python scripts/validate.py --checkpoint 'my runs/a/best.pt'"
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert summary(report, Path("my runs/a"))[-1].startswith("next: .venv/bin/python scripts/validate.py ")
