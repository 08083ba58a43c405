"""Which network is meant among what a weight file holds, and its state dict in this project's layout.

Training scripts save a state dict alone or under a name of theirs, with or without averaged weights beside it, and the
names in it begin with whatever module the network was a part of: `model.` in Lightning, `module.`, `backbone.`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..errors import CheckpointError, shorten
from ..text import printable
from .layouts import network_prefixes, rename_keys_in_place, without_compile

__all__ = ["Taken", "announce", "native_state_dict", "plain_state_dict", "take_network"]

_logger = logging.getLogger(__name__)

EMA_NAMES = ("state_dict_ema", "model_ema")  # of averaged weights in a checkpoint, as timm has them
_AVERAGE = re.compile(r"(?:^|[._])ema(?:[._]|$)")
# Names of the network that is meant where others are beside it, such as a teacher; the first ones before the later.
_USUAL = (
    "state_dict", "model", "state", "model_state_dict", "model_state", "module", "net", "network", "weights", "params",
    "backbone", "encoder",
)  # fmt: skip
_MAX_DEPTH = 2  # of dicts in dicts: {"checkpoint": {"model": ...}}


@dataclass(frozen=True)
class Taken:
    """The network of a file that is taken.

    Attributes:
        state_dict: its tensors, named as in the file but for what stands before all of the names.
        place: the name of the state dict in the file; '' where the file is the state dict itself.
        prefix: what stood before the names, such as 'model.'.
        is_average: whether these are averaged weights beside raw ones.
        is_compiled: whether torch.compile's prefix stood in the names.
        left_out: keys of the same state dict that belong to something else.
        others: other networks in the file that are not taken, as the file names them.
    """

    state_dict: Mapping[str, Any]
    place: str = ""
    prefix: str = ""
    is_average: bool = False
    is_compiled: bool = False
    left_out: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def note(self) -> str:
        """Returns what is not to be taken for granted about the choice; empty where there is nothing."""
        notes = []
        if self.others or (self.place and not set(self.place.split(".")) <= {*_USUAL, *EMA_NAMES}):
            what = f"'{self.place or self.prefix}' is taken"
            notes.append(f"{what}, not {shorten(self.others, 5)}" if self.others else what)
        prefixes = [f"'{text}'" for text in (self.prefix, "_orig_mod." if self.is_compiled else "") if text]
        if prefixes:
            notes.append(f"the names have {' and '.join(prefixes)} before them, which is taken off")
        if self.left_out:
            notes.append(f"left out: {shorten(self.left_out, 3)}")
        return "; ".join(notes)


@dataclass(frozen=True, eq=False)
class _Network:
    """A network in a file: in which dict, under which name, and what its keys begin with."""

    holder: Mapping[str, Any]
    place: str
    prefix: str

    @property
    def words(self) -> list[str]:
        return [word for word in f"{self.place}.{self.prefix}".split(".") if word]

    @property
    def is_average(self) -> bool:
        return bool(_AVERAGE.search(f"{self.place}.{self.prefix}"))

    @property
    def rank(self) -> int:
        """The place among `_USUAL`; behind all of them with a name that is none of those."""
        return max((_USUAL.index(word) if word in _USUAL else len(_USUAL) for word in self.words), default=-1)


def announce(text: str, once: bool = False) -> None:
    """Logs a warning on the main process alone: every one reads the same file.

    Args:
        text: of the warning.
        once: not again in this process.
    """
    if os.environ.get("RANK", "0") == "0":
        (_warn_once if once else _warn)(printable(text))


def _warn(text: str) -> None:
    _logger.warning("%s", text)


@lru_cache(maxsize=1000)
def _warn_once(text: str) -> None:
    _warn(text)


def _networks(content: Mapping[Any, Any], place: str = "", depth: int = 0) -> Iterator[_Network]:
    """Goes over the networks in a file, those in dicts inside it last."""
    keys = [without_compile(key) for key in content if isinstance(key, str)]
    for prefix in network_prefixes(keys):
        yield _Network(content, place, prefix)
    if depth < _MAX_DEPTH:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping):
                yield from _networks(value, f"{place}.{key}".lstrip("."), depth + 1)


def take_network(content: Mapping[str, Any], use_ema: bool = True) -> Taken:
    """Finds the network that is meant in what a file holds, averaged weights first.

    Args:
        content: a state dict, or a checkpoint with state dicts inside.
        use_ema: take averaged weights where there are any.

    Raises:
        CheckpointError: there are several, such as a student and a teacher, and none has a usual name.
    """
    found = list(_networks(content))
    names = (EMA_NAMES if use_ema else ()) + ("state_dict", "model", "state")
    named = next((name for name in names if isinstance(content.get(name), dict) and content[name]), "")
    if not found or (named in EMA_NAMES and all(network.place != named for network in found)):
        # not a Conv2Former, or only a part of one: who loads it says so
        return Taken(content[named] if named else content, named, is_average=named in EMA_NAMES)
    averaged = [network for network in found if network.is_average]
    pool = averaged if averaged and use_ema else [network for network in found if network not in averaged]
    if not pool:
        only = _listed(averaged)[0]
        raise CheckpointError(f"it holds averaged weights alone, {only}, and raw ones are asked for: leave --raw out")
    best = min(pool, key=lambda network: network.rank)
    rivals = [network for network in pool if network is not best]
    if any(network.rank == best.rank for network in rivals) or (rivals and best.rank == len(_USUAL)):
        raise CheckpointError(
            f"it holds {len(pool)} networks, {', '.join(_listed(pool))}, and does not say which is meant; {_how(best)}"
        )
    others = tuple(name for name, network in zip(_listed(pool), pool, strict=True) if network is not best)
    return _taken(best, [network for network in found if network.holder is best.holder], others)


def _listed(networks: list[_Network]) -> list[str]:
    """Returns what to call each: by its place in the file, or by what its names begin with if that tells them apart."""
    by_place = len({network.place for network in networks}) == len(networks)
    return [f"'{(network.place if by_place else '') or network.prefix or network.place}'" for network in networks]


def _how(network: _Network) -> str:
    """Returns how to save one of several networks alone."""
    inside = "".join(f"[{word!r}]" for word in network.place.split(".") if word)
    if network.prefix:
        part = f"{{k: v for k, v in torch.load(FILE){inside}.items() if k.startswith({network.prefix!r})}}"
    else:
        part = f"torch.load(FILE){inside}"
    return f'save that one alone: torch.save({part}, "weights.pt")'


def _taken(network: _Network, beside: list[_Network], others: tuple[str, ...]) -> Taken:
    """Takes a network out of its state dict.

    Args:
        network: the one.
        beside: all networks in the same state dict.
        others: names of networks that could have been meant.
    """
    prefix = network.prefix
    longer = tuple(other.prefix for other in beside if other.prefix.startswith(prefix) and other.prefix != prefix)
    state_dict: dict[Any, Any] = {}
    left_out = []
    for key, value in network.holder.items():
        plain = without_compile(key) if isinstance(key, str) else key
        if not isinstance(plain, str):
            if not prefix:
                state_dict[plain] = value  # who loads it says that it is no name
        elif plain.startswith(prefix) and not (longer and plain.startswith(longer)):
            state_dict[plain[len(prefix) :]] = value
        elif isinstance(value, torch.Tensor) and not any(
            plain.startswith(other.prefix) for other in beside if other.prefix and other is not network
        ):
            left_out.append(plain)
    is_compiled = any(isinstance(key, str) and without_compile(key) != key for key in network.holder)
    return Taken(state_dict, network.place, prefix, network.is_average, is_compiled, tuple(left_out), others)


def native_state_dict(content: Mapping[str, Any], use_ema: bool = True, path: object = None) -> dict[str, Any]:
    """Returns a new state dict in this project's layout from a state dict or checkpoint in any known one.

    Args:
        content: what a file holds.
        use_ema: take averaged weights where there are any.
        path: of the file, to say in the log what was taken off or left out; None to say nothing.

    Raises:
        CheckpointError: it holds something else than tensors, or several networks of which any could be meant.
    """
    state_dict = _tensors(content, use_ema, path)
    rename_keys_in_place(state_dict)
    return state_dict


def plain_state_dict(content: Mapping[str, Any], use_ema: bool = True, path: object = None) -> dict[str, Any]:
    """As `native_state_dict`, of another network than Conv2Former: what wrappers put before its names is taken off."""
    state_dict = {without_compile(key): tensor for key, tensor in _tensors(content, use_ema, path).items()}
    while state_dict and all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): tensor for key, tensor in state_dict.items()}
    return state_dict


def _tensors(content: Mapping[str, Any], use_ema: bool, path: object) -> dict[str, Any]:
    """Returns the state dict that is taken, by its keys in the file."""
    taken = take_network(content, use_ema)
    state_dict = dict(taken.state_dict)
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(f"this is not a state dict of tensors: the key {key!r} is no text")
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            kind = f"{value.layout} tensor" if isinstance(value, torch.Tensor) else type(value).__name__
            raise CheckpointError(f"this is not a state dict of tensors: {key!r} is a {kind}")
    if path is not None and (note := taken.note()):
        announce(f"{path}: {note}", once=True)
    return state_dict
