"""What the documentation shows exists: commands and their options, keys, files, names that are imported."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from conv2former.commands import console
from conv2former.config import Config, load_config
from conv2former.tasks.detection.config import DetectionConfig
from conv2former.tasks.segmentation.config import SegmentationConfig

from .conftest import ROOT, parse_python


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = {name_of(page): [page] for page in PAGES} | {"configs": sorted((ROOT / "configs").rglob("*.yaml"))}
FOLDERS = ("configs", "conv2former", "docs", "scripts", "tests")
# Files that a reader has or gets, whose names look like those of this project.
PLACEHOLDERS = {
    "docs/benchmarks-gpu.md",  # which make bench-gpu writes
    "TRAINING.md",  # ConvNeXt's
    "classify.py",  # docs/export.md shows the whole file
    "config.yaml",  # in a run folder
    "data.yaml",  # of a YOLO data set
    "none.yaml",  # in an error message
}


def text_of(path: Path) -> str:
    """Returns a page, or the comments of a configuration, with lines that a backslash continues in one."""
    text = path.read_text()
    if path.suffix == ".yaml":
        text = "\n".join(re.findall(r"#\s?(.*)", text))
    return re.sub(r"\s*\\\n\s*", " ", text)


# ----------------------------------------------------------------------------------------------------------- commands


STARTS = r"scripts/(?:slurm/)?\w+\.(?:py|sbatch)\b|conv2former\s[a-z-]+(?=\s|$)"


def commands(path: Path) -> Iterator[tuple[list[str], bool]]:
    """Yields the words of every command with a script, or of `conv2former COMMAND`, and whether it is whole.

    Within a sentence a command may lack what its script asks for. A usage line has its options in square brackets.
    """
    for line in text_of(path).splitlines():
        shown = re.findall(r"`([^`]+)`", line) if "`" in line else [line.strip().removeprefix("$ ")]
        for command in shown:
            match = re.match(rf"(?:\S*(?:python3?|torchrun|sbatch)\s.*?)?((?:{STARTS}).*)", command)
            if match:
                usage = "[--" in match[1]
                text = re.sub(r"[][]", "", match[1]) if usage else match[1]
                words = shlex.split(text, comments=True)
                yield [word for word in words if word not in ("...", "key=value")], not usage and "`" not in line


class Parsed(BaseException):
    """Ends a script when its command line was read. Not an Exception: nothing may catch it."""


@pytest.fixture
def parse(monkeypatch):
    """Reads a command line as its script does, and returns what the parser left over; runs nothing else."""
    real, depth, whole = argparse.ArgumentParser.parse_known_args, [0], [True]

    def parse_known_args(self, args=None, namespace=None):
        depth[0] += 1
        if not whole[0]:
            for action in self._actions:
                action.required = False
        try:
            result, rest = real(self, args, namespace)
        finally:
            depth[0] -= 1
        if depth[0]:  # a subcommand's
            return result, rest
        raise Parsed(rest)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.chdir(ROOT)

    def read(words: list[str], is_whole: bool) -> list[str]:
        whole[0] = is_whole
        monkeypatch.setattr(sys, "argv", list(words))
        depth[0] = 0
        with pytest.raises(Parsed) as stopped:
            if words[0] == "conv2former":
                console.run()
            else:
                runpy.run_path(words[0], run_name="__main__")
        return stopped.value.args[0]

    return read


def mistakes_in(words: list[str], whole: bool, parse, capsys) -> list[str]:
    """Returns what is wrong with a command line that a page shows."""
    if words[0] == "conv2former" and words[1] not in console.COMMANDS:
        return [f"no such command: {words[1]}"]
    if words[0] != "conv2former" and not (ROOT / words[0]).is_file():
        return [f"no such script: {words[0]}"]
    if words[0].endswith(".sbatch"):  # it hands its arguments on to train.py
        words = ["scripts/train.py", *words[1:]]
    try:
        rest = parse(words, whole)
    except SystemExit:
        return [capsys.readouterr().err.strip().splitlines()[-1]]
    keys = [re.fullmatch(r"([a-z_]+\.[a-z_0-9.]+)=.*", word) for word in rest]
    wrong = [word for word, key in zip(rest, keys, strict=True) if not key]
    if words[0] == "scripts/predict.py" or words[:2] == ["conv2former", "predict"]:  # images may stand anywhere
        wrong = [word for word in wrong if word.startswith("-")]
    unknown = [key[1] for key in keys if key and not known_to_a_task(key[1])]
    return [f"unrecognized: {word}" for word in wrong] + [f"no such key: {key}" for key in unknown]


@pytest.mark.parametrize("paths", SOURCES.values(), ids=SOURCES)
def test_commands(paths, parse, capsys):
    """Each script is there, takes the options that are shown with it, and each key of a configuration exists."""
    shown = [command for path in paths for command in commands(path)]
    wrong = {" ".join(words): found for words, whole in shown if (found := mistakes_in(words, whole, parse, capsys))}
    assert not wrong


@pytest.mark.parametrize(
    ("line", "mistake"),
    [
        ("python scripts/none.py --config FILE", "no such script: scripts/none.py"),
        ("python scripts/train.py --config FILE --dryrun", "unrecognized: --dryrun"),
        ("python scripts/train.py --config FILE data.rot=photos", "no such key: data.rot"),
        ("python scripts/train.py data.root=photos", "the following arguments are required: --config"),
        ("python scripts/benchmark.py models x --executions eager", "unrecognized: --executions"),
        ("torchrun -m conv2former train --config FILE --dryrun", "unrecognized: --dryrun"),
        ("conv2former trian --config FILE", "no such command: trian"),
        ("... the option `scripts/validate.py --per-clas` ...", "unrecognized: --per-clas"),
    ],
)
def test_mistakes_in_commands_are_found(tmp_path, parse, capsys, line, mistake):
    (tmp_path / "page.md").write_text(line)
    ((words, whole),) = commands(tmp_path / "page.md")
    assert mistake in mistakes_in(words, whole, parse, capsys)[0]


# --------------------------------------------------------------------------------------------------------------- keys

# of the pages of other tasks than classification
TASKS = {"docs/segmentation.md": SegmentationConfig, "docs/detection.md": DetectionConfig}
OF_SEVERAL = ("docs/real-cases.md",)


def known(key: str, kind: type[BaseModel] = Config) -> bool:
    """Returns whether a configuration has a key such as `data.root`, or a section such as `data`."""
    model: object = kind
    for part in key.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields):
            return False
        model = model.model_fields[part].annotation
        model = next((kind for kind in get_args(model) if hasattr(kind, "model_fields")), model)  # of a section or None
    return True


def known_to_a_task(key: str) -> bool:
    return any(known(key, kind) for kind in (Config, *TASKS.values()))


# What follows `model.` in Python, where it is a network.
NO_KEYS = {"model.forward_head", "model.load_state_dict", "model.set_grad_checkpointing", "model.stages"}
FILES = (".py", ".csv", ".json", ".log", ".safetensors", ".yaml")


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_keys(path):
    """What looks like a key of a configuration is one."""
    kind = TASKS.get(name_of(path), Config)
    sections = "|".join(kind.model_fields)
    inner = "" if kind is Config else "(?:head\\.|detector\\.)?"
    shown = re.findall(rf"`((?:{sections})\.{inner}[a-z_0-9]+)", path.read_text())
    is_known = known_to_a_task if name_of(path) in OF_SEVERAL else partial(known, kind=kind)
    assert [key for key in shown if not is_known(key) and key not in NO_KEYS and not key.endswith(FILES)] == []


def test_yaml(tmp_path):
    """The configurations that docs/recipes.md shows load."""
    shown = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE | re.DOTALL)
    assert shown
    for content in shown:
        (tmp_path / "mine.yaml").write_text(content)
        assert load_config(tmp_path / "mine.yaml").to_dict()


# -------------------------------------------------------------------------------------------------------------- files

ENDINGS = "py|yaml|md|cpp|sbatch|toml"
PROJECT = [
    path.relative_to(ROOT)
    for path in ROOT.rglob("*")
    if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)
]


def exists(name: str, page: Path) -> bool:
    """Returns whether a file or folder is there, from the project's folder, from the page, or below any folder."""
    name = name.rstrip("/")
    if any(folder.joinpath(name).exists() for folder in (ROOT, page.parent)):
        return True
    return any(path.match(name) for path in PROJECT)


def named_files(text: str) -> list[str]:
    """Returns what looks like a file or folder of this project."""
    files = re.findall(rf"(?<![\w/.$~<>*-])((?:\.\./)?[\w*-][\w/.*-]*\.(?:{ENDINGS}))\b(?!\.)", text)
    folders = re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/(?:[\w-]+/)*)(?![\w.*-])", text)
    return [name for name in files + folders if not name.startswith("runs/")]


@pytest.mark.parametrize("paths", SOURCES.values(), ids=SOURCES)
def test_files(paths):
    """Files and folders of this project that are named exist."""
    missing = {name for path in paths for name in named_files(text_of(path)) if not exists(name, path)}
    assert sorted(missing - PLACEHOLDERS) == []


def test_missing_files_are_found():
    text = (
        "see `models/block.py`, `finetune/foldr.yaml` and [x](docs/exprt.md); `configs/finetun/`, `runs/a/config.yaml`"
    )
    missing = [name for name in named_files(text) if not exists(name, ROOT / "README.md")]
    assert missing == ["finetune/foldr.yaml", "docs/exprt.md", "configs/finetun/"]


FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
MOST_WORDS = 1500  # what one reads in five minutes


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_can_be_read_in_five_minutes(page):
    """A longer one is two pages. Code and tables do not count: one looks something up in them."""
    lines = FENCED.sub("", page.read_text()).splitlines()
    prose = [line for line in lines if not line.startswith("    ") and not line.lstrip().startswith("|")]
    assert len(" ".join(prose).split()) <= MOST_WORDS


def headings(text: str) -> set[str]:
    """Returns what a link can name behind `#`, as GitHub makes it of the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    """Returns the links of a page to files, and to headings of pages, that are not there."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", FENCED.sub("", page.read_text())):
        target, _, heading = "".join(link).partition("#")
        path = page.parent / target if target else page
        if re.match(r"\w+:", target):
            continue
        if not path.exists() or (heading and heading not in headings(path.read_text())):
            broken.append("".join(link))
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "b.md").write_text("# Of `train.py`, twice\n```sh\n# a comment\n```\n")
    page = tmp_path / "a.md"
    page.write_text("## Here\n[1](b.md#of-trainpy-twice) [2](#here) [3](b.md#a-comment) [4](c.md) [5](https://a.b/c)")
    assert broken_links(page) == ["b.md#a-comment", "c.md"]


def test_every_page_is_linked_from_the_readme():
    links = set(re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text()))
    assert {name_of(page) for page in PAGES} - {"README.md", "CONTRIBUTING.md"} <= links


# ------------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_python(path):
    """Blocks of Python can be parsed, and what they import from this package is there."""
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
        for node in ast.walk(parse_python(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("conv2former"):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "conv2former":
                assert hasattr(importlib.import_module("conv2former"), node.attr), node.attr
