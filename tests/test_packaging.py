"""The zoo from a built wheel and from a source checkout, in an empty environment outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from .conftest import ROOT

pytestmark = pytest.mark.slow

CREATE_ALL = """
import conv2former, timm
assert timm.create_model("conv2former_cifar10", pretrained=True).num_classes == 10  # the weights that come with it
print(conv2former.__file__)
for name in conv2former.list_variants():
    print(name, sum(p.numel() for p in timm.create_model(name, device="meta").parameters()))
"""


def run(*command, **kwargs) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory):
    """An environment that sees torch and timm, but not this project: a .pth line does not process other .pth files."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "env")
    python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    with open(f"{site_packages}/dependencies.pth", "w") as file:
        file.write(sysconfig.get_path("purelib") + "\n")
    return python, folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


def check(output: str, location) -> None:
    where, *lines = output.strip().splitlines()
    assert where.startswith(str(location))
    assert lines == [
        "conv2former_n 14992840",
        "conv2former_t 26697204",
        "conv2former_s 50032692",
        "conv2former_b 90029112",
        "conv2former_b_22k 88784952",
        "conv2former_l 198893736",
        "conv2former_cifar10 1212296",
        "conv2former_cifar10_ln 1173688",
    ]


def test_source_checkout_then_wheel(empty_environment, wheel, monkeypatch):
    python, folder = empty_environment
    monkeypatch.delenv("PYTHONPATH", raising=False)
    check(run(python, "-c", CREATE_ALL, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}), ROOT)
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    check(run(python, "-c", CREATE_ALL, cwd=folder), folder)
    command = [python.with_name("conv2former"), "train", "--config", "imagenet1k/conv2former_t", "--print-config"]
    assert "\n  root: photos\n" in run(*command, "data.root=photos", cwd=folder)  # a recipe out of the wheel


def test_what_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "conv2former/configs/models/conv2former_t.yaml" in names
    recipes = {f"conv2former/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").glob("**/*.yaml")}
    assert recipes <= names
    assert {"conv2former/data/pixels.cpp", "conv2former/ops/cpu/kernels.cpp"} <= names  # compiled where they run
    for tag in ("conv2former_cifar10.cifar10", "conv2former_cifar10_ln.cifar10"):
        folder = f"conv2former/pretrained/{tag}"
        assert {f"{folder}/model.safetensors", f"{folder}/config.json", f"{folder}/README.md"} <= names
    assert wheel.stat().st_size < 6e6
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"conv2former"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
