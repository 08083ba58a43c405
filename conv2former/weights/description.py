"""What a weight file is: which network it holds, and what its training noted."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, shorten
from ..text import printable
from ..variants import FUSION_NAMES, STEM_STRIDES, differences, is_builtin
from .architecture import Architecture, identify
from .contents import EMA_NAMES, Taken, native_state_dict, plain_state_dict, take_network
from .hub_config import HUB_CONFIG, SECTION
from .installed import weights_word
from .layouts import layout_of_keys, network_prefixes
from .others import OtherNetwork, channels_in, classes_in, is_other, noted_network
from .preprocessing import Preprocessing, noted_preprocessing
from .reading import read_checkpoint

__all__ = [
    "CheckpointInfo",
    "OtherInfo",
    "check_is_classifier",
    "definition_in",
    "describe_checkpoint",
    "inspect_checkpoint",
    "noted_kind",
    "state_dict_of",
    "task_noted",
    "untold_args",
    "weights_text",
]

HEAD_HIDDEN_SIZE = 1280  # of every published network; assumed where a file has no head
MOST_MISSING = 10  # times as many weights as a file has, in the network that its names tell of
NOT_NOTED = "not noted"
CLASSIFICATION = "classification"  # the task of files that note none
# the arguments of a network that its tensors do not tell, as most networks have them
UNTOLD_ARGS = {"fusion": "product", "stem_stride": 4}
_KINDS = {"averaged": "average", "average": "average", "raw": "raw"}  # in converted files, and their canonical names


@dataclass(frozen=True)
class CheckpointInfo(Architecture):
    """What a weight file is: the network, from its tensors, and what the training script noted.

    Attributes:
        name: name of the variant; None if its shape is none of the known ones and the file does not say.
        num_parameters: of the network in the file.
        layout: whose names the tensors have: 'conv2former', 'authors' or 'birder'; 'timm' of files of its own scripts.
        has_ema: whether averaged weights are in the file beside raw ones; they are what loading takes.
        noted_weights: what the file says about the others: 'raw', 'average', 'soup of N' or 'not noted'.
        fusion, stem_stride: as in the variants' YAML files; the tensors do not tell them, so they are 'product' and 4
            where the file does not.
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
    stem_stride: int = 4
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
            "stem_stride": self.stem_stride,
            "fusion": self.fusion,
            "norm_layer": self.norm_layer,
        }

    def definition(self) -> dict[str, Any]:
        """Returns the network as a file notes it, in plain types; `definition_in` reads it."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in self.model_args().items()}
        return {**({"name": self.name} if self.name else {}), **plain}

    def differences(self, other: CheckpointInfo) -> list[str]:
        """Returns how the network differs from that of another file, each as `key here for there`."""
        if isinstance(other, OtherInfo):
            return [f"{self.name or 'a Conv2Former'} for {other.name}"]
        return differences(self.model_args(), other.model_args())

    def __str__(self) -> str:
        best = "" if self.metric is None else f", metric {self.metric:g}"
        without = "no classifier" if self.has_head else "no head"
        classes = f"{self.num_classes} classes" if self.num_classes else without
        lines = [
            f"{self._network()}, {classes}, {self.num_parameters:,} parameters",
            f"  layout: {self.layout}, {weights_text(self.weights())}",
            f"  epoch: {'not noted' if self.epoch is None else self.epoch}{best}",
            f"  images: {self.preprocessing}",
            "  recipe: " + (", ".join(f"{key}={value!r}" for key, value in self.recipe.items()) or "not noted"),
        ]
        return "\n".join(map(printable, lines))

    def _network(self) -> str:
        return Architecture.__str__(self)


@dataclass(frozen=True)
class OtherInfo(CheckpointInfo):
    """As `CheckpointInfo`, of a network of timm's registry; what defines a Conv2Former is empty or 0.

    Attributes:
        network: as the file notes it, or as it was asked for.
    """

    network: OtherNetwork = field(default_factory=lambda: OtherNetwork(""))

    @property
    def has_head(self) -> bool:
        """Whether there is a classifier: what else comes after the last stage is the network's own."""
        return bool(self.num_classes)

    @property
    def is_part(self) -> bool:
        """Whether parts are missing: who loads it finds that."""
        return False

    def definition(self) -> dict[str, Any]:
        """Returns the network as a file notes it, in plain types; `definition_in` reads it."""
        return self.network.to_dict()

    def differences(self, other: CheckpointInfo) -> list[str]:
        """Returns how the network differs from that of another file, each as `here for there`."""
        name = other.network if isinstance(other, OtherInfo) else other.name or "a Conv2Former"
        return [] if str(self.network) == str(name) else [f"{self.network} for {name}"]

    def _network(self) -> str:
        return str(self.network)


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


def state_dict_of(content: Mapping[str, Any], use_ema: bool = True, path: object = None) -> dict[str, Any]:
    """Returns the tensors of whichever network a file notes; see `native_state_dict`.

    Of another task than classification they are all tensors, named as they are.
    """
    if task_noted(content) != CLASSIFICATION:
        average = content.get("model_ema") if use_ema else None
        found = average or content.get("model")
        if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
            raise CheckpointError("it holds no state dict of tensors")
        return dict(found)
    other = _other_in(content, take_network(content, use_ema).state_dict)
    return (plain_state_dict if other else native_state_dict)(content, use_ema, path)


def describe_checkpoint(
    content: Mapping[str, Any], path: object, network: OtherNetwork | None = None
) -> CheckpointInfo:
    """As `inspect_checkpoint`, of what `read_checkpoint` returned.

    Args:
        content: of the file.
        path: named in errors.
        network: what a file is that notes no network and is no Conv2Former.
    """
    try:
        taken = take_network(content)
        is_own = bool(network_prefixes(key for key in taken.state_dict if isinstance(key, str)))
        other = _other_in(content, taken.state_dict) or (None if is_own else network)
        state_dict = (plain_state_dict if other else native_state_dict)(content)
    except CheckpointError as e:
        raise e.below(path) from None
    return (
        _describe_other(content, path, taken, state_dict, other)
        if other
        else _describe(content, path, taken, state_dict)
    )


def _other_in(content: Mapping[str, Any], tensors: Mapping[Any, Any]) -> OtherNetwork | None:
    """Returns the network of timm's registry that a file notes; None of a Conv2Former."""
    return noted_network(definition_in(content), _hub_config(content), content, len(tensors))


def _describe(content: Mapping[str, Any], path: object, taken: Taken, state_dict: Mapping[str, Any]) -> CheckpointInfo:
    """Describes a Conv2Former's file."""
    architecture = identify(state_dict)
    if architecture is None:
        raise CheckpointError(
            f"{path} is not a Conv2Former checkpoint: its keys are {shorten(taken.state_dict, 5)}; if it is of another "
            "network of timm, say which (model.name or --model timm/NAME)"
        )
    num_parameters = _count(state_dict)
    if architecture.num_block_weights() > MOST_MISSING * num_parameters:  # not built to be told what it lacks
        raise CheckpointError(
            f"{path} is damaged or made to harm: its names tell of blocks with "
            f"{architecture.num_block_weights():.1e} weights, and it has {num_parameters:,}"
        )
    definition = definition_in(content)
    untold = untold_args(definition, path)
    known, noted = architecture.variant if untold == UNTOLD_ARGS else None, definition.get("name")
    noted = noted if isinstance(noted, str) else None
    name = known if known and (is_builtin(known) or not noted) else noted  # several of the user's may have one shape
    return CheckpointInfo(
        **vars(architecture),
        name=name,
        **untold,
        num_parameters=num_parameters,
        layout=layout_of_keys(taken.state_dict),
        **_notes(content, path, taken, name, architecture.in_chans, architecture.num_classes),
    )


def _describe_other(
    content: Mapping[str, Any], path: object, taken: Taken, state_dict: Mapping[str, Any], network: OtherNetwork
) -> OtherInfo:
    """Describes the file of a network of timm's registry."""
    network = replace(network, in_chans=channels_in(network, state_dict))
    num_classes = classes_in(network, state_dict)
    return OtherInfo(
        dims=(),
        depths=(),
        kernel_size=0,
        mlp_ratio=0.0,
        head_hidden_size=0,
        layer_scale=False,
        norm_layer="",
        in_chans=network.in_chans,
        num_classes=num_classes,
        name=network.name,
        num_parameters=_count(state_dict),
        layout="conv2former" if is_other(definition_in(content).get("name")) else "timm",
        network=network,
        **_notes(content, path, taken, None, network.in_chans, num_classes),
    )


def _count(state_dict: Mapping[str, Any]) -> int:
    """Returns how many parameters there are, without what BatchNorm counts."""
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return sum(tensor.numel() for key, tensor in state_dict.items() if not key.endswith(buffers))


def _notes(
    content: Mapping[str, Any], path: object, taken: Taken, variant: str | None, in_chans: int, num_classes: int
) -> dict[str, Any]:
    """Returns what a file notes about its training, classes and images, as fields of `CheckpointInfo`.

    Args:
        content: of the file.
        path: named in errors.
        taken: the network in it.
        variant: its name, if it is a Conv2Former.
        in_chans, num_classes: of its tensors.
    """
    hub_config = _hub_config(content)
    count = hub_config.get("num_classes")
    if count and num_classes and count != num_classes:
        raise CheckpointError(
            f"{path}: num_classes is {count} in {HUB_CONFIG}, and the weights have {num_classes} classes; correct it"
        )
    own = hub_config.get(SECTION)
    notes = own if isinstance(own, dict) else content
    recipe = notes.get("args") or notes.get("config") or notes.get("recipe") or {}
    recipe = dict(vars(recipe)) if isinstance(recipe, argparse.Namespace) else recipe
    recipe = recipe if isinstance(recipe, dict) else {}
    epoch, metric = notes.get("epoch"), notes.get("metric")
    names = content.get("class_names") or _hub_class_names(hub_config) or _birder_class_names(content)
    note = content.get("preprocessing") or hub_config.get("pretrained_cfg", hub_config) or _birder_images(content)
    note = note if isinstance(note, dict) else {}
    try:
        preprocessing, noted = noted_preprocessing(recipe, note, variant, in_chans)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from None
    assumed = notes.get("assumed")  # of a converted file: what is in pretrained_cfg although nobody noted it
    return {
        "has_ema": taken.is_average,
        "noted_weights": _noted_weights(content, own if isinstance(own, dict) else {}, recipe, taken),
        "epoch": epoch if isinstance(epoch, int) else None,
        "metric": float(metric) if isinstance(metric, (int, float)) else None,
        "recipe": recipe,
        "class_names": [str(name) for name in names] if isinstance(names, list) else None,
        "preprocessing": preprocessing,
        "preprocessing_noted": tuple(key for key in noted if key not in (assumed if isinstance(assumed, list) else ())),
    }


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


def task_noted(content: Mapping[str, Any]) -> str:
    """Returns for which task a network was trained, as this project's files note it; of all others classification."""
    config = content.get("config")
    noted = config.get("task") if isinstance(config, Mapping) and isinstance(content.get("variant"), Mapping) else None
    return noted if isinstance(noted, str) else CLASSIFICATION


def check_is_classifier(content: Mapping[str, Any], path: object) -> None:
    """Raises a CheckpointError if a file's network was trained for something else than classification."""
    task = task_noted(content)
    if task != CLASSIFICATION:
        raise CheckpointError(
            f"{path} is of the task {task[:50]!r}, and a classifier is needed here; validate, predict, average and "
            "export without --int8 take it, and in Python conv2former.load_model"
        )


def definition_in(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint says about the network beyond its tensors, such as `name`, `fusion`, or nothing."""
    hub_config = _hub_config(content)
    own = hub_config.get(SECTION)
    places = (
        content.get("variant"),
        own.get("variant") if isinstance(own, dict) else None,
        hub_config.get("model_args"),
    )
    return next((definition for definition in places if isinstance(definition, dict)), {})


def untold_args(definition: Mapping[str, Any], path: object) -> dict[str, Any]:
    """Returns the arguments of a network that its tensors do not tell, as its definition has them, or the usual ones.

    Raises:
        CheckpointError: there is no such value; `path` is named.
    """
    args = {key: definition.get(key, usual) for key, usual in UNTOLD_ARGS.items()}
    if args["fusion"] not in FUSION_NAMES:
        raise CheckpointError(f"{path} has the fusion {args['fusion']!r}; known: {', '.join(FUSION_NAMES)}")
    if args["stem_stride"] not in STEM_STRIDES:
        raise CheckpointError(f"{path} has the stem_stride {args['stem_stride']!r}; known: 2, 4")
    return args


def _hub_config(content: Mapping[str, Any]) -> dict[str, Any]:
    config = content.get("hub_config")
    return config if isinstance(config, dict) else {}


def _hub_class_names(hub_config: Mapping[str, Any]) -> Any:
    inner = hub_config.get("pretrained_cfg")
    found = [config.get("label_names") for config in (hub_config, inner) if isinstance(config, dict)]
    return next((names for names in found if names), None)
