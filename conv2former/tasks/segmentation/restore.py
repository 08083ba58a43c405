"""From a segmentation's checkpoint to its network, whatever the checkpoint's backbone is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...config import check_config
from ...errors import CheckpointError, ConfigError, UserError, first_line, memory_for
from ...models.restore import check_expected
from ...text import clipped
from ...variants import is_builtin, parse_variant
from ...weights.contents import EMA_NAMES
from ...weights.description import CheckpointInfo, definition_in, describe_checkpoint
from ...weights.others import is_other
from .config import SegmentationConfig
from .network import SegmentationNetwork, build_network

__all__ = ["restore_network", "saved_config"]

BACKBONE, HEAD, AUXILIARY = "backbone.", "head.", "auxiliary."
CLASSIFIER = "head.classifier.weight"


def saved_config(noted: Mapping[str, Any], path: object) -> SegmentationConfig:
    """Returns the configuration that a checkpoint notes.

    Raises:
        CheckpointError: it is none that this version knows.
    """
    try:
        config = check_config(noted, path)
    except ConfigError as e:
        raise CheckpointError(f"{path}: its configuration is not one of this version: {e.lines[-1].strip()}") from None
    assert isinstance(config, SegmentationConfig)
    return config


def restore_network(
    content: Mapping[str, Any], path: object, use_ema: bool = True, expect: Any = None
) -> tuple[SegmentationNetwork, CheckpointInfo]:
    """Builds the network of a segmentation's checkpoint, in evaluation mode; the auxiliary head is left out.

    Args:
        content: what the file holds.
        path: of it, named in errors.
        use_ema: take the averaged weights where it has them.
        expect: the name of a variant, or its YAML file, that the backbone must be; None for whatever it is.

    Returns:
        The network, and what the file says about itself: the backbone's shape, the whole network's parameters.

    Raises:
        CheckpointError: the weights are not those of the network that the file notes.
        ConfigError: segmentation-models-pytorch is not installed, or there is no variant of the expected name.
    """
    config = saved_config(content.get("config") or {}, path)
    names = content.get("class_names")
    if not isinstance(names, list) or not names:
        raise CheckpointError(f"{path} does not name its classes; it is no whole checkpoint of a segmentation")
    average = content.get("model_ema")
    state = average if use_ema and average else content.get("model")
    weights = _checked(state, config, len(names), path)
    info = _described(content, path, weights, bool(average))
    if expect is not None:
        check_expected(info, str(path), expect)
    config = config.model_copy(update={"model": _network_of(content, config)})
    with memory_for(f"the network in {path}", "use a machine with more of it", CheckpointError):
        try:
            model = build_network(config, len(names))
        except UserError as e:
            if isinstance(e, ConfigError) and "pip install" in str(e):
                raise
            raise CheckpointError(f"{path}: its network cannot be built: {e}") from None
        try:
            model.load_state_dict(weights)
        except RuntimeError as e:
            lines = [line.strip() for line in str(e).split("\n")[1:] if line.strip()] or [first_line(e)]
            raise CheckpointError(f"{path} does not hold the network that it notes: {clipped(lines[0], 300)}") from None
    model.auxiliary = None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return model.eval(), replace(
        info, num_parameters=parameters, num_classes=len(names), class_names=[*map(str, names)]
    )


def _checked(state: Any, config: SegmentationConfig, classes: int, path: object) -> dict[str, Tensor]:
    """Returns a state dict as far as can be seen before a network of its size is built.

    A file may be made to harm: what it notes of its head must be no larger than the tensors that it has of it.

    Raises:
        CheckpointError: it is none of a segmentation with so many classes.
    """
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items()
    ):
        raise CheckpointError(f"{path} holds no weights of a segmentation")
    last, channels = state.get(CLASSIFIER), config.model.head.channels
    found = tuple(last.shape) if last is not None else None
    if found != (classes, channels, 1, 1):
        what = "is missing" if found is None else f"has the shape {found}"
        raise CheckpointError(
            f"{path} names {classes} classes and a head of {channels} channels, and its {CLASSIFIER} {what}"
        )
    if sum(tensor.numel() for key, tensor in state.items() if key.startswith(HEAD)) < channels**2:
        raise CheckpointError(f"{path} notes a head of {channels} channels, and does not have its weights")
    return dict(state)


def _described(
    content: Mapping[str, Any], path: object, weights: Mapping[str, Tensor], has_average: bool
) -> CheckpointInfo:
    """Returns what a file says about its backbone, and about its training."""
    inner = {key.removeprefix(BACKBONE): tensor for key, tensor in weights.items() if key.startswith(BACKBONE)}
    states = {key: inner for key in ("model", *EMA_NAMES) if content.get(key)}
    info = describe_checkpoint({**content, **states, "class_names": None}, path)
    return replace(info, has_ema=has_average)


def _network_of(content: Mapping[str, Any], config: SegmentationConfig) -> Any:
    """Returns the section `model` with the backbone as the file defines it, without starting weights."""
    definition = definition_in(content)
    changes: dict[str, Any] = {"checkpoint": None, "pretrained": False, "freeze": "nothing"}
    name = definition.get("name")
    if isinstance(name, str) and not is_other(name):
        own = None if is_builtin(name) else parse_variant(definition, "its variant").to_dict()
        changes |= {"name": name, "variant": own}
    return config.model.model_copy(update=changes)
