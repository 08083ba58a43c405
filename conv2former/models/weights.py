"""Weight files: safe reading, the layouts of others, which network a file holds, and loading that says what differs.

Three layouts of the same network are understood: this project's, that of the authors' code
(github.com/HVision-NKU/Conv2Former), and that of birder (github.com/birder-project/birder).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import nn

from ..errors import CheckpointError, shorten
from .installed import HUB_CONFIG, HUB_FILES, SECTION, find_installed
from .preprocessing import Preprocessing, noted_preprocessing
from .variants import FUSION_NAMES, find_variant, is_builtin

__all__ = ["CheckpointInfo", "describe_checkpoint", "inspect_checkpoint", "load_weights", "read_checkpoint"]

_logger = logging.getLogger(__name__)

CLASSIFIER = ("head.fc.weight", "head.fc.bias")
FIRST_CONV = "stem.conv1"
EMA_NAMES = ("state_dict_ema", "model_ema")  # of averaged weights in a checkpoint, as timm has them

# ------------------------------------------------------------------------------------------------ layouts of others

_STEM = {"0": "conv1", "2": "norm1", "3": "conv2", "5": "norm2", "6": "conv3"}
_RULES: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # the backbone: the authors' downsample_layers, stages.S.B, head, pred; birder's stem, body.stageN, features
        (r"^(?:downsample_layers\.0|stem)\.([02356])\.", lambda m: f"stem.{_STEM[m[1]]}."),
        (r"^downsample_layers\.(\d+)\.([01])\.", lambda m: f"stages.{m[1]}.downsample.{('norm', 'conv')[int(m[2])]}."),
        (
            r"^body\.stage(\d+)\.downsample\.([01])\.",
            lambda m: f"stages.{int(m[1]) - 1}.downsample.{('norm', 'conv')[int(m[2])]}.",
        ),
        (r"^body\.stage(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}."),
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"^(?:head|features)\.([02])\.", lambda m: f"head_conv.{'conv' if m[1] == '0' else 'norm'}."),
        (r"^(?:pred|classifier)\.", "head.fc."),
        # a block, and its halves when they are loaded alone
        (r"(^|\.)attn\.(?:att|attn)\.([02])\.", lambda m: f"{m[1]}attn.{'a' if m[2] == '0' else 'conv_dw'}."),
        (r"^(?:att|attn)\.([02])\.", lambda m: "a." if m[1] == "0" else "conv_dw."),
        (r"(^|\.)mlp\.pos\.", r"\1mlp.conv_dw."),
        (r"^pos\.", "conv_dw."),
        (r"(^|\.)layer_scale_([12])$", r"\1ls\2.gamma"),
    )
]
_FOREIGN = {
    "authors": re.compile(r"(?:^|\.)(?:downsample_layers\.\d|att\.[02]\.|pred\.)"),
    "birder": re.compile(r"(?:^|\.)(?:body\.stage\d|attn\.attn\.[02]\.|features\.[02]\.)"),
}


def _native_key(key: str) -> str:
    key = re.sub(r"(^|\.)_orig_mod\.", r"\1", key)  # torch.compile
    key = re.sub(r"^(?:module\.)+", "", key)  # DistributedDataParallel, ModelEma
    for pattern, replacement in _RULES:
        key = pattern.sub(replacement, key)
    return key


def rename_keys_in_place(state_dict: dict[str, Any], prefix: str = "") -> None:
    """Renames the keys below `prefix` from any known layout, wrapper prefixes removed, to this project's own.

    Keys that are already right, and keys of other modules, stay as they are.
    """
    for key in [k for k in state_dict if isinstance(k, str) and k.startswith(prefix)]:
        native = prefix + _native_key(key[len(prefix) :])
        value = state_dict[key]
        if native.endswith("norm.eps") and value.numel() == 1 and abs(float(value) - 1e-6) < 1e-12:
            del state_dict[key]  # birder keeps it as a buffer
        elif native != key:
            del state_dict[key]
            if native.endswith(".gamma") and value.ndim > 1:
                value = value.reshape(-1)  # birder keeps layer scale as (1, C, 1, 1)
            state_dict[native] = value


def _layout(keys: Iterable[str]) -> str:
    keys = list(keys)
    return next((name for name, pattern in _FOREIGN.items() if any(pattern.search(key) for key in keys)), "conv2former")


# -------------------------------------------------------------------------------------------------- reading of files


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a `.safetensors` or `torch.save` file to the CPU without running any code from it.

    Of the classes that a pickle may hold, only tensors, built-in types and `argparse.Namespace` (the recipe in the
    authors' and timm's checkpoints) are allowed.

    Args:
        path: the file, whatever its name ends with: `.pth.tar` files are ordinary `torch.save` files, never to be
            untarred. Or a folder in timm's hub layout, also as `local-dir:FOLDER`, or the weight file in one. Or the
            name of installed weights, such as `conv2former_t.hvision_in1k`, where no file has that name.

    Returns:
        What the file holds: a state dict, or a training checkpoint with the state dict inside. For a folder the state
        dict under `state_dict`, and its config.json under `hub_config`.

    Raises:
        CheckpointError: the file is missing, truncated, not a checkpoint, or holds code.
    """
    path = weight_file(path)
    content = _read_file(path)
    if path.name in HUB_FILES and (path.parent / HUB_CONFIG).is_file():
        return {"state_dict": content, "hub_config": _read_hub_config(path.parent / HUB_CONFIG)}
    return content


def weight_file(path: str | Path) -> Path:
    """Returns the file that `read_checkpoint` reads the weights from.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(str(path).removeprefix("local-dir:"))
    if not path.exists() and (installed := find_installed(str(path))):
        path = installed.path
    if path.is_dir():
        weights = next((path / name for name in HUB_FILES if (path / name).is_file()), None)
        if weights is None or not (path / HUB_CONFIG).is_file():
            raise CheckpointError(
                f"{path} is a folder without {HUB_CONFIG} and {HUB_FILES[0]}, so not in timm's layout; give a weight "
                "file (a '.pth.tar' file must not be unpacked)"
            )
        return weights
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: no permission to read it")
    return path


def _read_hub_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:  # a broken encoding, too, is a ValueError
        raise CheckpointError(f"{path} is not readable as JSON ({e})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not a timm model's configuration")
    return config


def _read_file(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        import safetensors.torch  # a dependency of timm, slow to import

        try:
            return dict(safetensors.torch.load_file(path))
        except (safetensors.SafetensorError, OSError, ValueError) as e:
            raise CheckpointError(f"{path} is not a complete .safetensors file ({e})") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(_refusal(path)) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError) as e:
        raise CheckpointError(f"{path} is truncated or not a checkpoint that torch can read{_reason(e)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict or a checkpoint")
    return content


def _refusal(path: Path) -> str:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it only names things for the message, and a file that is no pickle at all ends here too
        names = []
    if names:
        return (
            f"{path} is refused: to open it, code outside the file would run ({', '.join(names)}). "
            "If you trust its source, load it there and save the state dict alone with torch.save"
        )
    return f"{path} is not a checkpoint that torch can read"


def _reason(error: Exception) -> str:
    text = str(error).strip().split("\n")[0].split(". ")[0]
    return f" ({text})" if " " in text else ""  # the text of a bare EOFError or KeyError tells nobody anything


def unwrap_checkpoint(content: Mapping[str, Any], use_ema: bool = True) -> tuple[Mapping[str, Any], str]:
    """Finds the state dict in what a file holds, averaged weights first.

    Returns:
        The state dict, keys as in the file, and the name it has in the file: '' where the file is the state dict
        itself.
    """
    names = (EMA_NAMES if use_ema else ()) + ("state_dict", "model", "state")
    for name in names:
        if isinstance(content.get(name), dict) and content[name]:
            return content[name], name
    return content, ""


def native_state_dict(content: Mapping[str, Any], use_ema: bool = True) -> dict[str, Any]:
    """Returns a new state dict in this project's layout from a state dict or checkpoint in any known one.

    Raises:
        CheckpointError: it holds something else than tensors.
    """
    state_dict = dict(unwrap_checkpoint(content, use_ema)[0])
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(f"this is not a state dict of tensors: the key {key!r} is no text")
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            kind = f"{value.layout} tensor" if isinstance(value, torch.Tensor) else type(value).__name__
            raise CheckpointError(f"this is not a state dict of tensors: {key!r} is a {kind}")
    rename_keys_in_place(state_dict)
    return state_dict


# -------------------------------------------------------------------------------------------- which network is this


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a state dict tell about its network; the arguments of `Conv2Former` of the same names.

    Attributes:
        dims, depths, kernel_size, mlp_ratio, head_hidden_size: as in the variants' YAML files; `kernel_size` is one
            number if all stages agree, `head_hidden_size` is 0 for a network without its head.
        layer_scale: whether there is one.
        in_chans, num_classes: channels of the input, size of the classifier (0 without one).
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    kernel_size: int | tuple[int, ...]
    mlp_ratio: float
    head_hidden_size: int
    layer_scale: bool
    in_chans: int
    num_classes: int

    @property
    def variant(self) -> str | None:
        """Name of the variant with this shape, or None."""
        return find_variant(dims=self.dims, depths=self.depths, kernel_size=self.kernel_size, mlp_ratio=self.mlp_ratio)

    def __str__(self) -> str:
        shape = f"dims {list(self.dims)}, depths {list(self.depths)}, kernel size {self.kernel_size}"
        return f"{self.variant} ({shape})" if self.variant else f"a Conv2Former with {shape}"


def identify(state_dict: Mapping[str, Any]) -> Architecture | None:
    """Reads the architecture off a state dict in this project's layout; None if it is not a Conv2Former's."""
    blocks: dict[int, set[int]] = {}
    for key in state_dict:
        if match := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.attn\.conv_dw\.weight$", key):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    first_conv, fc1 = (state_dict.get(k) for k in (f"{FIRST_CONV}.weight", "stages.0.blocks.0.mlp.fc1.weight"))
    if first_conv is None or fc1 is None or not blocks or sorted(blocks) != list(range(len(blocks))):
        return None
    kernels = [state_dict[f"stages.{s}.blocks.{min(blocks[s])}.attn.conv_dw.weight"] for s in sorted(blocks)]
    if any(weight.ndim != 4 or 0 in weight.shape for weight in (first_conv, fc1, *kernels)):
        return None
    sizes = tuple(int(kernel.shape[-1]) for kernel in kernels)
    classifier, head_conv = (state_dict.get(key) for key in (CLASSIFIER[0], "head_conv.conv.weight"))
    return Architecture(
        dims=tuple(int(kernel.shape[0]) for kernel in kernels),
        depths=tuple(max(blocks[s]) + 1 for s in sorted(blocks)),
        kernel_size=sizes[0] if len(set(sizes)) == 1 else sizes,
        mlp_ratio=fc1.shape[0] / fc1.shape[1],
        head_hidden_size=0 if head_conv is None or not head_conv.ndim else int(head_conv.shape[0]),
        layer_scale="stages.0.blocks.0.ls1.gamma" in state_dict,
        in_chans=int(first_conv.shape[1]),
        num_classes=0 if classifier is None or not classifier.ndim else int(classifier.shape[0]),
    )


@dataclass(frozen=True)
class CheckpointInfo(Architecture):
    """What a weight file is: the network, from its tensors, and what the training script noted.

    Attributes:
        name: name of the variant; None if its shape is none of the known ones and the file does not say.
        num_parameters: of the network in the file.
        layout: whose names the tensors have: 'conv2former', 'authors' or 'birder'.
        has_ema: whether averaged weights are in the file; they are what loading takes.
        fusion: as in the variants' YAML files; the tensors do not tell it, so it is 'product' where the file does not.
        epoch, metric: as the training script saved them, None where it did not.
        recipe: the training arguments or configuration in the file; empty where there is none.
        class_names: names in index order, None where the file has none.
        preprocessing: of images, as the file notes it, or else as published for such a network, or the default.
        preprocessing_noted: the names of its fields that the file notes.
    """

    name: str | None
    num_parameters: int
    layout: str
    has_ema: bool
    fusion: str = "product"
    epoch: int | None = None
    metric: float | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    preprocessing_noted: tuple[str, ...] = ()

    def model_args(self) -> dict[str, Any]:
        """Returns the arguments of `Conv2Former` that define the network."""
        return {
            "dims": self.dims,
            "depths": self.depths,
            "kernel_size": self.kernel_size,
            "mlp_ratio": self.mlp_ratio,
            "ls_init_value": 1e-6 if self.layer_scale else None,
            "head_hidden_size": self.head_hidden_size,
            "fusion": self.fusion,
        }

    def __str__(self) -> str:
        best = "" if self.metric is None else f", metric {self.metric:g}"
        lines = [
            f"{super().__str__()}, {self.num_classes} classes, {self.num_parameters:,} parameters",
            f"  layout: {self.layout}, {'averaged' if self.has_ema else 'raw'} weights",
            f"  epoch: {'not noted' if self.epoch is None else self.epoch}{best}",
            f"  images: {self.preprocessing}",
            "  recipe: " + (", ".join(f"{key}={value!r}" for key, value in self.recipe.items()) or "not noted"),
        ]
        return "\n".join(lines)


def inspect_checkpoint(path: str | Path) -> CheckpointInfo:
    """Tells which variant a weight file is, its metric, its epoch and the recipe in it, running no code from the file.

    Raises:
        CheckpointError: the file cannot be read, holds code, or is not a Conv2Former's.
    """
    return describe_checkpoint(read_checkpoint(path), path)


def describe_checkpoint(content: Mapping[str, Any], path: object) -> CheckpointInfo:
    """As `inspect_checkpoint`, of what `read_checkpoint` returned; `path` is named in errors."""
    raw, _ = unwrap_checkpoint(content)
    try:
        state_dict = native_state_dict(content)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from None
    architecture = identify(state_dict)
    if architecture is None:
        raise CheckpointError(f"{path} is not a Conv2Former checkpoint: its keys are {shorten(raw, 5)}")
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    hub_config = _hub_config(content)
    own = hub_config.get(SECTION)
    notes = own if isinstance(own, dict) else content
    recipe = notes.get("args") or notes.get("config") or notes.get("recipe") or {}
    recipe = dict(vars(recipe)) if isinstance(recipe, argparse.Namespace) else recipe
    recipe = recipe if isinstance(recipe, dict) else {}
    epoch, metric = notes.get("epoch"), notes.get("metric")
    names = content.get("class_names") or _hub_class_names(hub_config) or _birder_class_names(content)
    definition = definition_in(content)
    fusion = definition.get("fusion", "product")
    if fusion not in FUSION_NAMES:
        raise CheckpointError(f"{path} has the fusion {fusion!r}; known: {', '.join(FUSION_NAMES)}")
    known, noted = architecture.variant if fusion == "product" else None, definition.get("name")
    noted = noted if isinstance(noted, str) else None
    name = known if known and (is_builtin(known) or not noted) else noted  # several of the user's may have one shape
    note = content.get("preprocessing") or hub_config.get("pretrained_cfg", hub_config) or _birder_images(content)
    preprocessing, noted = noted_preprocessing(recipe, note if isinstance(note, dict) else {}, name)
    assumed = notes.get("assumed")  # of a converted file: what is in pretrained_cfg although nobody noted it
    return CheckpointInfo(
        **vars(architecture),
        name=name,
        fusion=fusion,
        num_parameters=sum(t.numel() for k, t in state_dict.items() if not k.endswith(buffers)),
        layout=_layout(raw),
        has_ema=any(isinstance(content.get(name), dict) and content[name] for name in EMA_NAMES),
        epoch=epoch if isinstance(epoch, int) else None,
        metric=float(metric) if isinstance(metric, (int, float)) else None,
        recipe=recipe,
        class_names=[str(name) for name in names] if isinstance(names, list) else None,
        preprocessing=preprocessing,
        preprocessing_noted=tuple(key for key in noted if key not in (assumed if isinstance(assumed, list) else ())),
    )


def _birder_class_names(content: Mapping[str, Any]) -> list[str] | None:
    """Returns the class names in a training file of birder's, which has the index of each."""
    indices = content.get("class_to_idx")
    if not isinstance(indices, dict) or set(indices.values()) != set(range(len(indices))):
        return None
    return sorted(indices, key=indices.__getitem__)


def _birder_images(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a training file of birder's notes about its images: mean, std and, as timm, `input_size`."""
    stats, signature = content.get("rgb_stats"), content.get("signature")
    noted = dict(stats) if isinstance(stats, dict) else {}
    with contextlib.suppress(TypeError, LookupError):
        noted["input_size"] = signature["inputs"][0]["data_shape"][1:]  # type: ignore[index]
    return noted


def definition_in(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint says about the network beyond its tensors: `name` and `fusion`, or nothing."""
    hub_config = _hub_config(content)
    own = hub_config.get(SECTION)
    places = (
        content.get("variant"),
        own.get("variant") if isinstance(own, dict) else None,
        hub_config.get("model_args"),
    )
    return next((definition for definition in places if isinstance(definition, dict)), {})


def _hub_config(content: Mapping[str, Any]) -> dict[str, Any]:
    config = content.get("hub_config")
    return config if isinstance(config, dict) else {}


def _hub_class_names(hub_config: Mapping[str, Any]) -> Any:
    inner = hub_config.get("pretrained_cfg")
    found = [config.get("label_names") for config in (hub_config, inner) if isinstance(config, dict)]
    return next((names for names in found if names), None)


# ----------------------------------------------------------------------------------------------------------- loading


def check_fit(model: nn.Module, state_dict: Mapping[str, Any], ignore: Iterable[str] = ()) -> None:
    """Checks that a state dict in this project's layout has just the keys and shapes of `model`.

    Args:
        model: a Conv2Former.
        state_dict: what is to be loaded.
        ignore: keys that may differ.

    Raises:
        CheckpointError: they differ; says in one sentence how the networks do, or lists the keys.
    """
    skip = set(ignore)
    own = {key: tensor for key, tensor in model.state_dict().items() if key not in skip}
    # torch fills in the batch counter where an old file lacks it; nothing reads it here
    missing = [key for key in own if key not in state_dict and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state_dict if key not in own and key not in skip]
    reshaped = [key for key, tensor in own.items() if key in state_dict and state_dict[key].shape != tensor.shape]
    if not (missing or unexpected or reshaped):
        return
    theirs, ours = identify(state_dict), identify(model.state_dict())
    if theirs and ours and str(theirs) != str(ours):
        fix = f"create '{theirs.variant}'" if theirs.variant else "register a variant of that shape and create it"
        raise CheckpointError(f"the checkpoint is {theirs}, the model is {ours}: {fix} instead")
    if len(missing) > len(own) // 2:
        raise CheckpointError(f"this is not a Conv2Former checkpoint: its keys are {shorten(state_dict, 5) or 'none'}")
    lines = ["the checkpoint does not fit the model:"]
    if missing:
        lines.append(f"  missing keys: {shorten(missing)}")
    if unexpected:
        lines.append(f"  unexpected keys: {shorten(unexpected)}")
    if reshaped:
        shapes = [f"{key} {tuple(state_dict[key].shape)} for {tuple(own[key].shape)}" for key in reshaped]
        lines.append(f"  wrong shapes: {shorten(shapes)}")
    raise CheckpointError("\n".join(lines))


def adapt_classifier(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Makes the classifier in `state_dict` fit the model's, in place, and logs a warning where it is not used.

    A classifier for another number of classes, or none, leaves the model's own as it is.
    """
    own = {key: tensor for key, tensor in model.state_dict().items() if key in CLASSIFIER}
    theirs = state_dict.get(CLASSIFIER[0])
    if theirs is not None and own and theirs.ndim and theirs.shape[0] == own[CLASSIFIER[0]].shape[0]:
        if theirs.numel() == own[CLASSIFIER[0]].numel():  # Linear, or the 1x1 convolution that it is without pooling
            state_dict[CLASSIFIER[0]] = theirs.reshape(own[CLASSIFIER[0]].shape)
        return
    if theirs is None and not own:
        return
    found = "no classifier" if theirs is None or not theirs.ndim else f"a classifier for {theirs.shape[0]} classes"
    kept = f"the model keeps its own for {own[CLASSIFIER[0]].shape[0]} classes" if own else "it is left out"
    _logger.warning("the checkpoint has %s: %s; all other weights are loaded", found, kept)
    for key in CLASSIFIER:
        state_dict.pop(key, None)
    state_dict.update(own)


def load_weights(model: nn.Module, path: str | Path, use_ema: bool = True) -> None:
    """Loads a weight file into a Conv2Former; every tensor must fit, but the classifier may be for other classes.

    Args:
        model: a Conv2Former.
        path: a file in this project's, the authors' or birder's layout; see `read_checkpoint`.
        use_ema: take the averaged weights where the file has them.

    Raises:
        CheckpointError: the file cannot be read, holds code, or differs in more than the classifier; the model is
            unchanged.
    """
    from .backbone import Conv2Former  # which imports this module

    model = unwrap_model(model)  # of torch.compile and DistributedDataParallel
    if not isinstance(model, Conv2Former):
        raise CheckpointError(
            f"load_weights needs a whole Conv2Former, not a {type(model).__name__}; for features_only=True "
            "call timm.create_model with pretrained=True and pretrained_cfg_overlay=dict(file=FILE)"
        )
    load_content(model, read_checkpoint(path), path, use_ema)


def load_content(model: nn.Module, content: Mapping[str, Any], path: object, use_ema: bool = True) -> None:
    """As `load_weights`, into a Conv2Former itself, of what `read_checkpoint` returned; `path` is named in errors."""
    definition = definition_in(content)
    fusion = definition.get("fusion", "product") if definition else model.fusion
    if fusion != model.fusion:  # the tensors would fit
        raise CheckpointError(f"{path} was trained with fusion '{fusion}', the network has '{model.fusion}'")
    try:
        model.load_state_dict(native_state_dict(content, use_ema))
    except CheckpointError as e:
        text = str(e)
        raise CheckpointError(text if text.startswith(str(path)) else f"{path}: {text}") from None
