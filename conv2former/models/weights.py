"""What a weight file is: which network it holds, what its training noted, and loading that says what differs."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.utils import unwrap_model
from torch import nn

from ..errors import CheckpointError, shorten
from ..text import printable
from .contents import EMA_NAMES, Taken, announce, native_state_dict, take_network
from .hub_config import HUB_CONFIG, SECTION
from .installed import say_if_unverified, weights_word
from .layouts import layout_of_keys, rename_keys_in_place
from .preprocessing import Preprocessing, noted_preprocessing
from .reading import read_checkpoint, weight_file
from .variants import FUSION_NAMES, find_variant, is_builtin

__all__ = [
    "CheckpointInfo",
    "describe_checkpoint",
    "inspect_checkpoint",
    "load_weights",
    "native_state_dict",
    "noted_kind",
    "read_checkpoint",
    "rename_keys_in_place",
    "weight_file",
    "weights_text",
]

CLASSIFIER = ("head.fc.weight", "head.fc.bias")
HEAD = ("head_conv.", "head.fc.")  # what comes after the last stage
HEAD_HIDDEN_SIZE = 1280  # of every published network; assumed where a file has no head
FIRST_CONV = "stem.conv1"
MOST_MISSING = 10  # times as many weights as a file has, in the network that its names tell of
NOT_NOTED = "not noted"
_KINDS = {"averaged": "average", "average": "average", "raw": "raw"}  # in converted files, and their canonical names


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

    def num_block_weights(self) -> float:
        """Returns how many weights the blocks have, but for norms and biases."""
        kernels = [self.kernel_size] * len(self.dims) if isinstance(self.kernel_size, int) else self.kernel_size
        one = [c * c * (3 + 2 * self.mlp_ratio) + c * k * k for c, k in zip(self.dims, kernels, strict=True)]
        return sum(float(depth) * weights for depth, weights in zip(self.depths, one, strict=True))

    def __str__(self) -> str:
        shape = f"dims {list(self.dims)}, depths {list(self.depths)}, kernel size {self.kernel_size}"
        return f"{self.variant} ({shape})" if self.variant else f"a Conv2Former with {shape}"


def identify(state_dict: Mapping[str, Any]) -> Architecture | None:
    """Reads the architecture off a state dict in this project's layout; None if it is not a Conv2Former's."""
    blocks: dict[int, set[int]] = {}
    for key in state_dict:
        if match := re.match(r"stages\.(\d)\.blocks\.(\d{1,15})\.attn\.conv_dw\.weight$", key):
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
        has_ema: whether averaged weights are in the file beside raw ones; they are what loading takes.
        noted_weights: what the file says about the others: 'raw', 'average', 'soup of N' or 'not noted'.
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
    noted_weights: str = NOT_NOTED
    fusion: str = "product"
    epoch: int | None = None
    metric: float | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    preprocessing_noted: tuple[str, ...] = ()

    @property
    def has_head(self) -> bool:
        """Whether anything comes after the last stage."""
        return bool(self.head_hidden_size or self.num_classes)

    @property
    def is_part(self) -> bool:
        """Whether stages are missing, or of the head just the 1x1 convolution before the classifier."""
        return len(self.dims) != 4 or bool(self.num_classes and not self.head_hidden_size)

    def weights(self, use_ema: bool = True) -> str:
        """Returns of which kind the weights are that loading takes: 'average', 'raw', 'soup of N' or 'not noted'."""
        return "average" if self.has_ema and use_ema else self.noted_weights

    def model_args(self) -> dict[str, Any]:
        """Returns the arguments of `Conv2Former` that define the network, with the usual head where it has none."""
        return {
            "dims": self.dims,
            "depths": self.depths,
            "kernel_size": self.kernel_size,
            "mlp_ratio": self.mlp_ratio,
            "ls_init_value": 1e-6 if self.layer_scale else None,
            "head_hidden_size": self.head_hidden_size or HEAD_HIDDEN_SIZE,
            "fusion": self.fusion,
        }

    def __str__(self) -> str:
        best = "" if self.metric is None else f", metric {self.metric:g}"
        without = "no classifier" if self.has_head else "no head"
        classes = f"{self.num_classes} classes" if self.num_classes else without
        lines = [
            f"{super().__str__()}, {classes}, {self.num_parameters:,} parameters",
            f"  layout: {self.layout}, {weights_text(self.weights())}",
            f"  epoch: {'not noted' if self.epoch is None else self.epoch}{best}",
            f"  images: {self.preprocessing}",
            "  recipe: " + (", ".join(f"{key}={value!r}" for key, value in self.recipe.items()) or "not noted"),
        ]
        return "\n".join(map(printable, lines))


def noted_kind(word: str) -> str:
    """Returns the kind of weights, see `CheckpointInfo.weights`, that a converted file calls so."""
    return _KINDS.get(word, word if word.startswith("soup of ") else NOT_NOTED)


def weights_text(kind: str) -> str:
    """Returns what to call weights of a kind, see `CheckpointInfo.weights`, in a sentence: 'raw weights'."""
    texts = {"average": "averaged weights (EMA)", "raw": "raw weights", NOT_NOTED: "weights"}
    return texts.get(kind, f"{kind} files")


def inspect_checkpoint(path: str | Path) -> CheckpointInfo:
    """Tells which variant a weight file is, its metric, its epoch and the recipe in it, running no code from the file.

    Raises:
        CheckpointError: the file cannot be read, holds code, or is not a Conv2Former's.
    """
    return describe_checkpoint(read_checkpoint(path), path)


def describe_checkpoint(content: Mapping[str, Any], path: object) -> CheckpointInfo:
    """As `inspect_checkpoint`, of what `read_checkpoint` returned; `path` is named in errors."""
    try:
        taken = take_network(content)
        state_dict = native_state_dict(content)
    except CheckpointError as e:
        raise e.below(path) from None
    architecture = identify(state_dict)
    if architecture is None:
        raise CheckpointError(f"{path} is not a Conv2Former checkpoint: its keys are {shorten(taken.state_dict, 5)}")
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    num_parameters = sum(t.numel() for k, t in state_dict.items() if not k.endswith(buffers))
    if architecture.num_block_weights() > MOST_MISSING * num_parameters:  # not built to be told what it lacks
        raise CheckpointError(
            f"{path} is damaged or made to harm: its names tell of blocks with "
            f"{architecture.num_block_weights():.1e} weights, and it has {num_parameters:,}"
        )
    hub_config = _hub_config(content)
    count = hub_config.get("num_classes")
    if count and architecture.num_classes and count != architecture.num_classes:
        raise CheckpointError(
            f"{path}: num_classes is {count} in {HUB_CONFIG}, and the weights have {architecture.num_classes} classes; "
            "correct it"
        )
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
    note = note if isinstance(note, dict) else {}
    try:
        preprocessing, noted = noted_preprocessing(recipe, note, name, architecture.in_chans)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from None
    assumed = notes.get("assumed")  # of a converted file: what is in pretrained_cfg although nobody noted it
    return CheckpointInfo(
        **vars(architecture),
        name=name,
        fusion=fusion,
        num_parameters=num_parameters,
        layout=layout_of_keys(taken.state_dict),
        has_ema=taken.is_average,
        noted_weights=_noted_weights(content, own if isinstance(own, dict) else {}, recipe, taken),
        epoch=epoch if isinstance(epoch, int) else None,
        metric=float(metric) if isinstance(metric, (int, float)) else None,
        recipe=recipe,
        class_names=[str(name) for name in names] if isinstance(names, list) else None,
        preprocessing=preprocessing,
        preprocessing_noted=tuple(key for key in noted if key not in (assumed if isinstance(assumed, list) else ())),
    )


def _noted_weights(content: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any], taken: Taken) -> str:
    """Returns what a file says about its weights that are not averaged ones beside others.

    Args:
        content: of the file.
        own: this project's section of the config.json beside it.
        recipe: the training arguments or configuration in it.
        taken: the network in it.
    """
    if word := weights_word(own or content):
        return noted_kind(word)
    # a training script that saves averaged weights beside these, if there are any, as timm's and this project's do
    is_training = "optimizer" in content and taken.place in ("state_dict", "model")
    says = taken.is_average or is_training or any(name in content for name in EMA_NAMES)
    return "raw" if says or recipe.get("model_ema") is False else NOT_NOTED


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
    raise CheckpointError(*lines)


def lacking_head(model: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    """Returns the keys of the model's head if `state_dict`, in this project's layout, has none at all, else nothing."""
    if any(key.startswith(HEAD) for key in state_dict):
        return []
    return [key for key in model.state_dict() if key.startswith(HEAD)]


def adapt_head(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Makes the head in `state_dict` fit the model's, in place, and logs a warning where it is not used.

    Weights without a head, as self-supervised training and feature extractors leave them, leave the model's own as it
    is, and so does a classifier for another number of classes, or none.
    """
    if not (keys := lacking_head(model, state_dict)):
        adapt_classifier(model, state_dict)
        return
    own = model.state_dict()
    classes = f", for {own[CLASSIFIER[0]].shape[0]} classes" if CLASSIFIER[0] in own else ""
    announce(f"the checkpoint has no head: the model keeps its own, untrained{classes}; all other weights are loaded")
    state_dict.update({key: own[key] for key in keys})


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
    announce(f"the checkpoint has {found}: {kept}; all other weights are loaded")
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
            "call timm.create_model with checkpoint_path=FILE, or with pretrained=True and "
            "pretrained_cfg_overlay=dict(file=FILE)"
        )
    load_content(model, read_checkpoint(path), path, use_ema)


def load_content(model: nn.Module, content: Mapping[str, Any], path: object, use_ema: bool = True) -> None:
    """As `load_weights`, into a Conv2Former itself, of what `read_checkpoint` returned; `path` is named in errors."""
    definition = definition_in(content)
    fusion = definition.get("fusion", "product") if definition else model.fusion
    if fusion != model.fusion:  # the tensors would fit
        raise CheckpointError(f"{path} was trained with fusion '{fusion}', the network has '{model.fusion}'")
    say_if_unverified(path)
    try:
        model.load_state_dict(native_state_dict(content, use_ema, path))
    except CheckpointError as e:
        is_named = str(e).startswith(printable(str(path)))
        raise (e if is_named else e.below(path)) from None
