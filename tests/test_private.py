"""Private names of other packages are in `conv2former/_private.py`, and everything works without each of them."""

from __future__ import annotations

import ast
import importlib
import logging

import pytest
import timm
import torch
from torch import nn
from torch.autograd import forward_ad

from conv2former import _private
from conv2former.data.classes import class_names_of
from conv2former.data.loader import Loader
from conv2former.data.real_labels import real_labels
from conv2former.data.workers import stop_workers
from conv2former.errors import DataError
from conv2former.models import fusion
from conv2former.models.block import Conv2FormerBlock
from conv2former.ops.cpu import onednn
from conv2former.ops.tensors import is_transformed
from conv2former.tools.benchmark.machine import OperatorTraffic

from .conftest import ROOT, parse_python

FILES = sorted([*(ROOT / "conv2former").glob("**/*.py"), *(ROOT / "scripts").glob("**/*.py")])
# Python's own: documented, or unchanged in argparse since it exists
PYTHONS = {"_replace", "_exit", "_actions", "_option_string_actions", "_subparsers", "_SubParsersAction"}
GUARDS = [
    _private.INTERPRETERS,
    _private.LEGACY_BATCHED,
    _private.LEVEL,
    _private.MODES,
    *_private.GLOBAL_HOOKS,
]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def own_names(trees) -> set[str]:
    """Returns the private names that the package itself defines."""
    found = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


def foreign_names(tree, own: set[str]) -> list[str]:
    """Returns the private names of others that a file touches."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            found += [] if node.attr in own else [node.attr]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            found += [str(arg.value) for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            found += [str(node.slice.value)]
    private = [name for name in found if any(map(is_private, name.split("."))) and name != "__future__.annotations"]
    return [name for name in private if name not in own | _private.STABLE | PYTHONS]


@pytest.mark.slow
def test_private_names_are_in_one_file():
    trees = {path: parse_python(path.read_text("utf-8")) for path in FILES}
    own = own_names(trees.values()) | {"_private", "_configs", "_yaml", "_clock"}
    touched = {path.relative_to(ROOT): foreign_names(tree, own) for path, tree in trees.items()}
    (names,) = [touched.pop(path) for path in list(touched) if path.name == "_private.py"]
    assert "_current_level" in names  # so it is found
    assert not {path: names for path, names in touched.items() if names}


def test_foreign_names_are_found():
    code = "import a._b\nfrom torch._c import d\nx._e()\ngetattr(x, '_f')\nown['_g']\nself._own = self._h\n"
    tree = parse_python(code)
    assert sorted(foreign_names(tree, own_names([tree]))) == ["_e", "_f", "_g", "_h", "a._b", "torch._c.d"]


def test_stable_names():
    layer = nn.Conv2d(1, 1, 1)
    assert all(hasattr(layer, name) for name in _private.STABLE)


# Names that not all versions have, of which the others stand in for each other.
ELSEWHERE = {_private.RECOMPILE_LIMIT, _private.CACHE_SIZE_LIMIT, _private.RESOLVE}


@pytest.mark.parametrize("name", [n for n in _private.NAMES if n not in ELSEWHERE], ids=lambda name: name.path)
def test_this_version_has_it(name):
    assert name.value is not None, name.path


def test_a_missing_name_is_said_once(caplog):
    missing = [
        _private.Name("torch:_gone.away", "it takes longer"),
        _private.Name("torch._gone:away", "it takes longer"),
    ]
    missing.append(_private.Name("torch:ops.mkldnn._gone", "it takes longer"))
    with caplog.at_level(logging.INFO, "conv2former"):
        assert [name.value for name in missing * 2] == [None] * 6
    assert len(caplog.messages) == 3
    assert caplog.messages[0] == "this version of torch has no torch:_gone.away: it takes longer"


def results(block, x):
    block.zero_grad()
    x = x.clone().requires_grad_()
    y = block(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in block.parameters())]


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = Conv2FormerBlock(8, kernel_size=5, ls_init_value=0.5)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    return block


@pytest.fixture
def without(monkeypatch):
    """Takes a name away."""

    def take_away(name: _private.Name) -> None:
        monkeypatch.setattr(name, "value", None)
        onednn._has_pointwise.cache_clear()
        onednn._has_products.cache_clear()

    yield take_away
    monkeypatch.undo()
    onednn._has_pointwise.cache_clear()
    onednn._has_products.cache_clear()


@pytest.mark.parametrize("name", _private.NAMES, ids=lambda name: name.path)
def test_networks_compute_the_formula_without_it(name, without, block, tiny, monkeypatch):
    x = torch.randn(2, 8, 9, 7)
    block.fused = block.attn.fused = block.mlp.fused = False
    expected = results(block, x)
    block.fused = block.attn.fused = block.mlp.fused = True
    without(name)
    assert fusion.is_fusable(block, x) is (name not in GUARDS)
    for ours, plain in zip(results(block, x), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), expected[0], rtol=1e-4, atol=1e-5)
    model = timm.create_model(tiny, num_classes=3).train()
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    with torch.no_grad():
        assert model.eval().bfloat16()(torch.randn(1, 3, 32, 32).bfloat16()).isfinite().all()


def test_what_the_guards_see(block):
    x = torch.randn(1, 8, 4, 4)
    assert not is_transformed(x)
    assert not fusion.has_global_hooks()
    seen = []
    torch.func.vmap(lambda t: seen.append(is_transformed(t)) or t)(x)
    with forward_ad.dual_level():
        seen.append(is_transformed(x))
    assert seen == [True, True]
    registers = nn.modules.module
    for register in (
        registers.register_module_forward_hook,
        registers.register_module_forward_pre_hook,
        registers.register_module_full_backward_hook,
        registers.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert fusion.has_global_hooks()
        handle.remove()
        assert not fusion.has_global_hooks()
    handle = registers.register_module_forward_hook(lambda *_: None, always_call=True)
    assert fusion.has_global_hooks()
    handle.remove()


def test_model_card_and_configuration(without, tmp_path, tiny):
    model = timm.create_model(tiny, num_classes=3)
    card = {"description": "D", "details": {"Classes": "3"}, "usage": "U", "citation": "C"}
    without(_private.README)
    assert _private.model_card(card, "T").startswith("# Model card for T\n\nD\n\n- **Classes:** 3\n\nU")
    paths = [tmp_path / "theirs" / "config.json", tmp_path / "public" / "config.json"]
    for path in paths:
        path.parent.mkdir()
        _private.write_hub_config(model, path, {}, {"dims": [8, 16, 24, 32]})
        without(_private.HUB_CONFIG)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    _private.note_model_args(model, kernel_size=7)
    assert model._model_args["kernel_size"] == 7
    without(_private.MODEL_ARGS)
    _private.note_model_args(model, kernel_size=5)
    assert model._model_args["kernel_size"] == 7


@pytest.mark.slow
def test_workers_of_a_loader(without):
    loader, ended = Loader([1, 2], num_workers=1), []
    for _ in range(2):
        iterator = iter(loader)
        stop_workers(loader, iterator)
        ended += [worker.is_alive() for worker in iterator._workers]
        without(_private.SHUTDOWN)
    assert ended == [False, True]


def test_columns_of_a_stream(without):
    datasets = pytest.importorskip("datasets")
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"x": 1, "y": "a"}, {"x": 2, "y": "b"}]))
    assert stream.features is None
    found = []
    for _ in range(2):
        resolved = _private.features_of_stream(stream)
        found.append((list(resolved), {key: value.dtype for key, value in resolved.features.items()}))
        without(_private.RESOLVE)
    assert found[0] == found[1]
    assert found[0][1] == {"x": "int64", "y": "string"}


def test_compiling_anew(without):
    config = importlib.import_module("torch._dynamo").config
    names = [name for name in (_private.RECOMPILE_LIMIT, _private.CACHE_SIZE_LIMIT) if name.value is not None]
    before = config.cache_size_limit
    try:
        for times, name in enumerate(names, 70):
            _private.allow_recompiling(times)
            assert config.cache_size_limit == times
            without(name)
        _private.allow_recompiling(99)
        assert config.cache_size_limit == 70 + len(names) - 1
    finally:
        config.cache_size_limit = before


def test_programs_beside_ddp(without):
    config = importlib.import_module("torch._dynamo").config
    before = config.optimize_ddp
    try:
        config.optimize_ddp = True
        _private.keep_programs_whole()
        assert not config.optimize_ddp
        config.optimize_ddp = True
        without(_private.OPTIMIZE_DDP)
        _private.keep_programs_whole()
        assert config.optimize_ddp
    finally:
        config.optimize_ddp = before


def test_errors_of_the_compiler(without):
    assert _private.compiler_errors() == (_private.COMPILER_ERROR.value,)
    without(_private.COMPILER_ERROR)
    assert _private.compiler_errors() == ()


def test_operators_are_seen(without):
    with OperatorTraffic() as traffic:
        torch.ones(4) + torch.ones(4)
    assert traffic.bytes_moved == 3 * 16 + 2 * 16  # what ones() writes, too
    assert _private.sees_operators()
    without(_private.DISPATCH_MODE)
    assert not _private.sees_operators()
    with _private._NoMode():
        pass


def test_lists_about_imagenet(monkeypatch):
    assert len(_private.imagenet_file("imagenet_a_synsets.txt").split()) == 200
    assert _private.imagenet_file("gone.txt") is None
    monkeypatch.setattr(_private, "imagenet_file", lambda name: None)
    with pytest.raises(DataError, match=r"ReaL labels .* install timm"):
        real_labels(object(), class_names_of(1000, None))
