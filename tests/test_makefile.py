"""What a newcomer sees of make: a list of its targets, and that an installation does something."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from .conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def make(*words: str, folder=ROOT) -> str:
    result = subprocess.run(["make", "-f", ROOT / "Makefile", *words], capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_make_alone_lists_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    listed = re.findall(r"^  (\S+)  +\S.*$", make(), re.MULTILINE)
    assert sorted(listed) == sorted(targets)
    assert make() == make("help")


@pytest.mark.parametrize("target", ["test", "test-oldest"])
def test_an_installation_says_what_it_does(tmp_path, target):
    for name in ("pyproject.toml", "tests/oldest.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    before, _, install = make("--dry-run", target, folder=tmp_path).partition("-m venv")
    assert "GB" in before
    assert "minutes" in before
    assert "pip install" in install
    assert "--quiet" not in install  # pip names the packages, one after the other
