"""Registers every variant of `configs/models/` and of the user with timm."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model, resolve_pretrained_cfg

from ..errors import CheckpointError, ConfigError
from .backbone import Conv2Former
from .variants import PretrainedTag, Variant, add_variant, list_variants, read_builtin_variants, read_variant, variant
from .weights import CLASSIFIER, FIRST_CONV, adapt_classifier, check_fit, native_state_dict

__all__ = ["register_variant"]  # timm adds every entry point

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
        "classifier": CLASSIFIER[0].rsplit(".", 1)[0],
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
    state_dict = native_state_dict(state_dict)
    first_conv = state_dict.get(f"{FIRST_CONV}.weight")
    chans = model.pretrained_cfg["input_size"][0]
    adapts_input = first_conv is not None and first_conv.ndim == 4 and first_conv.shape[1] == chans
    check_fit(model, state_dict, ignore=[*CLASSIFIER, *([f"{FIRST_CONV}.weight"] if adapts_input else [])])
    classifier = state_dict.get(CLASSIFIER[0])
    model.pretrained_cfg["num_classes"] = 0 if classifier is None or not classifier.ndim else classifier.shape[0]
    if not is_backbone:
        adapt_classifier(model, state_dict)
    return state_dict


def _create(name: str, pretrained: bool, **kwargs: Any) -> Conv2Former:
    if pretrained:
        _require_source(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    return build_model_with_cfg(
        Conv2Former,
        name,
        pretrained,
        pretrained_filter_fn=partial(_filter_fn, is_backbone=kwargs.get("features_only", False)),
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**variant(name).model_args(), **kwargs},
    )


def _require_source(name: str, pretrained_cfg: Any, overlay: dict[str, Any] | None) -> None:
    """Raises CheckpointError if there is no file to load; it says where the authors keep it and what to do with it."""
    cfg = resolve_pretrained_cfg(name, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay)
    if cfg.has_weights or cfg.state_dict:
        return
    tags = variant(name).pretrained
    if not tags:
        raise CheckpointError(f"no pretrained weights are published for {name}; use pretrained=False")
    tag = next((t for t in tags if t.tag == cfg.tag), tags[0])
    raise CheckpointError(
        f"the weights of {name}.{tag.tag} cannot be downloaded by a program: their authors keep them at {tag.page}. "
        f"Download the file by hand, leave it as it is, and load it with "
        f"timm.create_model('{name}', checkpoint_path=FILE) or conv2former.load_weights(model, FILE)"
    )


def _entrypoint(new: Variant) -> Callable[..., Conv2Former]:
    def create(pretrained: bool = False, **kwargs: Any) -> Conv2Former:
        return _create(new.name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = new.name
    create.__doc__ = new.description or f"Conv2Former variant {new.name}"
    return create


def _register(new: Variant) -> Callable[..., Conv2Former]:
    cfgs: dict[str, Any] = {f"{new.name}.{tag.tag}": make_cfg(tag) for tag in new.pretrained} or {
        new.name: make_cfg(None)
    }
    default_cfgs.update(generate_default_cfgs(cfgs))
    entrypoint = register_model(_entrypoint(new))
    add_variant(new)
    return entrypoint


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
    if is_model(new.name) and not (replace and is_own):
        known = "this name is registered with another definition" if new.name in list_variants() else "timm has a model"
        raise ConfigError(f"{where}: {known}: '{new.name}'; give this one another name")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's, about a name that is registered again
        _register(new)
    __all__.remove(new.name)  # timm put it there; a user's name is no attribute of this module
    return new.name


for _variant in read_builtin_variants():
    if not is_model(_variant.name):  # timm may have a model of that name by now
        globals()[_variant.name] = _register(_variant)
