"""What is said about what cannot be read: folders, misspelt names, objects and code in place of weights."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import conv2former
from conv2former import CheckpointError, Conv2Former

from .test_installed import put, zoo  # noqa: F401


def fails(path) -> str:
    with pytest.raises(CheckpointError) as error:
        conv2former.load_model(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_folder(tmp_path):
    run = tmp_path / "runs" / "photos"
    (run / "checkpoints").mkdir(parents=True)
    for step in (7, 20):
        (run / "checkpoints" / f"step_{step:08d}.pt").touch()
    assert f"{run} is a folder; give a weight file in it: {run}/checkpoints/step_00000020.pt (" in fails(run)
    (run / "checkpoints" / "best.pt").touch()
    assert fails(run) == f"{run} is a run folder; give the weight file in it: {run}/checkpoints/best.pt"
    assert f"give the weight file in it: {run}/checkpoints/best.pt" in fails(run / "checkpoints")
    assert f"holds run folders; give the weight file of one: {run}/checkpoints/best.pt" in fails(run.parent)


def test_a_folder_with_weight_files(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert "without config.json and model.safetensors" in fails(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert f"is a folder; give a weight file in it: {tmp_path}/model.safetensors (" in fails(tmp_path)


def test_a_misspelt_file(tmp_path):
    (tmp_path / "best.pt").touch()
    assert fails(tmp_path / "bst.pt") == f"{tmp_path}/bst.pt: no such file (did you mean 'best.pt'?)"
    assert fails(tmp_path / "none" / "x.pt") == f"{tmp_path}/none/x.pt: no such file"


def test_a_misspelt_name(zoo):  # noqa: F811
    assert "python scripts/convert.py FILE --install pub_a.one" in fails("pub_a")
    assert "python scripts/convert.py FILE --install pub_a.two" in fails("pub_a.two")
    put(zoo, "pub_a.mine")
    assert fails("pub_a.mien") == (
        "pub_a.mien: no such file, nor installed weights of that name (did you mean 'pub_a.mine'?)"
    )
    assert "did you mean 'pub_a.mine'" in fails("pub_b.mine")
    assert fails("conv2former_t.pth.tar") == "conv2former_t.pth.tar: no such file"
    with pytest.raises(CheckpointError, match=r"pub_a has no weights 'tow' \(did you mean 'two'\?\); published: one"):
        import timm

        timm.create_model("pub_a.tow", pretrained=True)


class _Odd:
    """Stands for what Lightning puts beside the weights: an object of a class that is not torch's."""


def test_an_odd_entry_beside_the_weights(tmp_path, official_content):
    state = {f"model.{key}": tensor for key, tensor in official_content["state_dict"].items()}
    torch.save({"state_dict": state, "hyper_parameters": _Odd(), "callbacks": {"best": 1}}, tmp_path / "last.ckpt")
    text = fails(tmp_path / "last.ckpt")
    assert re.search(r"refused: it refers to code, \S*_Odd, which is not run", text)
    command = 'torch.save(torch.load("last.ckpt", weights_only=False)["state_dict"], "weights.pt")'
    assert command in text
    trusted = torch.load(tmp_path / "last.ckpt", weights_only=False)
    torch.save(trusted["state_dict"], tmp_path / "weights.pt")  # what it says to do works
    assert conv2former.load_model(tmp_path / "weights.pt")[1].num_classes == 10


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_whole_network_as_an_object(tmp_path, is_wrapped):
    model = Conv2Former(dims=(4, 6, 8, 10), depths=(1, 1, 1, 1), kernel_size=3, num_classes=2)
    torch.save(nn.Sequential(model) if is_wrapped else model, tmp_path / "model.pt")
    text = fails(tmp_path / "model.pt")
    assert "it is a whole network as an object, not its state dict" in text
    assert 'torch.save(torch.load("model.pt", weights_only=False).state_dict(), "weights.pt")' in text


def test_an_exported_network(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "x.pt")
    assert "x.pt is an exported network (TorchScript); give the weight file" in fails(tmp_path / "x.pt")
