"""Which networks a benchmark measures: their names, making them, their size and arithmetic."""

from __future__ import annotations

import copy
import difflib
import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
import yaml
from timm.layers import set_fused_attn, use_fused_attn
from timm.models import split_model_name_tag
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import conv2former  # noqa: F401 - registers the variants with timm

from ...errors import ConfigError, bullets, first_line

__all__ = ["Network", "count_macs", "parse_networks", "with_tensors"]

CLASSES = 1000


@dataclass(frozen=True)
class Network:
    """A network to measure.

    Attributes:
        label: as the user wrote it, `name` or `name:option=value,...`.
        name: in timm's registry, or in birder's.
        library: `timm` or `birder`.
        options: pairs of the model's arguments.
        fused_attention: whether timm's attention layers may call the fused operator; None leaves it to timm.
    """

    label: str
    name: str
    library: str = "timm"
    options: tuple[tuple[str, Any], ...] = ()
    fused_attention: bool | None = None

    def create(self, height: int, width: int) -> nn.Module:
        """Makes the network with random weights and 1,000 classes, for images of `height` x `width` pixels.

        A timm network that is made for one size, such as a Swin or a ViT, is made for this one.

        Raises:
            ConfigError: the network does not take its options, or not with their values.
        """
        options = dict(self.options)
        if self.library == "birder":
            registry = importlib.import_module("birder.model_registry").registry
            options = {"config": options} if options else {}
            return self._make(registry.net_factory, num_classes=CLASSES, size=(height, width), **options)
        size = (height, width)
        config = timm.get_pretrained_cfg(self.name)
        if config is not None and config.fixed_input_size and config.input_size[1:] != size:
            options.setdefault("img_size", size)
        with _fused_attention(self.fused_attention):
            return self._make(timm.create_model, num_classes=CLASSES, **options)

    def _make(self, factory: Any, **arguments: Any) -> nn.Module:
        try:
            return factory(self.name, **arguments)
        except (TypeError, ValueError, KeyError) as e:
            if not self.options:
                raise
            raise ConfigError(f"{self.label}: the network cannot be made with these options: {first_line(e)}") from None


def parse_networks(labels: Sequence[str]) -> list[Network]:
    """Reads what the user named: `NAME` of timm's, `birder/NAME`, each with `:option=value,...` or without.

    Values are read as YAML. `fused_attn=false` is this tool's own option for timm networks: attention without the
    fused operator, which then keeps its quadratic maps.

    Raises:
        ConfigError: names that nobody knows, all in one message with the closest known ones; options that cannot be
            read; the same network twice; birder is not installed.
    """
    networks = [_parse(label) for label in labels]
    mistakes = [mistake for network in networks if (mistake := _unknown(network))]
    mistakes += [f"{label} is named twice" for label in dict.fromkeys(labels) if labels.count(label) > 1]
    if mistakes:
        raise ConfigError("these networks cannot be measured:", *bullets(mistakes))
    return networks


def count_macs(model: nn.Module, height: int, width: int) -> int:
    """Counts the multiply-accumulates of one image's forward pass: convolutions and matrix products, wherever they are.

    The count is made on the meta device, which computes nothing, and without gradients, so that what a backward pass
    recomputes is not counted twice.

    Args:
        model: any network of (N, 3, H, W) images; it is not changed.
        height, width: of the image, pixels.
    """
    bare = with_tensors(model, lambda tensor: torch.empty_like(tensor, device="meta")).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bare(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops() // 2


def with_tensors(model: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Returns a copy of a network with other parameters and buffers, each what `make` returns for the network's own."""
    tensors = [*model.parameters(), *model.buffers()]
    # deepcopy takes these for copies that it has made already, so no weight is copied
    copies = {
        id(t): nn.Parameter(make(t), t.requires_grad) if isinstance(t, nn.Parameter) else make(t) for t in tensors
    }
    return copy.deepcopy(model, copies)


def _parse(label: str) -> Network:
    head, colon, tail = label.partition(":")
    options: dict[str, Any] = {}
    for item in re.split(r",(?![^\[]*\])", tail) if colon else []:  # commas, but not those inside [...]
        key, equals, text = item.partition("=")
        if not key.isidentifier() or not equals:
            raise ConfigError(f"{label}: expected NAME:option=value,option=value, but found {item!r}")
        try:
            options[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{label}: the value of {key} cannot be read: {text!r}") from None
    library, slash, name = head.partition("/")
    if slash and library == "birder":
        return Network(label, name, "birder", _frozen(options))
    fused = options.pop("fused_attn", None)
    if fused not in (True, False, None):
        raise ConfigError(f"{label}: fused_attn must be true or false: {fused!r}")
    return Network(label, head, "timm", _frozen(options), fused)


def _frozen(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in options.items())


def _unknown(network: Network) -> str | None:
    """Returns what is wrong with a network's name, or None."""
    name, known = split_model_name_tag(network.name)[0], _known(network.library)
    if name in known:
        return None
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    prefix = "birder/" if network.library == "birder" else ""
    hint = f"; the closest are {', '.join(prefix + match for match in near)}" if near else ""
    return f"{prefix}{network.name}: {network.library} has no such network{hint}"


def _known(library: str) -> Iterable[str]:
    if library == "timm":
        return timm.list_models()
    try:
        return importlib.import_module("birder.model_registry").registry.list_models()
    except ImportError:
        raise ConfigError("birder/...: birder is not installed; install it with: pip install birder") from None


@contextmanager
def _fused_attention(enabled: bool | None) -> Iterator[None]:
    """Makes timm build attention with or without the fused operator inside; it reads the switch when it builds."""
    before = use_fused_attn()
    if enabled is not None:
        set_fused_attn(enabled)
    try:
        yield
    finally:
        set_fused_attn(before)
