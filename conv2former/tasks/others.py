"""Training networks of timm's registry besides Conv2Former: `model.name: timm/NAME`. network.py alone calls this."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from .. import _private
from .._preprocessing import Preprocessing
from ..config import BaseConfig
from ..errors import CheckpointError, ConfigError, UserError, first_line
from ..models import CheckpointInfo
from ..models.others import build_other, check_size, classifiers, load_other
from ..weights.contents import announce, plain_state_dict
from ..weights.description import OtherInfo, describe_checkpoint
from ..weights.others import OtherNetwork, other_network
from ..weights.preprocessing import noted_preprocessing

__all__ = ["Compiled", "Start", "args_of", "build", "find_other", "freeze", "start_of"]

STAGES = ("stage1", "stage2", "stage3", "stage4")


@dataclass(frozen=True)
class Start:
    """The images that a network or its starting weights are for.

    Attributes:
        in_chans: channels of its input.
        preprocessing: of the images.
        preprocessing_noted: the names of the fields that are noted.
        name: what to call the weights.
        origin: where it is noted, as a part of a line.
        notes_channels: whether the channels are noted there, too, and not the usual three.
    """

    in_chans: int
    preprocessing: Preprocessing
    preprocessing_noted: tuple[str, ...]
    name: str
    origin: str
    notes_channels: bool = True


def find_other(config: BaseConfig) -> OtherNetwork:
    """Returns the configured network, with the size of the images where it takes one and that is known.

    Raises:
        ConfigError: timm has no such network, or an argument is not its constructor's.
    """
    network = other_network(config.model.name, config.model.args, config.model.in_chans or 3)
    return network if config.data.img_size is None else network.sized(config.data.preprocessing.size)


def args_of(network: OtherNetwork) -> dict[str, Any]:
    """Returns the arguments of a network as a configuration has them: the size of the images is data.img_size."""
    return {key: value for key, value in network.args.items() if key != "img_size" or not network.has_fixed_size}


def start_of(config: BaseConfig) -> Start | None:
    """Returns the images that timm's weights of a network are for, or that its arguments say; None where nothing does.

    Raises:
        CheckpointError: timm notes what this project cannot use.
    """
    network, pretrained = find_other(config), config.model.pretrained
    given = {key: value for key, value in config.model.args.items() if key == "img_size"}
    if not pretrained and not given:
        return None
    try:
        preprocessing, noted = noted_preprocessing({}, {**(network.cfg if pretrained else {}), **given}, None)
    except CheckpointError as e:
        raise e.below(network.name) from None
    origin = "of timm's weights" if pretrained else "from model.args"
    return Start(3, preprocessing, tuple(noted), f"timm's weights of {network.name}", origin, pretrained)


def build(
    config: BaseConfig, network: OtherNetwork, num_classes: int, content: dict[str, Any] | None, **more: Any
) -> tuple[nn.Module, CheckpointInfo | None, list[dict[str, Any]]]:
    """Builds a network on the CPU, with its starting weights, and tries it.

    Args:
        config: the run.
        network: which one.
        num_classes: of the data.
        content: of the file with the starting weights; None for none, or timm's own.
        **more: further arguments of the constructor.

    Returns:
        The network, what its file says about itself, and its fresh classifiers.

    Raises:
        ConfigError: it cannot be built or used so.
        CheckpointError: the weights cannot be had, or are of another network.
    """
    model_config, path = config.model, config.model.checkpoint
    options: dict[str, Any] = {"drop_rate": model_config.drop_rate, **more} if model_config.drop_rate else dict(more)
    if model_config.drop_path_rate is not None:
        options["drop_path_rate"] = model_config.drop_path_rate
    model: Any = build_other(network, num_classes, model_config.pretrained, **options)
    if not (model_config.pretrained and network.cfg.get("num_classes") == num_classes):  # which timm then has loaded
        for parameter in (p for classifier in classifiers(model) for p in classifier.parameters()):
            parameter.data.mul_(model_config.head_init_scale)
    fresh = [copy.deepcopy(classifier.state_dict()) for classifier in classifiers(model)]
    info = None
    if content is not None:
        info = _info_of(content, str(path), network)
        model = load_other(info, plain_state_dict(content, path=path), path, network, **options)
        if info.num_classes != num_classes:
            found = f"a classifier for {info.num_classes} classes" if info.num_classes else "no classifier"
            announce(
                f"the checkpoint has {found}: the model keeps its own for {num_classes} classes; all other weights are "
                "loaded"
            )
            model.reset_classifier(num_classes)
            for classifier, state_dict in zip(classifiers(model), fresh, strict=True):
                classifier.load_state_dict(state_dict)
    if model_config.grad_checkpointing:
        _checkpoint_gradients(model, network)
    _frozen(model, network.name, model_config.freeze)
    check_size(model, network.name, config.data.preprocessing.size, network.in_chans, "data.img_size")
    return model, info, fresh


def _info_of(content: dict[str, Any], path: str, network: OtherNetwork) -> OtherInfo:
    """Describes a file with weights for a network.

    Raises:
        CheckpointError: they are for another.
    """
    info = describe_checkpoint(content, path, network)
    if not isinstance(info, OtherInfo):
        raise CheckpointError(f"{path} holds a Conv2Former, not {network.name}; give model.name=auto to train that")
    if info.network.entry.partition(".")[0] != network.entry.partition(".")[0]:
        raise CheckpointError(f"{path} holds {info.network}, not {network.name}; give model.name=auto to train that")
    return info


def _checkpoint_gradients(model: Any, network: OtherNetwork) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError, TypeError):
        raise ConfigError(
            f"model.grad_checkpointing: {network.name} cannot recompute its blocks; leave it out"
        ) from None


# ------------------------------------------------------------------------------------------------------------- freezing


def freeze(model: nn.Module, until: str) -> None:
    """See `network.freeze`."""
    modules, parameters = _frozen(model, "this network", until)
    for parameter in parameters:
        parameter.requires_grad_(False)
    for module in modules:
        module.eval()


def _frozen(model: nn.Module, name: str, until: str) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """Returns the modules and parameters of what is frozen.

    Raises:
        ConfigError: the network does not say where its stages are, or has no classifier of its own.
    """
    if until == "nothing":
        return [], []
    if until == "backbone":
        return _all_but(model, name)
    ends = _stage_ends(model)
    if not ends:
        raise ConfigError(
            f"model.freeze: {name} has no four stages, each of maps of half the size, that end one after the other; "
            "give nothing or backbone"
        )
    modules = _before(model, ends[0], False) if until == "stem" else _before(model, ends[STAGES.index(until)], True)
    own = list(model.parameters(recurse=False))  # such as position embeddings, which belong to the input
    return modules, [*own, *(parameter for module in modules for parameter in module.parameters())]


def _all_but(model: nn.Module, name: str) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """Returns all but the classifier; of modules also without what holds it, and without the dropout beside it."""
    last = classifiers(model)
    trained = {id(parameter) for classifier in last for parameter in classifier.parameters()}
    if not trained:
        raise ConfigError(f"model.freeze: {name} has no classifier of its own, so nothing would be trained")
    holders = [module for module in model.modules() if any(part in last for part in module.modules())]
    kept = {id(module) for classifier in last for module in classifier.modules()} | {id(module) for module in holders}
    modules = [
        child
        for holder in holders
        if holder not in last
        for child in holder.children()
        if id(child) not in kept and not isinstance(child, nn.Dropout)
    ]
    return modules, [parameter for parameter in model.parameters() if id(parameter) not in trained]


def _stage_ends(model: nn.Module) -> list[str]:
    """Returns the names of the modules with which four stages end, by timm's `feature_info`; none if that is not sound.

    It is where each of the last four feature maps is smaller than the one before, and where the modules stand in the
    network in that order.
    """
    info = getattr(model, "feature_info", None)
    features = list(info)[-4:] if isinstance(info, (list, tuple)) else []
    if len(features) < 4 or not all(isinstance(f, dict) and {"module", "reduction"} <= f.keys() for f in features):
        return []
    names = [str(feature["module"]) for feature in features]
    reductions = [feature["reduction"] for feature in features]
    order = [name for name, _ in model.named_modules()]
    if any(b <= a for a, b in pairwise(reductions)) or not {*names} <= {*order}:
        return []
    places = [order.index(name) for name in names]
    return names if places == sorted(places) else []


def _before(module: nn.Module, name: str, inclusive: bool) -> list[nn.Module]:
    """Returns the modules that stand before the one of a dotted name inside `module`, and it itself if `inclusive`."""
    first, _, rest = name.partition(".")
    found = []
    for own, child in module.named_children():
        if own == first:
            found += _before(child, rest, inclusive) if rest else [child] if inclusive else []
            return found
        found.append(child)
    return found


# ------------------------------------------------------------------------------------------------------------ compiling


class Compiled(nn.Module):
    """A network that torch.compile computes as a whole, to train through; what is saved and evaluated is the network.

    Args:
        model: the network.
        backend: torch.compile's.

    Raises:
        UserError: there is no torch.compile here; when it is called, it cannot compile the network.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        super().__init__()
        try:
            self.program = torch.compile(model, backend=backend, dynamic=False)
        except RuntimeError as e:
            raise _not_compiled(e) from e

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images, (N, in_chans, H, W), to logits, (N, num_classes)."""
        try:
            return self.program(x)
        except _private.compiler_errors() as e:
            raise _not_compiled(e) from e


def _not_compiled(error: BaseException) -> UserError:
    reason = first_line(getattr(error, "inner_exception", error))
    return UserError(f"torch.compile cannot compile the network here ({reason}): set train.compile: false")
