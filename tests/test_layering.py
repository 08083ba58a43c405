"""Imports go one way: scripts -> commands -> tools -> engine -> data -> config, and models needs none of them."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from .conftest import ROOT

ALLOWED = {
    "models": set(),
    "config": set(),
    "data": {"config"},
    "engine": {"config", "data", "models"},
    "tools": {"config", "data", "models", "engine"},
    "commands": {"config", "data", "models", "engine", "tools"},
}
# What the zoo may import: `pip install conv2former` brings no more.
ZOO_NEEDS = {"torch", "timm", "yaml", "safetensors"}
# Triton comes with torch where it exists. kernels.py asks for it, and imports the others, when a map is on a GPU.
TRITON_FILES = {"kernels.py", "triton_kernels.py", "triton_launch.py"}


def imports(path) -> tuple[set[str], set[str]]:
    """Returns the layers of this package and the other top-level packages that a file imports, anywhere in it."""
    package = ("conv2former", *path.relative_to(ROOT / "conv2former").parts[:-1])
    modules: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            modules += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    own = {m.split(".")[1] for m in modules if m.startswith("conv2former.")}
    others = {m.split(".")[0] for m in modules} - {"conv2former", "", *sys.stdlib_module_names}
    return own & ALLOWED.keys(), others


@pytest.mark.parametrize("layer", ALLOWED)
def test_layers(layer):
    files = sorted((ROOT / "conv2former" / layer).glob("**/*.py"))
    assert files
    for path in files:
        own, others = imports(path)
        assert own <= ALLOWED[layer] | {layer}, path
        if layer == "models":
            assert others <= ZOO_NEEDS | ({"triton"} if path.name in TRITON_FILES else set()), path


def test_nothing_imports_scripts():
    for path in (ROOT / "conv2former").glob("**/*.py"):
        assert "scripts" not in imports(path)[1], path


def test_importing_the_zoo_loads_nothing_more_than_timm():
    code = (
        "import sys, timm; before = {m.split('.')[0] for m in sys.modules}; import conv2former; "
        "print(*{m.split('.')[0] for m in sys.modules} - before)"
    )
    out = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert set(out.stdout.split()) <= {"conv2former", "argparse", "difflib", "yaml", "_yaml"}
    assert not out.stderr
