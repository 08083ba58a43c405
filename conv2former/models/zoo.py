"""Registers every variant of `configs/models/`, of the user, and of what is installed with timm."""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    register_model,
    resolve_pretrained_cfg,
)

from .. import _private
from ..errors import CheckpointError, ConfigError, closest, shorten
from ..variants import (
    PretrainedTag,
    Variant,
    add_variant,
    differences,
    list_variants,
    parse_variant,
    read_builtin_variants,
    read_variant,
    variant,
)
from ..weights.architecture import CLASSIFIER, FIRST_CONV, HEAD
from ..weights.contents import native_state_dict
from ..weights.fit import adapt_head, check_fit, lacking_head
from ..weights.installed import InstalledModel, find_installed, names_installed, say_if_unverified, variants_installed
from .backbone import Conv2Former
from .features import accept_any_layout

__all__ = ["register_variant"]  # timm adds every entry point

CLASSIFIER_NAME = CLASSIFIER[0].rsplit(".", 1)[0]

default_cfgs: dict[str, Any] = {}  # where timm's register_model looks when an entry point is registered


def make_cfg(tag: PretrainedTag | None) -> dict[str, Any]:
    """Returns timm's description of one weight file, or of the untrained network."""
    source = tag or PretrainedTag("", top1=0.0)
    cfg = {
        "url": "",  # the authors' files are on a host that a program cannot fetch from
        "num_classes": source.num_classes,
        "input_size": source.input_size,
        "pool_size": tuple(side // 32 for side in source.input_size[1:]),
        "crop_pct": source.crop_pct,
        "crop_mode": source.crop_mode,
        "interpolation": "bicubic",
        # The authors' README says so; their code may have evaluated with mean = std = 0.5 and crop 0.9: see
        # docs/checkpoints.md.
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": FIRST_CONV,
        "classifier": CLASSIFIER_NAME,
        "paper_ids": "arXiv:2211.11943",
        "paper_name": "Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition",
        "license": "apache-2.0",
    }
    if tag:
        cfg["origin_url"] = tag.page or "https://github.com/HVision-NKU/Conv2Former"
        cfg["description"] = f"published ImageNet-1k top-1 at {tag.input_size[-1]}: {tag.top1} %"
    return cfg


def _filter_fn(state_dict: dict[str, Any], model: Conv2Former, is_backbone: bool) -> dict[str, Any]:
    """Prepares a file for timm's `load_pretrained`, which would load nothing at all in silence if every key were wrong.

    timm drops strictness for the whole model when the class counts differ or the input has other channels, so the
    check is made here. It also takes the class count from the registry instead of from the file, so the file's is
    noted for it.
    """
    state_dict = native_state_dict(state_dict, path="the state dict")
    first_conv = state_dict.get(f"{FIRST_CONV}.weight")
    chans = model.pretrained_cfg["input_size"][0]
    adapts_input = first_conv is not None and first_conv.ndim == 4 and first_conv.shape[1] == chans
    ignored = [*CLASSIFIER, *lacking_head(model, state_dict), *([f"{FIRST_CONV}.weight"] if adapts_input else [])]
    check_fit(model, state_dict, ignore=ignored)
    classifier = state_dict.get(CLASSIFIER[0])
    model.pretrained_cfg["num_classes"] = 0 if classifier is None or not classifier.ndim else classifier.shape[0]
    if not is_backbone:
        adapt_head(model, state_dict)
    else:  # the head is taken off after loading; until then the model's own fills in for what the file lacks of it
        state_dict = {**{key: own for key, own in model.state_dict().items() if key.startswith(HEAD)}, **state_dict}
    return state_dict


def _create(
    name: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Conv2Former:
    args: dict[str, Any] = {}
    if not pretrained_cfg or isinstance(pretrained_cfg, str):
        pretrained_cfg, args = _choose(name, pretrained_cfg or "", pretrained, pretrained_cfg_overlay or {})
    elif pretrained:
        cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
        if not (cfg.has_weights or cfg.state_dict):
            raise _not_installed(name, cfg.tag or "")
    model = build_model_with_cfg(
        Conv2Former,
        name,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=partial(_filter_fn, is_backbone=kwargs.get("features_only", False)),
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**variant(name).model_args(), **args, **kwargs},
    )
    if args:
        _private.note_model_args(model, **args)  # timm's export writes down what differs from the entry point
    if kwargs.get("features_only"):
        accept_any_layout(model)
    return model


def _choose(name: str, tag: str, pretrained: bool, overlay: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Finds out which weights are meant.

    Args:
        name: of the variant.
        tag: of the weights, empty for whichever there are.
        pretrained: whether they are to be loaded.
        overlay: timm's `pretrained_cfg_overlay`; weights named there are the ones to load.

    Returns:
        timm's `pretrained_cfg`, or the name of a registered one, and what the network in the file has else than the
        variant.

    Raises:
        CheckpointError: they are not installed, or damaged; or there is no such tag.
    """
    is_given = any(overlay.get(key) for key in ("file", "url", "hf_hub_id", "state_dict"))
    published = next((source for source in variant(name).pretrained if source.tag == tag), None)
    found = None
    if tag or (pretrained and not is_given):
        try:
            found = find_installed(f"{name}.{tag}" if tag else name)
        except CheckpointError:
            if pretrained or not published:  # else they are not needed
                raise
    if found:
        if pretrained and not is_given:
            say_if_unverified(found.name, once=False)
        cfg = _cfg_of(found)
        return {**cfg, "file": None} if is_given else cfg, _args_of(found)
    if (pretrained and not is_given) or (tag and not published):
        raise _not_installed(name, tag)
    return tag, {"kernel_size": published.kernel_size} if published and published.kernel_size else {}


def _cfg_of(found: InstalledModel, labels: bool = True) -> dict[str, Any]:
    """Returns timm's description of installed weights, without what this timm does not know."""
    cfg = {"first_conv": FIRST_CONV, "classifier": CLASSIFIER_NAME, **found.pretrained_cfg(labels)}
    return {key: value for key, value in cfg.items() if key in PretrainedCfg.__dataclass_fields__}


def _args_of(found: InstalledModel) -> dict[str, Any]:
    """Returns what an installed network has else than its variant: a kernel size that nobody knew before."""
    own, args = variant(found.variant).model_args(), found.model_args()
    return {"kernel_size": args["kernel_size"]} if differences(args, own) else {}


def _not_installed(name: str, tag: str) -> CheckpointError:
    """Returns the error where there is no file to load: where the authors keep it, and what to do with it."""
    tags, installed = variant(name).pretrained, names_installed(name)
    also = f"; installed: {shorten(installed)}" if installed else ""
    published = next((source for source in tags if source.tag == tag), None if tag else next(iter(tags), None))
    if published:
        full = f"{name}.{published.tag}"
        return CheckpointError(
            f"the weights {full} are not installed, and no program can download them: their authors keep them at "
            f"{published.page}. Download the file there by hand, leave it as it is, and install it, once: "
            f"python scripts/convert.py FILE --install {full}{also}. Without installing: "
            f"timm.create_model('{full if tag else name}', pretrained=True, pretrained_cfg_overlay=dict(file=FILE))"
        )
    if tag:
        known = shorten(source.tag for source in tags) or "none"
        hint = closest(tag, [*(source.tag for source in tags), *(full.partition(".")[2] for full in installed)])
        return CheckpointError(f"{name} has no weights '{tag}'{hint}; published: {known}{also}")
    return CheckpointError(
        f"no weights are published or installed for {name}; use pretrained=False, or install a file of your own: "
        f"python scripts/convert.py FILE --install {name}.TAG"
    )


def _entrypoint(new: Variant) -> Callable[..., Conv2Former]:
    def create(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
        return _create(new.name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = new.name
    create.__doc__ = new.description or f"Conv2Former variant {new.name}"
    return create


def _register(new: Variant) -> Callable[..., Conv2Former]:
    """Registers a variant with timm: its published weights, and those that are installed."""
    add_variant(new)
    published = [source.tag for source in new.pretrained]
    cfgs = {tag: make_cfg(source) for tag, source in zip(published, new.pretrained, strict=True)} or {
        "": make_cfg(None)
    }
    tags = list(cfgs)
    for name in names_installed(new.name):
        with contextlib.suppress(CheckpointError):  # it says so when it is asked for
            if found := find_installed(name):
                cfgs[found.tag] = _cfg_of(found, labels=False)
    default_cfgs.update(
        generate_default_cfgs({f"{new.name}.{tag}" if tag else new.name: cfg for tag, cfg in cfgs.items()})
    )
    # timm puts weights that are there in front; what `conv2former_t` alone builds must not depend on what is installed
    default_cfgs[new.name].tags = deque([*tags, *(tag for tag in cfgs if tag not in tags)])
    return register_model(_entrypoint(new))


def register_variant(path: str | Path) -> str:
    """Registers a variant of your own with timm, from a YAML file like those in `configs/models/`.

    Registering the same definition again does nothing.

    Args:
        path: the YAML file: `dims`, `depths` and `kernel_size`, and what `conv2former.Variant` lists.

    Returns:
        The name under which `timm.create_model` creates it: the file's `name`, or else the file's own name.

    Raises:
        ConfigError: the file has mistakes, all listed, or the name is taken by another definition or model.
    """
    return add_and_register(read_variant(path), path)


def add_and_register(new: Variant, where: object, replace: bool = False) -> str:
    """Registers an already checked variant. See `register_variant`.

    Args:
        new: the variant.
        where: named in the error.
        replace: let it take the place of another one of the user's own.
    """
    if new.name in list_variants() and variant(new.name).to_dict() == new.to_dict():
        return new.name
    is_own = new.name in list_variants() and new.name not in __all__
    if is_model(new.name) and not (is_own and (replace or new.name in _from_store)):
        known = "this name is registered with another definition" if new.name in list_variants() else "timm has a model"
        raise ConfigError(f"{where}: {known}: '{new.name}'; give this one another name")
    _from_store.discard(new.name)
    _register_own(new)
    return new.name


def _register_own(new: Variant) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's, about a name that is registered again
        _register(new)
    if new.name not in _builtin:
        __all__.remove(new.name)  # timm put it there; a user's name is no attribute of this module


def register_installed(name: str) -> None:
    """Makes timm know what is installed for a variant, or no longer is; a network of the user's own becomes one.

    What is damaged is passed over, as is a network whose name timm has for another: neither may stop a program that
    does not ask for it.
    """
    if name in list_variants():
        _register_own(variant(name))
        return
    for full in [] if is_model(name) else names_installed(name):
        with contextlib.suppress(CheckpointError, ConfigError):
            if name not in list_variants() and (found := find_installed(full)):
                new = parse_variant(found.definition, found.path)
                _from_store.add(name)
                _register_own(new)


_builtin = {new.name: new for new in read_builtin_variants() if not is_model(new.name)}  # timm may have one by now
_from_store: set[str] = set()  # the networks of one's own that are known because they are installed
for _variant in _builtin.values():
    add_variant(_variant)  # all, before any is looked up
for _variant in _builtin.values():
    globals()[_variant.name] = _register(_variant)
for _name in variants_installed():
    if _name not in _builtin:
        register_installed(_name)
