"""What pyproject.toml allows is what is tested: `tests/oldest.txt`, the Makefile and the workflow say the same."""

from __future__ import annotations

import re
import sys

from packaging.requirements import Requirement
from packaging.version import Version

from .conftest import ROOT
from .test_layering import imports, modules

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest needs there

FILE = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = FILE["project"]
TESTED = ("train", "export", "explain", "dense", "test")
# What is imported under another name than it is installed by, and what comes with another package
NAMES = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
}
# What comes with onnxscript and onnx, whose newest versions do not fit to the oldest of those
PINNED_TOO = {"onnx-ir", "protobuf"}
COMES_WITH = {"triton": "torch", "huggingface_hub": "timm", "pyarrow": "datasets", "fsspec": "datasets"}


def stated() -> dict[str, Requirement]:
    """Returns the packages that are stated, and the oldest versions that are allowed."""
    lines = [*PROJECT["dependencies"], *(line for extra in TESTED for line in PROJECT["optional-dependencies"][extra])]
    found = [Requirement(line) for line in lines]
    return {each.name.lower(): each for each in found if each.name != "conv2former"}


def test_oldest_versions_are_those_of_pyproject():
    lines = (ROOT / "tests" / "oldest.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins.keys() >= PINNED_TOO
    pins = {name: version for name, version in pins.items() if name not in PINNED_TOO}
    allowed = {
        name: [(each.operator, Version(each.version)) for each in req.specifier] for name, req in stated().items()
    }
    assert allowed == {name: [(">=", Version(version))] for name, version in pins.items()}
    (builder,) = FILE["build-system"]["requires"]
    assert Requirement(builder).specifier == stated()["hatchling"].specifier


def test_oldest_python_is_that_of_pyproject():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f"PYTHON_OLDEST ?= python{oldest}\n" in (ROOT / "Makefile").read_text("utf-8")
    job = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8").partition("\n  oldest:\n")[2]
    assert re.findall(r'python-version: "(.*)"|run: (.*)', job) == [(oldest, ""), ("", "make test-oldest")]


def test_what_is_imported_is_stated():
    names, known = set(stated()), modules()
    for path in sorted((ROOT / "conv2former").glob("**/*.py")):
        others = {NAMES.get(name, name) for name in imports(path, known)[1]}
        assert {COMES_WITH.get(name, name) for name in others} <= names, path
