"""From a checkpoint to its network on a backbone's maps, whatever its task and its backbone are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from ...config import BaseConfig, check_config
from ...errors import CheckpointError, ConfigError, UserError, first_line, memory_for
from ...models.restore import check_expected
from ...text import clipped
from ...variants import is_builtin, parse_variant
from ...weights.contents import EMA_NAMES
from ...weights.description import CheckpointInfo, definition_in, describe_checkpoint
from ...weights.others import is_other

__all__ = ["BACKBONE", "Noted", "restore_network", "saved_config"]

BACKBONE = "backbone."
C = TypeVar("C", bound=BaseConfig)
N = TypeVar("N", bound=nn.Module)


def restore_network(
    content: Mapping[str, Any],
    path: object,
    use_ema: bool,
    expect: Any,
    kind: type[C],
    check: Callable[[Mapping[str, Tensor], C, int, object], None],
    build: Callable[[C, int], N],
) -> tuple[N, Noted]:
    """Builds the network of a checkpoint, in evaluation mode.

    Args:
        content: what the file holds.
        path: of it, named in errors.
        use_ema: take the averaged weights where it has them.
        expect: the name of a variant, or its YAML file, that the backbone must be; None for whatever it is.
        kind: the class of the task's configuration.
        check: given weights, configuration, number of classes and path, raises `CheckpointError` where the weights are
            seen not to be of what the configuration notes. A file may be made to harm: what it notes must be no larger
            than the tensors that it has, before a network of that size is built.
        build: makes the network of a configuration and a number of classes.

    Returns:
        The network with all that was trained, and what the file notes of it.

    Raises:
        CheckpointError: the weights are not those of the network that the file notes.
        ConfigError: a package is not installed, or there is no variant of the expected name.
    """
    config = saved_config(content.get("config") or {}, path, kind)
    noted = _read_noted(content, path, use_ema, expect, config.task)
    classes = len(noted.class_names)
    check(noted.weights, config, classes, path)
    config = _network_in(content, config)
    with memory_for(f"the network in {path}", "use a machine with more of it", CheckpointError):
        try:
            model = build(config, classes)
        except UserError as e:
            if isinstance(e, ConfigError) and "pip install" in str(e):
                raise
            raise CheckpointError(f"{path}: its network cannot be built: {e}") from None
        _load_weights(model, noted.weights, path)
    return model.eval(), noted


def saved_config(noted: Mapping[str, Any], path: object, kind: type[C]) -> C:
    """Returns the configuration that a checkpoint notes, of a task's class.

    Raises:
        CheckpointError: it is none that this version knows.
    """
    try:
        config = check_config(noted, path)
    except ConfigError as e:
        raise CheckpointError(f"{path}: its configuration is not one of this version: {e.lines[-1].strip()}") from None
    assert isinstance(config, kind)
    return config


class Noted(NamedTuple):
    """What a checkpoint notes of its network.

    Attributes:
        weights: the state dict, tensors by name.
        class_names: in index order.
        info: of the backbone and the training; its classes are not counted.
    """

    weights: dict[str, Tensor]
    class_names: list[str]
    info: CheckpointInfo

    def of_whole(self, model: nn.Module) -> CheckpointInfo:
        """Returns what the file says about itself: the backbone's shape, the whole network's parameters."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        count, names = len(self.class_names), self.class_names
        return replace(self.info, num_parameters=parameters, num_classes=count, class_names=names)


def _read_noted(content: Mapping[str, Any], path: object, use_ema: bool, expect: Any, what: str) -> Noted:
    """Reads off a checkpoint of a task, `what`, all but its configuration; see `restore_network`.

    Raises:
        CheckpointError: it has no classes or no weights, or another backbone than the expected.
        ConfigError: there is no variant of the expected name.
    """
    names = content.get("class_names")
    if not isinstance(names, list) or not names:
        raise CheckpointError(f"{path} does not name its classes; it is no whole checkpoint of a {what}")
    average = content.get("model_ema")
    state = average if use_ema and average else content.get("model")
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items()
    ):
        raise CheckpointError(f"{path} holds no weights of a {what}")
    inner = {key.removeprefix(BACKBONE): tensor for key, tensor in state.items() if key.startswith(BACKBONE)}
    states = {key: inner for key in ("model", *EMA_NAMES) if content.get(key)}
    info = replace(describe_checkpoint({**content, **states, "class_names": None}, path), has_ema=bool(average))
    if expect is not None:
        check_expected(info, str(path), expect)
    return Noted(dict(state), [*map(str, names)], info)


def _network_in(content: Mapping[str, Any], config: C) -> C:
    """Returns the configuration with the backbone as the file defines it, without starting weights."""
    definition = definition_in(content)
    changes: dict[str, Any] = {"checkpoint": None, "pretrained": False, "freeze": "nothing"}
    name = definition.get("name")
    if isinstance(name, str) and not is_other(name):
        own = None if is_builtin(name) else parse_variant(definition, "its variant").to_dict()
        changes |= {"name": name, "variant": own}
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: object) -> None:
    """Loads a state dict.

    Raises:
        CheckpointError: it is not that of the network.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        lines = [line.strip() for line in str(e).split("\n")[1:] if line.strip()] or [first_line(e)]
        raise CheckpointError(f"{path} does not hold the network that it notes: {clipped(lines[0], 300)}") from None
