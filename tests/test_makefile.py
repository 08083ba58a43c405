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


@pytest.mark.parametrize(("gpus", "processes"), [(None, 2), (0, 2), (1, 1), (2, 2), (8, 2)])
def test_the_quickstart_has_as_many_processes_as_gpus(tmp_path, monkeypatch, gpus, processes):
    """And two on CPUs, where nobody asks PyTorch, which takes seconds."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / ".ready").touch()
    python, nvidia = tmp_path / ".venv" / "bin" / "python", tmp_path / "nvidia-smi"
    python.write_text(f"#!/bin/sh\necho {gpus}\n" if gpus is not None else "#!/bin/sh\necho asked >&2\n")
    python.chmod(0o755)
    if gpus is not None:
        nvidia.write_text("#!/bin/sh\n")
        nvidia.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    result = subprocess.run(
        ["make", "-f", ROOT / "Makefile", "--dry-run", "quickstart"], capture_output=True, text=True, cwd=tmp_path
    )
    launcher = "python" if processes == 1 else f"torchrun --standalone --nproc-per-node={processes}"
    assert f".venv/bin/{launcher} scripts/train.py --config configs/quickstart.yaml" in result.stdout
    assert "asked" not in result.stderr
