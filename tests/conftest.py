from __future__ import annotations

import ast
import gc
import os
import runpy
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

# The tests are the same on every machine, but for those of tests/gpu, which `make test-gpu` starts.
if not os.environ.get("CONV2FORMER_TESTS_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported: its kernels run on the CPU

_store = tempfile.TemporaryDirectory(prefix="conv2former-tests-store-")
os.environ["CONV2FORMER_HOME"] = _store.name  # before the import: what a developer has installed changes no test
# Compiled functions come from the store of the process that started xdist's workers.
_compiled = Path(os.environ.setdefault("CONV2FORMER_TESTS_COMPILED", os.path.join(_store.name, "compiled")))
if _compiled.parent != Path(_store.name):
    Path(_store.name, "compiled").symlink_to(_compiled, target_is_directory=True)

import conv2former  # noqa: E402
from conv2former import compiling  # noqa: E402
from conv2former.data import pixels  # noqa: E402
from conv2former.ops.cpu import native  # noqa: E402

from .ops.interpreter import INTERPRETS, mend  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parents[1]
TINY_YAML = "dims: [8, 16, 24, 32]\ndepths: [1, 1, 2, 1]\nkernel_size: 7\n"

# Files that take minutes, which begin first: at the end one of them would leave the other cores idle.
LONG = ("test_scripts.py", "test_processes.py", "test_operators.py", "test_slurm.py", "test_packaging.py")

compiling.SHORT = 3600.0  # seconds: what a test prints does not depend on whether it is the first to compile
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network
_cache = tempfile.TemporaryDirectory(prefix="conv2former-tests-")  # removed at exit
os.environ["HF_DATASETS_CACHE"] = _cache.name
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)  # the networks are tiny, and threads that wait for each other on a busy machine crawl
if not torch.cuda.is_available():
    # If a process's first backward pass is in a program of torch.compile, those of its forks raise an error.
    torch.ones(1, requires_grad=True).sum().backward()


def pytest_configure(config: pytest.Config) -> None:
    """Compiles, before xdist's workers start, what each of them would begin with at the same time."""
    if config.getoption("numprocesses", None):
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda load: load(), (pixels._library, lambda: native.usable(torch.float32))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


class Fixture:
    """A file of reference tensors: `fixture["input"]`, and everything below a prefix without it."""

    def __init__(self, name: str) -> None:
        path = FIXTURES / f"{name}.safetensors"
        self.tensors = safetensors.torch.load_file(path)
        with safe_open(path, "pt") as file:
            self.metadata = file.metadata() or {}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """The name of a registered variant of the shape of `model_k7` and `official_format.pth.tar`."""
    path = tmp_path_factory.mktemp("variants") / "conv2former_tiny.yaml"
    path.write_text(TINY_YAML)
    return conv2former.register_variant(path)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The backend of a GPU, `ops/cuda/branch.py`, which then computes blocks on the CPU too, in Triton's interpreter.

    A convolution's strip is two columns wide, which takes the interpreter a fourth of the time of eight.
    """
    if not INTERPRETS:
        pytest.skip("needs Triton, and its interpreter chosen")
    from conv2former.ops import autograd
    from conv2former.ops.cuda import branch, mixing

    mend()
    monkeypatch.setattr(mixing, "choose_strip", lambda width, choices: 2)
    monkeypatch.setattr(mixing, "MLP_STRIP", 2)
    monkeypatch.setattr(autograd, "choose_backend", lambda *args, **options: branch)
    monkeypatch.setattr(autograd, "prepare", lambda calls, x: branch.prepare(calls))
    return branch


@pytest.fixture
def official_file() -> Path:
    return FIXTURES / "official_format.pth.tar"


@pytest.fixture
def official_content(official_file) -> dict:
    from conv2former.weights.reading import read_checkpoint

    return read_checkpoint(official_file)


def run_script(monkeypatch, name: str, *words) -> int:
    """Runs a script of `scripts/` in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    monkeypatch.setattr("conv2former.tools.cli._leave", sys.exit)  # this process is pytest's, whatever WORLD_SIZE says
    try:
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def parse_python(code: str) -> ast.Module:
    """As `ast.parse`, without collecting garbage meanwhile.

    Some releases of Python 3.11 raise a SystemError where what a collection calls parses code, too (CPython's issue
    106905).
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(code)
    finally:
        if collects:
            gc.enable()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store for installed weights; what a test installs is unknown to timm again afterwards."""
    from timm.models import _registry

    from conv2former import variants
    from conv2former.models import zoo

    monkeypatch.setenv("CONV2FORMER_HOME", str(tmp_path / "store"))
    before = set(conv2former.list_variants())
    yield tmp_path / "store"
    monkeypatch.undo()
    for name in conv2former.list_variants():
        if name not in before:
            variants._variants.pop(name)
            zoo._from_store.discard(name)
            _registry._clear_model_entries(name)
            _registry._model_entrypoints.pop(name)
        else:
            zoo.register_installed(name)
