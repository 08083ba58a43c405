"""Imports go one way: scripts, commands -> tools -> engine -> tasks -> data -> config, and to models -> weights, ops.

Every import counts, wherever in a file it stands: one inside a function, or for types alone, is an arrow like others.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from .conftest import ROOT, parse_python

PACKAGE = ROOT / "conv2former"
# What a folder may import besides itself, and the files beside the folders, which import each other alone.
ALLOWED = {
    "ops": set(),
    "weights": set(),
    "models": {"ops", "weights"},
    "config": set(),
    "data": {"config"},
    "tasks": {"config", "data", "models", "weights"},
    "engine": {"config", "data", "models", "ops", "tasks", "weights"},
    "tools": {"config", "data", "engine", "models", "ops", "tasks", "weights"},
    "commands": {"config", "data", "engine", "models", "ops", "tasks", "tools", "weights"},
}
ENTRIES = {"__init__.py", "__main__.py", "train.py"}  # beside the folders, and above them
# What the zoo may import: `pip install conv2former` brings no more.
ZOO_NEEDS = {"torch", "timm", "yaml", "safetensors"}
# Triton comes with torch where it exists. These are imported when a map is on a GPU; backends.py asks for its version.
TRITON_FILES = {
    "ops/backends.py",
    *(f"ops/cuda/{name}.py" for name in ("device_functions", "mixing", "mlp_kernels", "modulation_kernels")),
    *(f"ops/cuda/{name}.py" for name in ("row_kernels", "rows")),
}


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def modules(root: Path = PACKAGE) -> dict[tuple[str, ...], Path]:
    return {module_of(path): path for path in sorted(root.glob("**/*.py"))}


def imports(path: Path, known: dict[tuple[str, ...], Path]) -> tuple[set[Path], set[str]]:
    """Returns the files of this package, and the other top-level packages, that a file imports, anywhere in it."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module[:-1]
    files, others = set(), set()
    for node in ast.walk(parse_python(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names = [(*base, alias.name) if (*base, alias.name) in known else base for alias in node.names]
        else:
            continue
        files |= {known[name] for name in names if name in known}
        others |= {name[0] for name in names if name[0] not in {"conv2former", *sys.stdlib_module_names}}
    return files - {path}, others


def folder_of(path: Path) -> str:
    """Returns the folder of the package that a file is in, '' for the files beside the folders."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("folder", ["", *ALLOWED])
def test_arrows_go_one_way(folder):
    known = modules()
    files = [
        path for path in known.values() if folder_of(path) == folder and not (folder == "" and path.name in ENTRIES)
    ]
    assert files
    for path in files:
        for target in imports(path, known)[0]:
            allowed = ALLOWED.get(folder, set()) | {"", folder}
            is_version = target == PACKAGE / "__init__.py" and folder in ("tools", "engine", "commands")
            assert is_version or (folder_of(target) in allowed and target.name not in ENTRIES - {"__init__.py"}), (
                f"{path.relative_to(ROOT)} imports {target.relative_to(ROOT)}"
            )


def test_every_folder_has_its_arrows():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("**/*.py"))}
    assert folders == set(ALLOWED)


def first_circle(graph: dict[str, set[str]]) -> list[str]:
    """Returns the nodes of a circle of a graph, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return e.args[1]
    return []


def test_there_is_no_circle_of_files():
    known = modules()
    graph = {str(path): {str(target) for target in imports(path, known)[0]} for path in known.values()}
    assert not first_circle(graph)


def test_circles_and_arrows_are_found(tmp_path):
    assert first_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    known = modules()
    files, others = imports(PACKAGE / "models" / "block.py", known)
    assert {PACKAGE / "ops" / "operators.py", PACKAGE / "models" / "fusion.py"} <= files
    assert others == {"torch", "timm"}
    assert PACKAGE / "ops" / "cuda" / "mixing.py" in imports(PACKAGE / "ops" / "operators.py", known)[0], (
        "in a function"
    )


@pytest.mark.parametrize("folder", ["models", "ops", "weights"])
def test_the_zoo_needs_little(folder):
    known = modules()
    for path in known.values():
        if folder_of(path) == folder:
            more = {"triton"} if str(path.relative_to(PACKAGE)) in TRITON_FILES else set()
            assert imports(path, known)[1] <= ZOO_NEEDS | more, path


def test_the_engine_knows_no_task():
    """It finds tasks by name: no file of it imports one, or has a word that is one's own."""
    words = {
        "top1",
        "top5",
        "macro_f1",
        "mixup",
        "cutmix",
        "confusion",
        "per_class",
        "labels",
        "augment",
        "segmentation",
    }
    known = modules()
    for path in (PACKAGE / "engine").glob("*.py"):
        assert not [file for file in imports(path, known)[0] if file.parent.parent == PACKAGE / "tasks"], path
        tree = parse_python(path.read_text("utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not words & (names | texts), path


def test_ops_know_no_modules_of_ours():
    """They see tensors: no class of PyTorch's modules is named there, and none of timm's."""
    for path in (PACKAGE / "ops").glob("**/*.py"):
        text = path.read_text("utf-8")
        assert "timm" not in imports(path, modules())[1], path
        assert "nn.Module" not in text, path


def test_nothing_imports_scripts_or_experiments():
    known = modules()
    for path in known.values():
        assert not {"scripts", "experiments"} & imports(path, known)[1], path


@pytest.mark.slow
def test_importing_the_zoo_loads_nothing_more_than_timm():
    code = (
        "import sys, timm; before = {m.split('.')[0] for m in sys.modules}; import conv2former; "
        "print(*{m.split('.')[0] for m in sys.modules} - before)"
    )
    out = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert set(out.stdout.split()) <= {"conv2former", "argparse", "difflib", "yaml", "_yaml"}
    assert not out.stderr
