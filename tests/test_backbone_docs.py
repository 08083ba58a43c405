"""Runs every block of code in docs/backbone.md, in order, and looks at what came of it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shutil
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from .conftest import FIXTURES, ROOT

pytestmark = pytest.mark.slow

DOCUMENT = ROOT / "docs" / "backbone.md"
AS_WRITTEN = ("Feature maps", "Input sizes", "What to set")  # sections that need neither time nor a file
OPTIONAL = {"segmentation-models-pytorch": "segmentation_models_pytorch", "transformers": "transformers"}
SMALLER = {  # what the other sections are run with instead
    '"conv2former_t"': '"{tiny}"',
    '"tu-conv2former_t"': '"tu-{tiny}"',
    "hidden_size=512": "hidden_size=32",
}


@dataclass
class Block:
    section: str
    line: int
    code: str
    output: str = ""  # the text block after it, if there is one


@dataclass
class Document:
    """The blocks of the document, run as far as a test needs them.

    Attributes:
        printed: what each block that was run printed.
        after: the variables as they were at the end of each section.
    """

    blocks: list[Block]
    smaller: dict[str, str]
    printed: list[str] = field(default_factory=list)
    after: dict[str, dict[str, Any]] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)

    def run(self, section: str) -> dict[str, Any]:
        """Runs what has not been run up to the end of `section`, and returns the variables at its end."""
        if section in OPTIONAL:
            pytest.importorskip(OPTIONAL[section])
        last = max(i for i, block in enumerate(self.blocks) if block.section == section)
        for block in self.blocks[len(self.printed) : last + 1]:
            library = OPTIONAL.get(block.section)
            if library and not importlib.util.find_spec(library):
                self.printed.append("")
                continue
            code = block.code
            if block.section not in AS_WRITTEN:
                for old, new in self.smaller.items():
                    code = code.replace(old, new)
            torch.manual_seed(0)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("\n" * block.line + code, str(DOCUMENT), "exec"), self.variables)
            self.printed.append(out.getvalue())
            self.after[block.section] = dict(self.variables)
        return self.after[section]


def read_blocks() -> list[Block]:
    blocks: list[Block] = []
    section, language, start = "", "", 0
    lines = DOCUMENT.read_text().splitlines()
    for i, line in enumerate(lines):
        if line.startswith("```"):
            content = "\n".join(lines[start:i]) + "\n"
            if language == "python":
                blocks.append(Block(section, start, content))
            elif language == "text":
                blocks[-1].output = content
            language, start = ("" if language else line[3:]), i + 1
        elif line.startswith("#") and not language:
            section = line.lstrip("# ")
    return blocks


@pytest.fixture(scope="module")
def document(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    shutil.copy(FIXTURES / "official_format.pth.tar", folder / "conv2former_t.pth.tar")  # weights of `tiny`
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield Document(read_blocks(), {old: new.format(tiny=tiny) for old, new in SMALLER.items()})


def test_substitutions_are_found():
    text = DOCUMENT.read_text()
    assert [old for old in SMALLER if old not in text] == []
    assert all(block.section in AS_WRITTEN for block in read_blocks() if block.output)


@pytest.mark.parametrize("section", AS_WRITTEN)
def test_printed_output(document, section):
    document.run(section)
    shown = [(block.output, out) for block, out in zip(document.blocks, document.printed, strict=False) if block.output]
    assert shown
    for expected, printed in shown:
        assert printed == expected


# ------------------------------------------------------------------------------------------------------------- sizes

SIZES = re.findall(r"^\| `(features_only=True.*?)` \| (\d+) \|$", DOCUMENT.read_text(), re.MULTILINE)


@pytest.mark.parametrize(("arguments", "smallest"), SIZES)
def test_smallest_side(tiny, arguments, smallest):
    body = timm.create_model(tiny, **eval(f"dict({arguments})")).eval()
    works = []
    for side in range(1, 65):
        with contextlib.suppress(RuntimeError):
            body(torch.randn(1, 3, side, side))
            works.append(side)
    assert works == list(range(int(smallest), 65))
    sum(f.sum() for f in body.train()(torch.randn(1, 3, int(smallest), int(smallest)))).backward()


def test_sides_of_maps(tiny):
    assert len(SIZES) == 6
    body = timm.create_model(tiny, features_only=True).eval()
    for side in range(31, 100):
        expected = [(side + 1) // 2 // 2 // 2**stage for stage in range(4)]
        assert [f.shape[2] for f in body(torch.randn(1, 3, side, 40))] == expected


def test_map_pixels_begin_at_multiples_of_the_stride(tiny):
    """An image cut below and to the right leaves the other map pixels as they are, up to the kernels' reach."""
    body = timm.create_model(tiny, features_only=True, out_indices=(0,)).eval()
    x = torch.randn(1, 3, 131, 131)
    whole, cut = body(x)[0], body(x[:, :, :97, :97])[0]
    same, shifted = ((cut[..., :16, :16] - whole[..., i : 16 + i, i : 16 + i]).abs().max() for i in (0, 1))
    assert same < 1e-3 * shifted


def test_anchors_need_the_padding(document, tiny):
    body = timm.create_model(tiny, features_only=True).eval()
    generator = AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)

    def step(x):  # between the first two anchors, x then y
        maps = body(x)
        anchors = generator(ImageList(x, [tuple(x.shape[2:])]), maps)[0][: maps[0].shape[3] + 1]
        return [(anchors[1] - anchors[0])[0].item(), (anchors[-1] - anchors[0])[1].item()]

    x = torch.randn(1, 3, 97, 131)
    assert step(x) == [3, 4]
    assert step(document.run("Input sizes")["pad"](x)) == [4, 4]


# --------------------------------------------------------------------------------------------------- other libraries


def test_torchvision(document):
    variables = document.run("torchvision")
    assert variables["found"][0].keys() == {"boxes", "labels", "scores", "masks"}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in variables["body"].modules())
    maps = variables["detector"].backbone(torch.randn(1, 3, 97, 131))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    expected = variables["body"](torch.zeros(1, 3, 97, 131))
    assert [maps[str(i)].shape for i in range(4)] == [(1, 256, *f.shape[2:]) for f in expected]


def test_pretrained_weights_are_loaded(document):
    state_dict = document.run("Published weights")["body"].model.state_dict()
    expected = timm.create_model(document.smaller['"conv2former_t"'][1:-1], checkpoint_path="conv2former_t.pth.tar")
    assert all(torch.equal(tensor, expected.state_dict()[key]) for key, tensor in state_dict.items())
    assert len(state_dict) == len([key for key in expected.state_dict() if not key.startswith("head")])


# ------------------------------------------------------------------------------------- the two kinds of features_only


def test_layer_decay_by_kind(tiny, caplog):
    bodies = {kind: timm.create_model(tiny, features_only=True, feature_cls=kind) for kind in ("list", "getter")}
    groups = create_optimizer_v2(bodies["list"], "adamw", lr=1.0, layer_decay=0.5).param_groups
    assert {group["lr_scale"] for group in groups} == {1.0}
    assert "no effect" in caplog.text
    caplog.clear()
    groups = create_optimizer_v2(bodies["getter"].model, "adamw", lr=1.0, layer_decay=0.5).param_groups
    assert {group["lr_scale"] for group in groups} == {0.5**i for i in range(5)}
    assert {group["lr"] for group in groups} == {1.0}  # only timm's schedulers apply the scale
    assert not caplog.text


def test_checkpointing_by_kind(tiny):
    x = torch.randn(2, 3, 64, 64)
    gradients, updates = {}, {}
    for kind in ("plain", "getter", "list"):
        torch.manual_seed(0)
        body = timm.create_model(tiny, features_only=True, feature_cls="list" if kind == "list" else "getter").train()
        if kind != "plain":
            (body if kind == "list" else body.model).set_grad_checkpointing()
        sum(f.square().sum() for f in body(x)).backward()
        gradients[kind] = [p.grad for p in body.parameters()]
        updates[kind] = {b.item() for name, b in body.named_buffers() if name.endswith("num_batches_tracked")}
    assert updates == {"plain": {1}, "getter": {1}, "list": {1}}, "the stem ran again"
    for kind in ("getter", "list"):
        for found, expected in zip(gradients[kind], gradients["plain"], strict=True):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------ segmentation, embeddings


@pytest.mark.parametrize(("section", "size"), [(name, (97, 131) if "-" in name else (96, 128)) for name in OPTIONAL])
def test_segmentation_starts_from_the_file(document, section, size):
    variables = document.run(section)
    assert variables["logits"].shape == (2, 3, *size)
    stem = document.run("Published weights")["body"].model.stem
    theirs = {re.sub(r".*stem[._]", "", key): t for key, t in variables["model"].state_dict().items()}
    for name in ("conv1.weight", "norm1.running_mean"):
        assert torch.equal(theirs[name], stem.state_dict()[name])


def test_embeddings(document):
    variables = document.run("Embeddings")
    assert variables["embeddings"].shape == (4, 1280)
    assert torch.allclose(variables["similarity"].diagonal(), torch.ones(4))
    model = timm.create_model(document.smaller['"conv2former_t"'][1:-1], checkpoint_path="conv2former_t.pth.tar").eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), variables["model"](x))
    assert model.head_hidden_size == 1280
    assert model.num_features == 32


def test_every_block_was_run(document):
    document.run("Embeddings")
    assert len(document.printed) == len(document.blocks)
