"""The only place where private names of other packages are touched, and what happens where one of them is missing.

A private name may be gone in any release. So each is a `Name`, resolved when it is first used, and a function here
says what is done without it. A missing name costs time or a convenience, which is said once at INFO, and is never an
error. `tests/test_private.py` takes each away in turn.

Not listed one by one are those that every PyTorch of the last years has, on which half its ecosystem stands, and which
stay where they are used, for speed: see `STABLE`.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = [
    "NAMES",
    "STABLE",
    "DispatchMode",
    "Name",
    "add_all",
    "allow_recompiling",
    "can_fake_gpu",
    "compiler_errors",
    "convolution_pointwise",
    "convolution_pointwise_",
    "copy_all",
    "divide_all",
    "end_workers",
    "expected_gradient",
    "fake_gpu",
    "features_of_stream",
    "has_global_hooks",
    "has_pointwise",
    "hush_about_checkpoints",
    "imagenet_file",
    "is_legacy_batched",
    "is_transforming",
    "keep_programs_whole",
    "leaves_out_steps",
    "linear_pointwise",
    "model_card",
    "modes_at_work",
    "multiplies",
    "note_model_args",
    "sees_operators",
    "stands_for_gpu",
    "version_of",
    "worker_processes",
    "write_hub_config",
]

log = logging.getLogger(__name__)

# The dictionaries of a module (an attribute takes ten times as long), the method that torch calls on each module when a
# state dict is loaded (nn.Module's documentation tells how to override it), and the one that nn.Conv2d.forward calls.
STABLE = {
    "_modules",
    "_parameters",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_load_from_state_dict",
    "_conv_forward",
}


class Name:
    """A private name of another package.

    Args:
        path: `module:attribute`, the attribute perhaps with dots.
        otherwise: what is so where it is missing.
    """

    def __init__(self, path: str, otherwise: str) -> None:
        self.path, self.otherwise = path, otherwise

    @functools.cached_property
    def value(self) -> Any:
        """What the name stands for; None where it is missing, which is logged once."""
        module, _, attributes = self.path.partition(":")
        try:
            return functools.reduce(getattr, attributes.split("."), importlib.import_module(module))
        except (ImportError, AttributeError, RuntimeError):  # of which the last is torch.ops' for some
            log.info("this version of %s has no %s: %s", module.partition(".")[0], self.path, self.otherwise)
            return None


_PLAIN = "the blocks run one operation after the other, which takes longer"

# ------------------------------------------------------------------ torch: may the fast path be taken? Else it is not.

# torch.func's transforms (grad, vmap, jvp) that are at work; since torch 2.0
INTERPRETERS = Name("torch:_C._functorch.peek_interpreter_stack", _PLAIN)
# Whether a gradient stands for many (is_grads_batched, vectorised Jacobians); since torch 1.13
LEGACY_BATCHED = Name("torch:_C._functorch.is_legacy_batchedtensor", _PLAIN)
# The depth of torch.autograd.forward_ad.dual_level, -1 outside; a number that is bound anew at every change
LEVEL = Name("torch.autograd.forward_ad:_current_level", _PLAIN)
# Modes that are shown every operation, such as make_fx's; since torch 2.0
MODES = Name("torch.utils._python_dispatch:_get_current_dispatch_mode_stack", _PLAIN)
# Hooks on all modules. torch 2.7 asks for all of them with a function, which 2.6 has not; both have these dictionaries.
GLOBAL_HOOKS = [
    Name(f"torch.nn.modules.module:_global_{kind}_hooks", _PLAIN)
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


def is_transforming() -> bool:
    """Returns whether torch.func or forward-mode differentiation is at work; True where that cannot be told."""
    peek = INTERPRETERS.value
    if peek is None or LEVEL.value is None or LEGACY_BATCHED.value is None:
        return True
    return peek() is not None or forward_ad._current_level >= 0


def is_legacy_batched(gradient: Tensor) -> bool:
    """Returns whether a gradient stands for many; True where that cannot be told."""
    return LEGACY_BATCHED.value is None or LEGACY_BATCHED.value(gradient)


def version_of(x: Tensor) -> int | None:
    """Returns how often a tensor was changed in place; None where that cannot be told."""
    return getattr(x, "_version", None)


# Tensors without memory, which have a device in name only; since torch 1.13. Of a GPU that is not there: since 2.7
FAKE_TENSOR = Name("torch._subclasses:FakeTensor", "launches are not counted where there is no GPU")
FAKE_MODE = Name("torch._subclasses:FakeTensorMode", "launches are not counted where there is no GPU")
# Shapes and types of the gradients that a node of the graph takes; since torch 2.4
NODE_INPUTS = Name("torch.autograd.graph:Node._input_metadata", "launches are not counted where there is no GPU")


def stands_for_gpu(x: Any) -> bool:
    """Returns whether `x` is a tensor of `fake_gpu`, for which all is to run as on a GPU."""
    if FAKE_TENSOR.value is None or type(x) is not FAKE_TENSOR.value:
        return False
    return x.is_cuda and getattr(x.fake_mode, "allows_fused", False)


def can_fake_gpu() -> bool:
    """Returns whether `fake_gpu` works: since torch 2.7."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return version >= (2, 7) and not any(name.value is None for name in (FAKE_TENSOR, FAKE_MODE, NODE_INPUTS))


def fake_gpu() -> Any:
    """Returns a mode in which tensors have shapes, types and a device, even one that is not there, and no memory.

    Those on a GPU are computed with as they would be there (`stands_for_gpu`). `can_fake_gpu` must hold.
    """
    mode = FAKE_MODE.value()
    mode.allows_fused = True
    return mode


def expected_gradient(node: Any, index: int) -> tuple[torch.Size, torch.dtype]:
    """Returns shape and type of the gradient that a node of the autograd graph takes at a place."""
    expected = node._input_metadata[index]
    return torch.Size(expected.shape), expected.dtype


def modes_at_work() -> list[Any] | None:
    """Returns the modes that are shown every operation, or None where that cannot be told."""
    return MODES.value() if MODES.value is not None else None


def has_global_hooks() -> bool:
    """Returns whether there are hooks on all modules; True where that cannot be told."""
    return any(hooks.value is None or hooks.value for hooks in GLOBAL_HOOKS)


# ------------------------------------------- torch: the operators of oneDNN that torch.compile calls on a CPU

_APART = "a bias, an activation or a sum takes a pass over memory of its own on a CPU"
LINEAR = Name("torch:ops.mkldnn._linear_pointwise", _APART)
CONVOLUTION = Name("torch:ops.mkldnn._convolution_pointwise", _APART)
CONVOLUTION_ = Name("torch:ops.mkldnn._convolution_pointwise_", _APART)
HAS_BF16 = Name("torch:ops.mkldnn._is_mkldnn_bf16_supported", "a CPU is taken to multiply bfloat16")
HAS_FP16 = Name("torch:ops.mkldnn._is_mkldnn_fp16_supported", "a CPU is taken to multiply float16")  # since torch 2.3


def has_pointwise() -> bool:
    """Returns whether the three functions below exist. Whether they take what they are given must be tried."""
    return not any(name.value is None for name in (LINEAR, CONVOLUTION, CONVOLUTION_))


def linear_pointwise(*args: Any) -> Tensor:
    """A matrix product and what follows it in one: x, weight, bias, name, scalars, algorithm."""
    return LINEAR.value(*args)


def convolution_pointwise(*args: Any) -> Tensor:
    """A convolution and what follows it in one: x and the convolution's arguments, name, scalars, algorithm."""
    return CONVOLUTION.value(*args)


def convolution_pointwise_(*args: Any) -> Tensor:
    """A convolution that is added to a tensor, which comes first; see `torch.ops.mkldnn._convolution_pointwise_`."""
    return CONVOLUTION_.value(*args)


def multiplies(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN has products of bfloat16 or float16 on this CPU."""
    supported = HAS_BF16 if dtype == torch.bfloat16 else HAS_FP16
    return supported.value is None or bool(supported.value())


# ------------------------------------------------------------------- torch: many tensors by few kernels on a GPU

COPY_ALL = Name("torch:_foreach_copy_", "weights are converted one by one, which launches more kernels on a GPU")
ADD_ALL = Name("torch:_foreach_add_", "gradients of accumulation steps are added up one by one")
DIVIDE_ALL = Name("torch:_foreach_div_", "drop path launches more kernels on a GPU")


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies tensors into others of the same shapes, converting their types."""
    _for_all(COPY_ALL, Tensor.copy_, targets, sources)


def add_all(totals: list[Tensor], more: Sequence[Tensor | float]) -> None:
    """Adds to each tensor, in place, what is at its place in the other list."""
    _for_all(ADD_ALL, Tensor.add_, totals, more)


def divide_all(tensors: list[Tensor], numbers: list[float]) -> None:
    """Divides each tensor, in place, by a number of its own."""
    _for_all(DIVIDE_ALL, Tensor.div_, tensors, numbers)


def _for_all(together: Name, one: Any, tensors: list[Tensor], others: Sequence[Tensor | float]) -> None:
    """Changes tensors in place, with one kernel for many on a GPU, or each by the method `one` where there is none."""
    if together.value is not None:
        together.value(tensors, others)
        return
    for tensor, other in zip(tensors, others, strict=True):
        one(tensor, other)


# ------------------------------------------------------------------------------------ torch: training and measuring

# The base of `DispatchMode`, since torch 1.13
DISPATCH_MODE = Name("torch.utils._python_dispatch:TorchDispatchMode", "bytes moved are not counted")
# How often torch.compile compiles the same code; torch 2.6 has the second name only
RECOMPILE_LIMIT = Name("torch._dynamo:config.recompile_limit", "an older name is tried")
CACHE_SIZE_LIMIT = Name("torch._dynamo:config.cache_size_limit", "torch.compile gives up after a few networks")
# Whether programs are cut where DDP's buckets end; since torch 2.0
OPTIMIZE_DDP = Name("torch._dynamo:config.optimize_ddp", "with DDP a block may be compiled in several pieces")
# The base of all errors of programs that cannot be compiled; since torch 2.0
COMPILER_ERROR = Name("torch._dynamo.exc:TorchDynamoException", "torch.compile's errors are printed in full")


# Ends the worker processes of an iterator over a DataLoader
SHUTDOWN = Name(
    "torch.utils.data.dataloader:_MultiProcessingDataLoaderIter._shutdown_workers",
    "a loader's workers end when Python collects them",
)


class _NoMode:
    """Stands for `DispatchMode` where there is none: shown nothing."""

    def __enter__(self) -> _NoMode:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


DispatchMode: Any = DISPATCH_MODE.value or _NoMode
"""A context whose `__torch_dispatch__` is shown every operation; of nothing where `sees_operators` is False."""


def sees_operators() -> bool:
    """Returns whether a `DispatchMode` is shown anything."""
    return DISPATCH_MODE.value is not None


def allow_recompiling(times: int) -> None:
    """Lets torch.compile compile the same code that often for different networks and shapes."""
    for name in (RECOMPILE_LIMIT, CACHE_SIZE_LIMIT):
        if name.value is not None:
            setattr(importlib.import_module("torch._dynamo").config, name.path.rpartition(".")[2], times)
            return


def keep_programs_whole() -> None:
    """Keeps torch.compile from cutting programs where DDP's buckets end, so that gradients can be exchanged meanwhile.

    That is for a network in one piece. Blocks that are compiled one by one are exchanged one by one anyway.
    """
    if OPTIMIZE_DDP.value is not None:
        importlib.import_module("torch._dynamo").config.optimize_ddp = False


def end_workers(iterator: Any) -> None:
    """Ends the worker processes of an iterator over a DataLoader, and closes its queues; of anything else, nothing."""
    if SHUTDOWN.value is None or not hasattr(iterator, "_shutdown_workers"):
        return
    SHUTDOWN.value(iterator)
    for queue in getattr(iterator, "_index_queues", ()):
        feeder = getattr(queue, "_thread", None)  # which closes the files, and not before it runs again
        if feeder:
            feeder.join(5)


def worker_processes(iterator: Any) -> list[Any]:
    """Returns the worker processes of an iterator over a DataLoader; of anything else, none."""
    return list(getattr(iterator, "_workers", ()))


def hush_about_checkpoints() -> None:
    """Silences torch.compile's advice on checkpoints, which everybody gets who says what is to be saved.

    It is to look for operations in place, of which the program here has none. The logger's name is that of a module of
    torch, so elsewhere nothing is silenced.
    """
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_not_about_checkpoints)


def _is_not_about_checkpoints(record: logging.LogRecord) -> bool:
    return "context_fn" not in record.getMessage()


def compiler_errors() -> tuple[type[Exception], ...]:
    """Returns the errors of torch.compile, for an `except`."""
    return () if COMPILER_ERROR.value is None else (COMPILER_ERROR.value,)


def leaves_out_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether an optimizer reads a `found_inf` and then leaves out the step: torch's fused ones say so.

    One that does not say so is not told: on a GPU each step then waits until its gradients are known to be finite.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


# ------------------------------------------------------------------------------------------------------------- timm

MODEL_ARGS = Name("timm.models._input:update_model_args", "timm's own export leaves out the arguments of weights")
HUB_CONFIG = Name("timm.models._hub:save_config_for_hf", "weights are written twice where a folder is")
README = Name("timm.models._hub:generate_readme", "a model card has no header")


def note_model_args(model: nn.Module, **args: Any) -> None:
    """Notes with what arguments a model was made, beside those of its entry point, for timm's export."""
    if MODEL_ARGS.value is not None:
        MODEL_ARGS.value(model, **args)


def write_hub_config(model: nn.Module, path: Path, model_config: dict[str, Any], model_args: dict[str, Any]) -> None:
    """Writes the configuration of timm's hub layout, and perhaps a file of weights beside it."""
    if HUB_CONFIG.value is not None:
        HUB_CONFIG.value(model, str(path), model_config=model_config, model_args=model_args)
    else:
        args: dict[str, Any] = {"model_config": model_config, "model_args": model_args, "safe_serialization": True}
        timm.models.save_for_hf(model, str(path.parent), **args)


def model_card(card: dict[str, Any], title: str) -> str:
    """Returns the text of a model card.

    Args:
        card: as timm's `push_to_hf_hub` takes it: `description`, `details`, `usage`, `citation`, and tags.
        title: what it is of.
    """
    if README.value is not None:
        return README.value(card, title)
    details = [f"- **{key}:** {value}" for key, value in card["details"].items()]
    lines = [f"# Model card for {title}", card["description"], "\n".join(details), card["usage"]]
    citation = [f"```bibtex\n{card['citation']}\n```"] if "citation" in card else []
    return "\n\n".join([*lines, *citation]) + "\n"


def imagenet_file(name: str) -> str | None:
    """Returns the text of one of timm's lists about ImageNet, in its folder `_info`; None where it is missing."""
    try:
        return (resources.files("timm.data") / "_info" / name).read_text("utf-8")
    except OSError:
        log.info("this version of timm has no %s", name)
        return None


# --------------------------------------------------------------------------------------------------------- datasets

RESOLVE = Name("datasets:IterableDataset._resolve_features", "columns are found out from the first row")


def features_of_stream(dataset: Any) -> Any:
    """Returns a streamed data set whose columns are known: from its first rows, where it does not say."""
    if RESOLVE.value is not None:
        return RESOLVE.value(dataset)
    datasets = importlib.import_module("datasets")
    return dataset.cast(datasets.Dataset.from_list(list(dataset.take(1))).features)


def _all_names(found: dict[str, Any]) -> list[Name]:
    return [name for name in found.values() if isinstance(name, Name)] + GLOBAL_HOOKS


NAMES: list[Name] = _all_names(globals())
